//! I/O ports. All are those of common VMMs, so that the guest also runs on QEMU and Firecracker.

/// First port of the 16550 serial console (COM1).
pub const SERIAL: u16 = 0x3f8;
/// QEMU's `isa-debug-exit,iobase=0xf4`: writing `code` ends the machine with status `(code << 1) | 1`.
pub const DEBUG_EXIT: u16 = 0xf4;
/// The keyboard controller's command port; writing [`I8042_RESET`] resets the machine (Firecracker ends there).
pub const I8042_COMMAND: u16 = 0x64;
/// The i8042 command that pulses the CPU's reset line.
pub const I8042_RESET: u8 = 0xfe;
