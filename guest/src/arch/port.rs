//! I/O ports.

use core::arch::asm;

/// Reads a byte.
pub fn inb(port: u16) -> u8 {
    let value;
    // SAFETY: the guest reads only the serial console's ports, which do not touch memory.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags)) };
    value
}

/// Reads 32 bits.
pub fn inl(port: u16) -> u32 {
    let value;
    // SAFETY: the guest reads only the PM timer's port, which does not touch memory.
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") value, options(nomem, nostack, preserves_flags)) };
    value
}

/// Writes a byte.
pub fn outb(port: u16, value: u8) {
    // SAFETY: the guest writes only to the serial console and to the ports that end it; neither touches memory.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags)) };
}
