//! The memory functions that the compiler calls. String instructions, so that none can be compiled into a call to
//! itself.

use core::arch::asm;
use core::ffi::c_void;

/// C's `memcpy`.
///
/// # Safety
/// `n` bytes at `to` may be written and at `from` read; they do not overlap.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut c_void, from: *const c_void, n: usize) -> *mut c_void {
    // SAFETY: the caller's promise; the direction flag is clear (System V ABI).
    unsafe {
        asm!(
            "rep movsq",
            "mov ecx, {rest:e}",
            "rep movsb",
            rest = in(reg) n & 7,
            inout("rcx") n / 8 => _, inout("rdi") to => _, inout("rsi") from => _, options(nostack, preserves_flags)
        );
    }
    to
}

/// C's `memmove`.
///
/// # Safety
/// `n` bytes at `to` may be written and at `from` read.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut c_void, from: *const c_void, n: usize) -> *mut c_void {
    if to.addr().wrapping_sub(from.addr()) >= n {
        // SAFETY: `to` does not begin inside `from`'s bytes, so that copying upwards reads each before it is written.
        return unsafe { memcpy(to, from, n) };
    }
    // SAFETY: the caller's promise; downwards, from the last byte, and the direction flag is clear again after it.
    unsafe {
        asm!(
            "std",
            "rep movsb",
            "cld",
            inout("rcx") n => _,
            inout("rdi") to.wrapping_byte_add(n).wrapping_byte_sub(1) => _,
            inout("rsi") from.wrapping_byte_add(n).wrapping_byte_sub(1) => _,
            options(nostack)
        );
    }
    to
}

/// C's `memset`.
///
/// # Safety
/// `n` bytes at `to` may be written.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut c_void, byte: i32, n: usize) -> *mut c_void {
    let [byte, ..] = byte.to_le_bytes();
    // SAFETY: the caller's promise; the direction flag is clear.
    unsafe {
        asm!(
            "rep stosq",
            "mov ecx, {rest:e}",
            "rep stosb",
            rest = in(reg) n & 7,
            inout("rcx") n / 8 => _, inout("rdi") to => _, in("rax") u64::from_ne_bytes([byte; 8]),
            options(nostack, preserves_flags)
        );
    }
    to
}

/// C's `memcmp`.
///
/// # Safety
/// `n` bytes at `a` and at `b` may be read.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(a: *const c_void, b: *const c_void, n: usize) -> i32 {
    let (x, y): (u32, u32);
    // SAFETY: the caller's promise. With n = 0 nothing is compared and both results are 0.
    unsafe {
        asm!(
            "xor eax, eax",
            "xor edx, edx",
            "repe cmpsb",
            "je 2f",
            "movzx eax, byte ptr [rsi - 1]",
            "movzx edx, byte ptr [rdi - 1]",
            "2:",
            inout("rcx") n => _, inout("rsi") a => _, inout("rdi") b => _,
            out("eax") x, out("edx") y, options(nostack, readonly)
        );
    }
    x.cast_signed().wrapping_sub(y.cast_signed())
}

/// The compiler's name for [`memcmp`] when only equality matters.
///
/// # Safety
/// As [`memcmp`].
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(a: *const c_void, b: *const c_void, n: usize) -> i32 {
    // SAFETY: the caller's promise.
    unsafe { memcmp(a, b, n) }
}
