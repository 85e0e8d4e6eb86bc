//! The one table of registers, with the rights that each door has on each.
//!
//! A register's number is its xAPIC offset divided by 16, which is also its x2APIC MSR minus the first of those (SDM
//! vol. 3, "Local APIC Register Address Map" and "x2APIC Register Address Space"). What the table does not list is
//! reserved through both doors: an error in ESR through the xAPIC page, #GP through an x2APIC MSR.

use guest_abi::lapic::{self, REGISTER_STRIDE};

/// Words of IRR, ISR and TMR: 256 vectors in 32-bit registers.
pub(super) const WORDS: usize = 8;

/// The way by which a guest reaches the table. (CR8 is a third one, to TPR alone.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Door {
    /// The 4 KiB page at IA32_APIC_BASE.
    XApic,
    /// The MSRs of [`guest_abi::msr::X2APIC`].
    X2Apic,
}

/// What a door lets through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rights {
    /// Behind this door there is no such register.
    Absent,
    ReadOnly,
    WriteOnly,
    ReadWrite,
}

impl Rights {
    pub(super) const fn readable(self) -> bool {
        matches!(self, Self::ReadOnly | Self::ReadWrite)
    }

    pub(super) const fn writable(self) -> bool {
        matches!(self, Self::WriteOnly | Self::ReadWrite)
    }
}

/// Entries of the local vector table that this APIC has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LvtKind {
    Timer,
    Thermal,
    Performance,
    Lint0,
    Lint1,
    Error,
}

/// Registers, by the manual's abbreviations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Register {
    Id,
    Version,
    Tpr,
    Ppr,
    Eoi,
    Ldr,
    Dfr,
    Svr,
    Isr,
    Tmr,
    Irr,
    Esr,
    Icr,
    IcrHigh,
    Lvt(LvtKind),
    Tmict,
    Tmcct,
    Tdcr,
    SelfIpi,
}

/// One row: a register, or the [`WORDS`] registers that make up one set of vectors.
#[derive(Clone, Copy, Debug)]
pub(super) struct RegisterEntry {
    pub(super) register: Register,
    first: u32,
    count: u32,
    pub(super) xapic: Rights,
    pub(super) x2apic: Rights,
    /// Bits that are not reserved. Setting another one is #GP through an MSR and has no effect through the page.
    /// Read-only bits count as defined: writing them is allowed and does nothing.
    defined: u32,
    /// Whether bits 63:32 are defined too, which only an MSR can reach.
    wide: bool,
}

impl RegisterEntry {
    /// The bits that are not reserved.
    pub(super) fn defined(&self) -> u64 {
        join(self.defined, if self.wide { u32::MAX } else { 0 })
    }
}

/// Bits 31:0 and bits 63:32.
pub(super) const fn split(value: u64) -> (u32, u32) {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]))
}

/// The inverse of [`split`].
pub(super) fn join(low: u32, high: u32) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}

/// TPR: sub-class and class.
const TPR: u32 = 0xff;
/// The xAPIC ID.
const XAPIC_ID: u32 = 0xff00_0000;
/// LDR and DFR as the xAPIC door writes them.
pub(super) const LDR: u32 = 0xff00_0000;
pub(super) const DFR: u32 = 0xf000_0000;
/// Vector, software enable, and the focus-check bit, which 32-bit Linux sets and nothing here reads. Bit 12, suppress
/// EOI-broadcast, is reserved: the version register does not offer it.
pub(super) const SVR: u32 = 0x3ff;
/// Vector, delivery mode, destination mode, delivery status, level, trigger mode, shorthand.
pub(super) const ICR: u32 = 0x000c_dfff;
/// Destination as the xAPIC door writes it; through the MSR it has all 32 bits.
const ICR_HIGH: u32 = 0xff00_0000;
/// Divide value: bits 3, 1 and 0.
pub(super) const TDCR: u32 = 0b1011;

impl LvtKind {
    pub(super) const ALL: [Self; 6] =
        [Self::Timer, Self::Thermal, Self::Performance, Self::Lint0, Self::Lint1, Self::Error];

    /// Whether an entry can be level-triggered. SDM vol. 3, "Local Vector Table": "Level-sensitive interrupts are not
    /// supported for LINT1"; there the trigger mode is a bit that nothing reads.
    pub(super) const fn has_remote_irr(self) -> bool {
        matches!(self, Self::Lint0)
    }

    /// The bits that an entry has (SDM vol. 3, "Local Vector Table").
    pub(super) const fn defined(self) -> u32 {
        match self {
            // Vector, delivery status, mask; and the timer mode.
            Self::Timer => 0x0007_10ff,
            // Delivery mode too.
            Self::Thermal | Self::Performance => 0x0001_17ff,
            // And polarity, remote IRR, trigger mode.
            Self::Lint0 | Self::Lint1 => 0x0001_f7ff,
            Self::Error => 0x0001_10ff,
        }
    }
}

const fn row(register: Register, offset: u32, xapic: Rights, x2apic: Rights, defined: u32) -> RegisterEntry {
    let first = offset / REGISTER_STRIDE;
    RegisterEntry { register, first, count: 1, xapic, x2apic, defined, wide: matches!(register, Register::Icr) }
}

const fn read_only(register: Register, offset: u32, count: u32) -> RegisterEntry {
    RegisterEntry { count, ..row(register, offset, Rights::ReadOnly, Rights::ReadOnly, 0) }
}

const fn lvt(kind: LvtKind, offset: u32) -> RegisterEntry {
    row(Register::Lvt(kind), offset, Rights::ReadWrite, Rights::ReadWrite, kind.defined())
}

/// Every register. APR and RRD (0x09, 0x0c) and the LVT entry for CMCI (0x2f) are left out: current processors lack
/// the first two, and a version register that ends at LVT entry 5 says that the third is missing.
const TABLE: [RegisterEntry; 24] = {
    use Rights::{Absent, ReadOnly, ReadWrite, WriteOnly};
    [
        // "Local APIC ID": writable on some processors; kvm-unit-tests gives two CPUs one ID to see both get a message.
        row(Register::Id, lapic::ID, ReadWrite, ReadOnly, XAPIC_ID),
        read_only(Register::Version, lapic::VERSION, 1),
        row(Register::Tpr, lapic::TPR, ReadWrite, ReadWrite, TPR),
        read_only(Register::Ppr, lapic::PPR, 1),
        // No bit is defined, so that the MSR takes only 0; the page takes any value.
        row(Register::Eoi, lapic::EOI, WriteOnly, WriteOnly, 0),
        row(Register::Ldr, lapic::LDR, ReadWrite, ReadOnly, LDR),
        row(Register::Dfr, lapic::DFR, ReadWrite, Absent, DFR),
        row(Register::Svr, lapic::SVR, ReadWrite, ReadWrite, SVR),
        read_only(Register::Isr, lapic::ISR, 8),
        read_only(Register::Tmr, lapic::TMR, 8),
        read_only(Register::Irr, lapic::IRR, 8),
        // As for EOI.
        row(Register::Esr, lapic::ESR, ReadWrite, ReadWrite, 0),
        // One register of 64 bits through the MSR, two of 32 through the page.
        row(Register::Icr, lapic::ICR, ReadWrite, ReadWrite, ICR),
        row(Register::IcrHigh, lapic::ICR_HIGH, ReadWrite, Absent, ICR_HIGH),
        lvt(LvtKind::Timer, lapic::LVTT),
        lvt(LvtKind::Thermal, lapic::LVT_THERMAL),
        lvt(LvtKind::Performance, lapic::LVT_PERFORMANCE),
        lvt(LvtKind::Lint0, lapic::LVT_LINT0),
        lvt(LvtKind::Lint1, lapic::LVT_LINT1),
        lvt(LvtKind::Error, lapic::LVT_ERROR),
        row(Register::Tmict, lapic::TMICT, ReadWrite, ReadWrite, 0xffff_ffff),
        read_only(Register::Tmcct, lapic::TMCCT, 1),
        row(Register::Tdcr, lapic::TDCR, ReadWrite, ReadWrite, TDCR),
        row(Register::SelfIpi, lapic::SELF_IPI, Absent, WriteOnly, 0xff),
    ]
};

/// The row for a register's number, and which of the row's registers it is.
pub(super) fn find(number: u32) -> Option<(&'static RegisterEntry, usize)> {
    TABLE.iter().find_map(|entry| {
        let word = number.checked_sub(entry.first).filter(|word| *word < entry.count)?;
        Some((entry, usize::try_from(word).ok()?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_in_order_and_do_not_overlap() {
        for pair in TABLE.windows(2) {
            assert!(pair[0].first + pair[0].count <= pair[1].first, "{pair:?}");
        }
    }

    #[test]
    fn every_row_is_found_and_the_gaps_are_not() {
        let listed: u32 = TABLE.iter().map(|entry| entry.count).sum();
        assert_eq!((0..0x1000).filter(|number| find(*number).is_some()).count(), usize::try_from(listed).unwrap());
        assert_eq!(find(0x17).map(|(entry, word)| (entry.register, word)), Some((Register::Isr, 7)));
        assert!(find(0x09).is_none() && find(0x0c).is_none() && find(0x2f).is_none() && find(u32::MAX).is_none());
    }
}
