//! Where the local APIC's registers are (SDM vol. 3, "Local APIC Register Address Map").
//!
//! Each is the offset in the xAPIC's page, in bytes. [`x2apic_msr`] gives the MSR.

use crate::msr::X2APIC;

/// Local APIC ID.
pub const ID: u32 = 0x20;
/// Version.
pub const VERSION: u32 = 0x30;
/// Task priority.
pub const TPR: u32 = 0x80;
/// Processor priority.
pub const PPR: u32 = 0xa0;
/// End of interrupt.
pub const EOI: u32 = 0xb0;
/// Logical destination.
pub const LDR: u32 = 0xd0;
/// Destination format.
pub const DFR: u32 = 0xe0;
/// Spurious interrupt vector.
pub const SVR: u32 = 0xf0;
/// The first of eight registers: interrupts in service.
pub const ISR: u32 = 0x100;
/// The first of eight registers: which interrupts are level-triggered.
pub const TMR: u32 = 0x180;
/// The first of eight registers: requested interrupts.
pub const IRR: u32 = 0x200;
/// Error status.
pub const ESR: u32 = 0x280;
/// LVT entry for corrected machine checks.
pub const LVT_CMCI: u32 = 0x2f0;
/// Interrupt command, bits 31:0; in x2APIC mode all 64 bits.
pub const ICR: u32 = 0x300;
/// Interrupt command, bits 63:32, in xAPIC mode.
pub const ICR_HIGH: u32 = 0x310;
/// LVT entry of the timer.
pub const LVTT: u32 = 0x320;
/// LVT entry of the thermal monitor.
pub const LVT_THERMAL: u32 = 0x330;
/// LVT entry of the performance counters.
pub const LVT_PERFORMANCE: u32 = 0x340;
/// LVT entry of the LINT0 pin.
pub const LVT_LINT0: u32 = 0x350;
/// LVT entry of the LINT1 pin.
pub const LVT_LINT1: u32 = 0x360;
/// LVT entry of the APIC's own errors.
pub const LVT_ERROR: u32 = 0x370;
/// The timer's initial count.
pub const TMICT: u32 = 0x380;
/// The timer's current count.
pub const TMCCT: u32 = 0x390;
/// The timer's divide configuration.
pub const TDCR: u32 = 0x3e0;
/// Self IPI, in x2APIC mode.
pub const SELF_IPI: u32 = 0x3f0;

/// From one register to the next, in bytes.
pub const REGISTER_STRIDE: u32 = 16;

/// The MSR of the register at `offset` in x2APIC mode (SDM vol. 3, "x2APIC Register Address Space").
#[must_use]
pub const fn x2apic_msr(offset: u32) -> u32 {
    X2APIC.first() + offset / REGISTER_STRIDE
}
