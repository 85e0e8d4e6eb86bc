//! The main loop's work between ticks, instead of a halt: spins in the kernel or in user mode, and dirties pages.
//!
//! All of it is assembly with interrupts on: see [`halt`](super::cpu::halt) for the registers that handlers may change.

use core::arch::{asm, global_asm};

use super::cpu::IrqsOff;
use super::shared::written_address;

/// Size of a page, in bytes.
pub const PAGE_BYTES: u64 = 0x1000;
/// Address of the page of user code: where the kernel's own mappings end. The page after it is the first of CPU 0's
/// tick ring.
const USER_BASE: u64 = 1 << 32;
/// The entry of the page-directory pointer table that maps [`USER_BASE`].
const USER_SLOT: usize = 4;
/// Bits of page table entries: present, user, accessed (so that the page walker need not set it); and writable.
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

/// Spins in the kernel while CPU 0's count of ticks is `seen`.
pub fn spin_in_kernel<S>(_: &mut IrqsOff<S>, seen: u64) {
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

/// Called on every exception. If it is the one that ends user code, returns from [`UserMode::spin`].
pub(super) fn end_user_code(vector: u64, rip: u64) {
    const INVALID_OPCODE: u64 = 6;
    let length = (&raw const user_code_end).addr().wrapping_sub((&raw const user_code).addr());
    if vector == INVALID_OPCODE && rip == USER_BASE + length as u64 {
        // SAFETY: only user code executes at that address, and `user_run` entered it: its frame is still on the stack.
        unsafe { user_end() }
    }
}

/// Token: user mode is set up.
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
            // SAFETY: an entry of a table that `boot.s` or `user.s` defines. Its addresses were not mapped before, so
            // that the TLB holds nothing of them, and only user mode uses them.
            unsafe { place.cast::<u64>().wrapping_add(slot).write_volatile(entry) };
        }
        Self(())
    }

    /// As [`spin_in_kernel`], in user mode.
    pub fn spin<S>(self, _: &mut IrqsOff<S>, seen: u64) {
        let word = USER_BASE + PAGE_BYTES + written_address(0) % PAGE_BYTES;
        // SAFETY: the pages are mapped; it keeps to the C ABI, and as `halt`.
        unsafe { user_run(seen, word) };
    }
}

/// Pages of unused RAM.
#[derive(Clone, Copy, Debug)]
pub struct Pages {
    /// Address, not 0.
    first: u64,
    count: u64,
}

impl Pages {
    /// `count` unused pages from address `first`; at least one.
    pub(super) fn new(first: u64, count: u64) -> Self {
        Self { first, count }
    }

    /// Writes one word to each page.
    pub fn touch<S>(self, _: &mut IrqsOff<S>) {
        let Self { first, count } = self;
        // SAFETY: memory that holds no Rust object; otherwise as `halt`.
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
