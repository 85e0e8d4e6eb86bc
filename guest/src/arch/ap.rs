//! Application processors: the code that startup IPIs enter, and the IDT that all CPUs then share.

use core::arch::asm;
use core::ptr;

use super::cpu::IrqsOff;
use crate::cpus;

/// Number of the page that application processors start in, as a startup IPI carries it.
///
/// No loader uses this page: this project's and Firecracker's boot data ends below it, command lines and modules begin
/// far above, and QEMU's firmware uses the top of the first megabyte. The kernel has read the loader's data before it
/// writes here anyway.
pub const TRAMPOLINE_PAGE: u8 = 0x8;
const PAGE_BYTES: usize = 0x1000;

unsafe extern "C" {
    static ap_trampoline: u8;
    static ap_trampoline_end: u8;
    static smp_idt_pointer: u8;
}

/// Copies the trampoline to the page that startup IPIs name.
pub fn place_trampoline() {
    let from = &raw const ap_trampoline;
    let bytes = (&raw const ap_trampoline_end).addr().wrapping_sub(from.addr());
    let to: *mut u8 = ptr::with_exposed_provenance_mut(usize::from(TRAMPOLINE_PAGE) * PAGE_BYTES);
    for n in 0..bytes {
        // SAFETY: between the section's two labels, which `boot.s` defines.
        let byte = unsafe { from.wrapping_add(n).read() };
        // SAFETY: identity-mapped memory in which Rust has nothing; volatile, because another CPU will fetch it.
        unsafe { to.wrapping_add(n).write_volatile(byte) };
    }
}

/// Switches this CPU to the IDT of scenario `smp`. Interrupts are off.
pub fn use_smp_idt() {
    // SAFETY: the pointer and the table behind it are static; its gates lead to the handlers of `vectors.s`.
    unsafe { asm!("lidt [{}]", in(reg) &raw const smp_idt_pointer, options(nostack, preserves_flags)) };
}

/// Called once on each application processor by `boot.s`, on its own stack, interrupts off.
#[unsafe(no_mangle)]
extern "C" fn ap_entry(cpu: u32) -> ! {
    // SAFETY: each CPU starts here, once.
    cpus::ap_main(cpu as usize, unsafe { IrqsOff::new() })
}
