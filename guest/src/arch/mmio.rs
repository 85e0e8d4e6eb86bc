//! The local APIC's page.

use core::ptr;

/// Where the local APIC's registers are after reset; the page tables map this page uncached.
pub const APIC_BASE: usize = 0xfee0_0000;
const PAGE_BYTES: u32 = 0x1000;

fn register(offset: u32) -> *mut u32 {
    // Inside the page and aligned, whatever the caller says.
    let offset = offset & (PAGE_BYTES - 1) & !3;
    ptr::with_exposed_provenance_mut(APIC_BASE | offset as usize)
}

/// Reads the register at `offset`.
pub fn read(offset: u32) -> u32 {
    // SAFETY: an aligned register of a device that is not memory to the compiler.
    unsafe { register(offset).read_volatile() }
}

/// Writes the register at `offset`.
pub fn write(offset: u32, value: u32) {
    // SAFETY: an aligned register of a device that is not memory to the compiler; it changes interrupts, not code.
    unsafe { register(offset).write_volatile(value) }
}
