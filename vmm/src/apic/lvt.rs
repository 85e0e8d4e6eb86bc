//! The local vector table: six entries, and the rule that software disable masks them.

use super::registers::LvtKind;
use super::timer::Mode;
use super::vectors::low_byte;

/// Delivery status and remote IRR. Nothing here is ever waiting on a bus, and no LINT pin is driven: both read 0.
const READ_ONLY: u32 = 1 << 12 | 1 << 14;
/// The mask bit.
pub(super) const MASKED: u32 = 1 << 16;

/// One entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry(u32);

impl Entry {
    pub(super) const fn bits(self) -> u32 {
        self.0
    }

    pub(super) const fn vector(self) -> u8 {
        low_byte(self.0)
    }

    pub(super) const fn masked(self) -> bool {
        self.0 & MASKED != 0
    }

    /// The timer mode. A reserved mode is never stored, see [`Entry::is_valid`].
    pub(super) fn timer_mode(self) -> Mode {
        Mode::of_lvtt(self.0).unwrap_or(Mode::OneShot)
    }

    /// Whether a saved value is one that an entry can hold.
    pub(super) const fn is_valid(bits: u32, kind: LvtKind) -> bool {
        bits & !(kind.defined() & !READ_ONLY) == 0
    }
}

/// The table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Lvt {
    pub(super) timer: Entry,
    pub(super) thermal: Entry,
    pub(super) performance: Entry,
    pub(super) lint0: Entry,
    pub(super) lint1: Entry,
    pub(super) error: Entry,
}

impl Lvt {
    /// The table with the entries that `bits` gives.
    pub(super) fn new(bits: impl Fn(LvtKind) -> u32) -> Self {
        let entry = |kind| Entry(bits(kind));
        Self {
            timer: entry(LvtKind::Timer),
            thermal: entry(LvtKind::Thermal),
            performance: entry(LvtKind::Performance),
            lint0: entry(LvtKind::Lint0),
            lint1: entry(LvtKind::Lint1),
            error: entry(LvtKind::Error),
        }
    }

    pub(super) const fn get(&self, kind: LvtKind) -> Entry {
        match kind {
            LvtKind::Timer => self.timer,
            LvtKind::Thermal => self.thermal,
            LvtKind::Performance => self.performance,
            LvtKind::Lint0 => self.lint0,
            LvtKind::Lint1 => self.lint1,
            LvtKind::Error => self.error,
        }
    }

    fn get_mut(&mut self, kind: LvtKind) -> &mut Entry {
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
    /// SDM vol. 3, "Local APIC State After It Has Been Software Disabled": attempts to clear a mask bit while the APIC
    /// is software disabled are ignored.
    pub(super) fn write(&mut self, kind: LvtKind, bits: u32, software_enabled: bool) {
        let forced = if software_enabled { 0 } else { MASKED };
        *self.get_mut(kind) = Entry(bits & kind.defined() & !READ_ONLY | forced);
    }

    /// Masks every entry, as software disable does. Enabling again leaves them masked.
    pub(super) fn mask_all(&mut self) {
        for kind in LvtKind::ALL {
            let entry = self.get_mut(kind);
            *entry = Entry(entry.0 | MASKED);
        }
    }
}
