//! Units as types, so that a guest TSC cannot be compared with a host TSC or with nanoseconds by accident.

use core::fmt;

/// A value of the counter that the guest reads with RDTSC, in guest TSC ticks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(transparent))]
pub struct GuestTsc(pub u64);

/// A value of the host's counter, in host TSC ticks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(transparent))]
pub struct HostTsc(pub u64);

/// VM time: nanoseconds that the guest's kvmclock shows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(transparent))]
pub struct VmTime(pub u64);

/// A TSC frequency in kHz, within [`Khz::MIN`]..=[`Khz::MAX`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(try_from = "u32", into = "u32"))]
pub struct Khz(u32);

/// A frequency outside what a TSC can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a TSC frequency of {0} kHz is not between {min} and {max} kHz", min = Khz::MIN.get(), max = Khz::MAX.get())]
pub struct BadKhz(pub u64);

impl Khz {
    /// 10 MHz: a tenth of the slowest TSC that any x86-64 CPU had.
    pub const MIN: Self = Self(10_000);
    /// 100 GHz: ten times the fastest.
    pub const MAX: Self = Self(100_000_000);

    /// A frequency of `khz` kHz.
    ///
    /// # Errors
    /// [`BadKhz`] outside [`Khz::MIN`]..=[`Khz::MAX`].
    pub fn new(khz: u64) -> Result<Self, BadKhz> {
        match u32::try_from(khz) {
            Ok(n) if (Self::MIN.0..=Self::MAX.0).contains(&n) => Ok(Self(n)),
            _ => Err(BadKhz(khz)),
        }
    }

    /// The number of kHz.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl TryFrom<u32> for Khz {
    type Error = BadKhz;

    fn try_from(khz: u32) -> Result<Self, BadKhz> {
        Self::new(u64::from(khz))
    }
}

impl From<Khz> for u32 {
    fn from(khz: Khz) -> Self {
        khz.0
    }
}

impl fmt::Display for Khz {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} kHz", self.0)
    }
}

/// How far a vCPU's TSC is ahead of the base TSC, in guest TSC ticks modulo 2^64: its IA32_TSC_ADJUST.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(transparent))]
pub struct TscAdjust(pub u64);

impl TscAdjust {
    /// Of a vCPU whose TSC is the base.
    pub const ZERO: Self = Self(0);

    /// What the vCPU's TSC reads when the base TSC is `base`.
    #[must_use]
    pub const fn from_base(self, base: GuestTsc) -> GuestTsc {
        GuestTsc(base.0.wrapping_add(self.0))
    }

    /// The base TSC, modulo 2^64, when the vCPU's reads `tsc`.
    #[must_use]
    pub const fn to_base(self, tsc: GuestTsc) -> GuestTsc {
        GuestTsc(tsc.0.wrapping_sub(self.0))
    }

    /// After a write that makes the vCPU's TSC read `to` instead of `from` (SDM vol. 3, "IA32_TSC_ADJUST Register":
    /// both move by the same amount).
    #[must_use]
    pub const fn moved(self, from: GuestTsc, to: GuestTsc) -> Self {
        Self(self.0.wrapping_add(to.0.wrapping_sub(from.0)))
    }
}

/// One instant on a vCPU's clocks, taken from one reading of the host's clock.
///
/// The LAPIC timer counts TSC ticks in TSC-deadline mode and VM time in the others, so it is told both. RDTSC wraps at
/// 2^64, and a guest that writes its TSC can make that happen soon; the base TSC does not, so that an instant can be
/// kept on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Now {
    /// What RDTSC would give: `base` and what this vCPU's TSC is ahead of it, modulo 2^64.
    pub tsc: GuestTsc,
    /// The base TSC, which all vCPUs share, no guest's write moves, and which stands still at its end instead of
    /// wrapping.
    pub base: GuestTsc,
    /// What the guest's kvmclock would show at `tsc`.
    pub vm: VmTime,
}

impl Now {
    /// The instant at which the base TSC is `tsc`, for a vCPU whose TSC is the base.
    #[must_use]
    pub const fn new(tsc: GuestTsc, vm: VmTime) -> Self {
        Self { tsc, base: tsc, vm }
    }

    /// The same instant for a vCPU with this `adjust`.
    #[must_use]
    pub const fn ahead(self, adjust: TscAdjust) -> Self {
        Self { tsc: adjust.from_base(self.base), ..self }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_frequency_is_shown_with_its_unit() {
        assert_eq!(Khz::MIN.to_string(), "10000 kHz");
    }

    proptest! {
        /// A write of IA32_TSC, wherever base and value lie.
        #[test]
        fn a_tsc_that_was_written_reads_what_was_written(base in any::<u64>(), adjust in any::<u64>(), to in any::<u64>()) {
            let (base, adjust) = (GuestTsc(base), TscAdjust(adjust));
            let now = Now::new(base, VmTime(7)).ahead(adjust);
            prop_assert_eq!(adjust.to_base(now.tsc), base);
            let after = now.ahead(adjust.moved(now.tsc, GuestTsc(to)));
            prop_assert_eq!(after, Now { tsc: GuestTsc(to), base, vm: VmTime(7) });
        }
    }
}
