//! What the main loop does between ticks instead of halting: spin, in the kernel or in user mode; dirty pages.
//!
//! All with interrupts open, in assembly: see [`halt`](super::cpu::halt) for what their handlers may change.

use core::arch::{asm, global_asm};

use super::cpu::Closed;
use super::shared::written_address;

/// Size of a page, in bytes.
pub const PAGE_BYTES: u64 = 0x1000;
/// Where the page of user code is: at the end of what the kernel has for itself. The page after it is the first of CPU
/// 0's tick ring.
const USER_BASE: u64 = 1 << 32;
/// The entry of the page-directory pointer table that maps [`USER_BASE`].
const USER_SLOT: usize = 4;
/// Page table entries: present, accessed (so that the walker need not write), for user mode; and writable.
const USER: u64 = 0x25;
const WRITABLE: u64 = 0x02;

global_asm!(
    ".set USER_BASE, {base}",
    include_str!("user.s"),
    base = const USER_BASE,
    options(att_syntax)
);

unsafe extern "C" {
    static user_code: u8;
    static user_code_end: u8;
    static user_code_limit: u8;
    static mut user_directory: [u64; 512];
    static mut user_table: [u64; 512];
    static mut user_page: [u8; 4096];
    static mut pdpt: [u64; 512];
    fn user_run(seen: u64, word: u64);
    fn user_end() -> !;
}

/// Spins in the kernel until CPU 0 has not handled `seen` ticks, but more.
pub fn spin_in_kernel<S>(_: &mut Closed<S>, seen: u64) {
    // SAFETY: reads a word of a static; as `halt`.
    unsafe {
        asm!(
            "sti",
            "2: cmp [r13], r12",
            "je 2b",
            "cli",
            in("r12") seen, in("r13") written_address(0), clobber_abi("sysv64"), options(nostack, readonly)
        );
    }
}

/// Called on every exception: if user code came to its end, goes on where [`UserMode::spin`] was called.
pub(super) fn end_user_code(vector: u64, rip: u64) {
    const INVALID_OPCODE: u64 = 6;
    let length = (&raw const user_code_end).addr().wrapping_sub((&raw const user_code).addr());
    if vector == INVALID_OPCODE && rip == USER_BASE + length as u64 {
        // SAFETY: nobody else executes at that address, which `user_run` entered; its frame is still on the stack.
        unsafe { user_end() }
    }
}

/// Proof that user mode is set up.
#[derive(Clone, Copy, Debug)]
pub struct UserMode(());

impl UserMode {
    /// Maps the two pages for user mode.
    pub fn new() -> Self {
        let code = &raw const user_code;
        let bytes = (&raw const user_code_limit).addr().wrapping_sub(code.addr());
        let page = (&raw mut user_page).cast::<u8>();
        for n in 0..bytes.min(4096) {
            // SAFETY: between the section's two labels, which `user.s` defines.
            let byte = unsafe { code.wrapping_add(n).read() };
            // SAFETY: inside the page; volatile, because it will be fetched.
            unsafe { page.wrapping_add(n).write_volatile(byte) };
        }
        let (directory, table) = (&raw mut user_directory, &raw mut user_table);
        let ring = written_address(0) & !(PAGE_BYTES - 1);
        let entries = [
            (&raw mut pdpt, USER_SLOT, directory.addr() as u64 | USER | WRITABLE),
            (directory, 0, table.addr() as u64 | USER | WRITABLE),
            (table, 0, page.addr() as u64 | USER),
            (table, 1, ring | USER),
        ];
        for (place, slot, entry) in entries {
            // SAFETY: an entry of a table that `boot.s` or `user.s` defines. What it maps was not mapped before, so that
            // nothing is cached of it, and is nobody's but user mode's.
            unsafe { place.cast::<u64>().wrapping_add(slot).write_volatile(entry) };
        }
        Self(())
    }

    /// As [`spin_in_kernel`], in user mode.
    pub fn spin<S>(self, _: &mut Closed<S>, seen: u64) {
        let word = USER_BASE + PAGE_BYTES + written_address(0) % PAGE_BYTES;
        // SAFETY: the pages are mapped; it keeps to the C ABI, and as `halt`.
        unsafe { user_run(seen, word) };
    }
}

/// RAM that nobody uses, in pages.
#[derive(Clone, Copy, Debug)]
pub struct Pages {
    /// Not 0.
    first: u64,
    count: u64,
}

impl Pages {
    /// The first `count` pages, from 1, of `count` that are free from `first` on.
    pub(super) fn new(first: u64, count: u64) -> Self {
        Self { first, count }
    }

    /// Writes one word to each.
    pub fn touch<S>(self, _: &mut Closed<S>) {
        let Self { first, count } = self;
        // SAFETY: memory in which Rust has nothing; otherwise as `halt`.
        unsafe {
            asm!(
                "sti",
                "2: mov [r12], r13",
                "add r12, {page}",
                "dec r13",
                "jnz 2b",
                "cli",
                page = const PAGE_BYTES,
                inout("r12") first => _, inout("r13") count => _, clobber_abi("sysv64"), options(nostack)
            );
        }
    }
}
