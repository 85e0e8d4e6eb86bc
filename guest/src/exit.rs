//! Ends the guest, with a status if the VMM has a debug-exit port for it.

use guest_abi::ports::{DEBUG_EXIT, I8042_COMMAND, I8042_RESET};

use crate::arch::{cpu, port};

/// The scenario ran to its end.
pub const OK: u8 = 0;
/// The guest failed: the kvmclock page could not be used.
pub const FAILED: u8 = 1;
/// The command line is wrong, or the machine lacks what every scenario needs.
pub const USAGE: u8 = 2;
/// An exception, or a panic.
pub const CRASHED: u8 = 3;

/// Ends the machine: QEMU's debug-exit port, then the keyboard controller (where Firecracker ends), then a triple
/// fault. Each is tried if the one before it did nothing.
pub fn exit(code: u8) -> ! {
    port::outb(DEBUG_EXIT, code);
    port::outb(I8042_COMMAND, I8042_RESET);
    cpu::triple_fault()
}
