//! I/O ports. All are those of common VMMs, so that the guest also runs on QEMU and Firecracker.

/// First port of the 16550 serial console (COM1).
pub const SERIAL: u16 = 0x3f8;
/// The ACPI PM1 event registers, 4 bytes: status and enable. Nothing is ever signalled there.
pub const PM1_EVENT: u16 = 0x600;
/// The ACPI PM1 control register, 2 bytes: the machine is in ACPI mode. Its one sleep state is off (S5): writing
/// [`SLEEP_TYPE_OFF`] in bits 12:10 (SLP_TYP) and bit 13 (SLP_EN) ends the machine.
pub const PM1_CONTROL: u16 = 0x604;
/// SLP_TYP of S5.
pub const SLEEP_TYPE_OFF: u8 = 5;
/// The ACPI power management timer: a read of 32 bits gives its count, in the low [`PM_TIMER_BITS`] bits. A guest
/// without ACPI tables finds it by this number, which is QEMU's and Cloud Hypervisor's, too.
pub const PM_TIMER: u16 = 0x608;
/// Width of the count: "24-bit" (ACPI 6.5, 4.8.2.1 "Power Management Timer").
pub const PM_TIMER_BITS: u32 = 24;
/// Its frequency: 3.579545 MHz (the same section).
pub const PM_TIMER_HZ: u32 = 3_579_545;
/// Index and data ports of a PC's real-time clock.
pub const RTC_INDEX: u16 = 0x70;
/// See [`RTC_INDEX`].
pub const RTC_DATA: u16 = 0x71;
/// Its register for the century. There is no standard number: ACPI tables name it.
pub const RTC_CENTURY: u8 = 0x32;
/// QEMU's `isa-debug-exit,iobase=0xf4`: writing `code` ends the machine with status `(code << 1) | 1`.
pub const DEBUG_EXIT: u16 = 0xf4;
/// The keyboard controller's command port; writing [`I8042_RESET`] resets the machine (Firecracker ends there).
pub const I8042_COMMAND: u16 = 0x64;
/// The i8042 command that pulses the CPU's reset line.
pub const I8042_RESET: u8 = 0xfe;
