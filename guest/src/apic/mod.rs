//! The local APIC, accessed through memory (xAPIC) or MSRs (x2APIC).

use guest::clockevent::{LVT_MASKED, LVT_VECTOR};
use guest_abi::{
    lapic::{
        EOI, ICR, ICR_HIGH, ID, LVT_CMCI, LVT_ERROR, LVT_LINT0, LVT_LINT1, LVT_PERFORMANCE, LVT_THERMAL, LVTT, SVR,
        TDCR, TMICT, TPR, VERSION, x2apic_msr,
    },
    msr::IA32_APIC_BASE,
    pv_eoi,
};

use crate::arch::{cpu, mmio, shared};

const BASE_ENABLE: u64 = 1 << 11;
const BASE_X2APIC: u64 = 1 << 10;
const BASE_ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Entries that exist if the version register's highest-entry number is at least the first value.
const OPTIONAL_LVTS: [(u32, u32); 3] = [(4, LVT_PERFORMANCE), (5, LVT_THERMAL), (6, LVT_CMCI)];

const SVR_ENABLE: u32 = 1 << 8;
/// The vector of spurious interrupts; the low four bits are ones on old APICs.
pub const SPURIOUS_VECTOR: u32 = 0xff;
const LVT_MODE: u32 = 3 << 17;

/// ICR bit 12, delivery status: the last IPI is still pending (xAPIC only).
const ICR_PENDING: u32 = 1 << 12;
/// ICR bits 10:8 INIT, bit 14 assert, bits 19:18 all but the sender.
pub const ICR_INIT_OTHERS: u32 = 3 << 18 | 1 << 14 | 5 << 8;
/// ICR bits 10:8 startup; bits 7:0 are the page's number.
pub const ICR_STARTUP_OTHERS: u32 = 3 << 18 | 1 << 14 | 6 << 8;
/// ICR bit 14, and a vector in bits 7:0: fixed, to one physical destination.
pub const ICR_FIXED: u32 = 1 << 14;
/// A fixed interrupt to all but the sender.
pub const ICR_FIXED_OTHERS: u32 = 3 << 18 | ICR_FIXED;

/// How the registers are accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Apic {
    /// Registers in memory.
    XApic,
    /// Registers as MSRs.
    X2Apic,
}

impl Apic {
    /// Switches the APIC on, through MSRs if CPUID has x2APIC, with every LVT entry masked and TPR 0. `None` if its
    /// registers are not where reset puts them.
    pub fn enable(x2apic: bool) -> Option<Self> {
        let base = cpu::rdmsr(IA32_APIC_BASE);
        let want = base | BASE_ENABLE | if x2apic { BASE_X2APIC } else { 0 };
        if want != base {
            cpu::wrmsr(IA32_APIC_BASE, want);
        }
        // x2APIC mode that is already on stays on: only a reset leads from there to xAPIC.
        let apic = if want & BASE_X2APIC != 0 { Self::X2Apic } else { Self::XApic };
        if apic == Self::XApic && base & BASE_ADDRESS != mmio::APIC_BASE as u64 {
            return None;
        }
        let highest = (apic.read(VERSION) >> 16) & 0xff;
        apic.write(SVR, SVR_ENABLE | SPURIOUS_VECTOR);
        apic.write(LVTT, LVT_VECTOR | LVT_MASKED);
        for lvt in [LVT_LINT0, LVT_LINT1, LVT_ERROR] {
            apic.write(lvt, LVT_MASKED);
        }
        for (at_least, lvt) in OPTIONAL_LVTS {
            if highest >= at_least {
                apic.write(lvt, LVT_MASKED);
            }
        }
        apic.write(TPR, 0);
        Some(apic)
    }

    /// Turns paravirtual EOI on for CPU `cpu`, which is this one. CPUID must offer it.
    pub fn enable_pv_eoi(cpu: usize) {
        cpu::wrmsr(pv_eoi::MSR, shared::eoi_address(cpu) | pv_eoi::ENABLE);
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::XApic => "xapic",
            Self::X2Apic => "x2apic",
        }
    }

    fn read(self, register: u32) -> u32 {
        match self {
            Self::XApic => mmio::read(register),
            // The high half of a 32-bit register reads as zero.
            Self::X2Apic => u32::try_from(cpu::rdmsr(x2apic_msr(register))).unwrap_or(0),
        }
    }

    fn write(self, register: u32, value: u32) {
        match self {
            Self::XApic => mmio::write(register, value),
            Self::X2Apic => cpu::wrmsr(x2apic_msr(register), u64::from(value)),
        }
    }

    /// This CPU's APIC ID, the destination of IPIs to it.
    pub fn id(self) -> u32 {
        match self {
            Self::XApic => self.read(ID) >> 24,
            Self::X2Apic => self.read(ID),
        }
    }

    /// Writes the interrupt command register. The receiver sees all earlier stores: in x2APIC mode the write may
    /// overtake them (Intel SDM vol. 3, "MSR Access in x2APIC Mode"), so it serializes. Interrupts must be off, so that
    /// a handler does not send between the two halves.
    pub fn send(self, destination: u32, command: u32) {
        match self {
            Self::XApic => {
                while self.read(ICR) & ICR_PENDING != 0 {
                    cpu::pause();
                }
                self.write(ICR_HIGH, destination << 24);
                self.write(ICR, command);
            }
            Self::X2Apic => {
                cpu::serialize();
                cpu::wrmsr(x2apic_msr(ICR), u64::from(destination) << 32 | u64::from(command));
            }
        }
    }

    /// Ends the interrupt in service on CPU `cpu`, without a write to EOI if the host allows it.
    #[inline(always)]
    pub fn eoi(self, cpu: usize) {
        if !shared::clear_pv_eoi_pending(cpu) {
            self.write(EOI, 0);
        }
    }

    /// Writes the LVT timer entry. In xAPIC mode a later deadline write may overtake this memory write, so a change of
    /// mode is serialized (Intel SDM vol. 3, "TSC-Deadline Mode", asks for MFENCE there).
    pub fn write_timer_lvt(self, value: u32) {
        self.write(LVTT, value);
        if self == Self::XApic && value & LVT_MODE != 0 {
            cpu::serialize();
        }
    }

    /// Writes the timer's divide configuration.
    pub fn write_divide(self, value: u32) {
        self.write(TDCR, value);
    }

    /// Writes the timer's initial count.
    pub fn write_initial_count(self, count: u32) {
        self.write(TMICT, count);
    }
}
