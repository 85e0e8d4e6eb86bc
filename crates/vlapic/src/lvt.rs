//! The local vector table: six entries, what their fields mean, and the rule that software disable masks them.

use crate::{
    registers::LvtKind,
    timer::Mode,
    vectors::{FIRST_LEGAL, low_byte},
};

/// Delivery status, read-only. Nothing here is ever waiting on a bus: it reads 0.
const DELIVERY_STATUS: u32 = 1 << 12;
/// Pin polarity: set for active low.
const ACTIVE_LOW: u32 = 1 << 13;
/// Remote IRR, read-only: a level-triggered interrupt was accepted and its EOI has not come.
const REMOTE_IRR: u32 = 1 << 14;
/// Trigger mode: set for level.
const LEVEL: u32 = 1 << 15;
/// The mask bit.
pub(super) const MASKED: u32 = 1 << 16;

/// Delivery modes NMI and ExtINT.
pub(super) const NMI: u32 = 0b100 << 8;
pub(super) const EXTINT: u32 = 0b111 << 8;

/// How an entry interrupts (SDM vol. 3, "Local Vector Table", delivery mode). The other encodings are reserved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Deliver {
    Fixed,
    Smi,
    Nmi,
    Init,
    ExtInt,
}

/// One entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LvtEntry(u32);

impl LvtEntry {
    pub(super) const fn bits(self) -> u32 {
        self.0
    }

    pub(super) const fn vector(self) -> u8 {
        low_byte(self.0)
    }

    pub(super) const fn has_legal_vector(self) -> bool {
        self.vector() >= FIRST_LEGAL
    }

    pub(super) const fn masked(self) -> bool {
        self.0 & MASKED != 0
    }

    /// The delivery mode; none if it is reserved. Entries without the field read it as 0, fixed.
    pub(super) const fn deliver(self) -> Option<Deliver> {
        match self.0 >> 8 & 0b111 {
            0b000 => Some(Deliver::Fixed),
            0b010 => Some(Deliver::Smi),
            0b100 => Some(Deliver::Nmi),
            0b101 => Some(Deliver::Init),
            0b111 => Some(Deliver::ExtInt),
            _ => None,
        }
    }

    /// Whether a pin that is `high` is active.
    pub(super) const fn active(self, high: bool) -> bool {
        high != (self.0 & ACTIVE_LOW != 0)
    }

    /// Whether the pin interrupts for as long as it is active: "Trigger Mode" counts in fixed mode only.
    pub(super) const fn level_fixed(self) -> bool {
        self.0 & LEVEL != 0 && matches!(self.deliver(), Some(Deliver::Fixed))
    }

    pub(super) const fn remote_irr(self) -> bool {
        self.0 & REMOTE_IRR != 0
    }

    /// The timer mode. A reserved mode is never stored, see [`LvtEntry::is_valid`].
    pub(super) fn timer_mode(self) -> Mode {
        Mode::of_lvtt(self.0).unwrap_or(Mode::OneShot)
    }

    /// Whether a saved value is one that an entry can hold.
    pub(super) const fn is_valid(bits: u32, kind: LvtKind) -> bool {
        let reserved = if kind.has_remote_irr() && Self(bits).level_fixed() { 0 } else { REMOTE_IRR };
        bits & !(kind.defined() & !DELIVERY_STATUS & !reserved) == 0
    }
}

/// The table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Lvt {
    pub(super) timer: LvtEntry,
    pub(super) thermal: LvtEntry,
    pub(super) performance: LvtEntry,
    pub(super) lint0: LvtEntry,
    pub(super) lint1: LvtEntry,
    pub(super) error: LvtEntry,
}

impl Lvt {
    /// The table with the entries that `bits` gives.
    pub(super) fn new(bits: impl Fn(LvtKind) -> u32) -> Self {
        let entry = |kind| LvtEntry(bits(kind));
        Self {
            timer: entry(LvtKind::Timer),
            thermal: entry(LvtKind::Thermal),
            performance: entry(LvtKind::Performance),
            lint0: entry(LvtKind::Lint0),
            lint1: entry(LvtKind::Lint1),
            error: entry(LvtKind::Error),
        }
    }

    pub(super) const fn get(&self, kind: LvtKind) -> LvtEntry {
        match kind {
            LvtKind::Timer => self.timer,
            LvtKind::Thermal => self.thermal,
            LvtKind::Performance => self.performance,
            LvtKind::Lint0 => self.lint0,
            LvtKind::Lint1 => self.lint1,
            LvtKind::Error => self.error,
        }
    }

    fn get_mut(&mut self, kind: LvtKind) -> &mut LvtEntry {
        match kind {
            LvtKind::Timer => &mut self.timer,
            LvtKind::Thermal => &mut self.thermal,
            LvtKind::Performance => &mut self.performance,
            LvtKind::Lint0 => &mut self.lint0,
            LvtKind::Lint1 => &mut self.lint1,
            LvtKind::Error => &mut self.error,
        }
    }

    /// Stores what a guest wrote.
    ///
    /// Remote IRR is read-only, and "undefined for edge-triggered interrupts and other delivery modes": there it
    /// becomes 0, so that a guest has a way out of an EOI that never comes.
    ///
    /// SDM vol. 3, "Local APIC State After It Has Been Software Disabled": attempts to clear a mask bit while the APIC
    /// is software disabled are ignored.
    pub(super) fn write(&mut self, kind: LvtKind, bits: u32, software_enabled: bool) {
        let forced = if software_enabled { 0 } else { MASKED };
        let entry = self.get_mut(kind);
        let new = LvtEntry(bits & kind.defined() & !(DELIVERY_STATUS | REMOTE_IRR) | forced);
        let kept = if new.level_fixed() { entry.0 & REMOTE_IRR } else { 0 };
        *entry = LvtEntry(new.0 | kept);
    }

    /// Masks one entry.
    pub(super) fn mask(&mut self, kind: LvtKind) {
        let entry = self.get_mut(kind);
        *entry = LvtEntry(entry.0 | MASKED);
    }

    /// Sets or clears LINT0's remote IRR.
    pub(super) const fn set_remote_irr(&mut self, accepted: bool) {
        self.lint0 = LvtEntry(if accepted { self.lint0.0 | REMOTE_IRR } else { self.lint0.0 & !REMOTE_IRR });
    }

    /// Masks every entry, as software disable does. Enabling again leaves them masked.
    pub(super) fn mask_all(&mut self) {
        for kind in LvtKind::ALL {
            self.mask(kind);
        }
    }
}
