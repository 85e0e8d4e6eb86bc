//! The I/O APIC as PCs have it (Intel, "82093AA I/O Advanced Programmable Interrupt Controller").

/// Guest physical address of its registers: where a PC's is, unless firmware has moved it.
pub const ADDRESS: u32 = 0xfec0_0000;
/// The I/O register select register, as an offset.
pub const SELECT: u32 = 0x00;
/// The I/O window register, as an offset: the register that the first one names.
pub const WINDOW: u32 = 0x10;
/// The timer's pin. Its ISA interrupt is 0; the MADT of a PC names this difference.
pub const TIMER_PIN: u8 = 2;
