//! A signed length of VM time without rounding, to compare two pages.

use core::ops::{Add, Sub};

use crate::{GuestTsc, PageClock, exact::FRACTION_BITS};

/// A signed length in 2⁻⁶³ ns, or a VM time as its distance from VM time 0. Its sums end at ±2⁶⁴ ns and stand still
/// there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ExactSpan(i128);

impl ExactSpan {
    /// No length.
    pub const ZERO: Self = Self(0);

    /// Whole nanoseconds.
    #[must_use]
    pub const fn of_ns(ns: i64) -> Self {
        Self((ns as i128) << FRACTION_BITS)
    }

    /// Whole nanoseconds without a sign, up to 2⁶⁴ − 1.
    #[must_use]
    pub const fn of_u64_ns(ns: u64) -> Self {
        // Below 2¹²⁷.
        Self(((ns as u128) << FRACTION_BITS).cast_signed())
    }

    /// `ticks` of a counter of `khz`, rounded down to 2⁻⁶³ ns.
    #[must_use]
    pub fn of_ticks(ticks: u64, khz: crate::Khz) -> Self {
        let khz = u128::from(khz.get());
        let ns_khz = u128::from(ticks) * crate::NS_KHZ_PER_TICK; // below 2⁸⁴
        let (whole, rest) = (ns_khz / khz, ns_khz % khz);
        // The rest is below 2²⁷.
        let fraction = (rest << FRACTION_BITS) / khz;
        let Ok(whole) = u64::try_from(whole) else { return Self(i128::MAX) };
        Self::of_u64_ns(whole) + Self(fraction.cast_signed())
    }

    /// Without its sign.
    #[must_use]
    pub const fn abs(self) -> Self {
        Self(self.0.saturating_abs())
    }

    /// In nanoseconds, to the precision of a floating-point number: for people and statistics.
    #[must_use]
    #[allow(clippy::cast_precision_loss, reason = "for people and statistics")]
    pub fn as_ns(self) -> f64 {
        self.0 as f64 / (1_u64 << FRACTION_BITS) as f64
    }
}

impl Add for ExactSpan {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }
}

impl Sub for ExactSpan {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }
}

impl PageClock {
    /// The page's line at `tsc`, also before its base, where no guest may read it. [`Self::exact`] is the same from the
    /// base on.
    #[must_use]
    pub fn line(&self, tsc: GuestTsc) -> ExactSpan {
        let units = |ticks: u64| ExactSpan(i128::try_from(self.units(ticks)).unwrap_or(i128::MAX));
        let base = ExactSpan::of_u64_ns(self.system_time.0);
        match tsc.0.checked_sub(self.tsc_timestamp.0) {
            Some(ticks) => base + units(ticks),
            None => base - units(self.tsc_timestamp.0.saturating_sub(tsc.0)),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{ExactTime, Khz, Scale, VmTime};

    fn page(tsc: u64, vm: u64, mul: u32, shift: i8) -> PageClock {
        PageClock { tsc_timestamp: GuestTsc(tsc), system_time: VmTime(vm), scale: Scale::new(mul, shift).unwrap() }
    }

    #[test]
    fn a_length_has_a_sign() {
        let half = page(10, 100, 1 << 31, 0);
        assert_eq!(half.line(GuestTsc(11)) - ExactSpan::of_ns(100), ExactSpan::of_ns(100) - half.line(GuestTsc(9)));
        assert!(((half.line(GuestTsc(9)) - ExactSpan::of_ns(100)).as_ns() + 0.5).abs() < f64::EPSILON);
        assert_eq!(ExactSpan::of_ns(-3).abs(), ExactSpan::of_ns(3));
        assert_eq!(ExactSpan(i128::MAX) + ExactSpan::of_ns(1), ExactSpan(i128::MAX));
        assert_eq!(ExactSpan::of_ns(1) - ExactSpan::of_ns(1), ExactSpan::ZERO);
    }

    #[test]
    fn ticks_are_ticks_over_the_frequency() {
        let khz = |khz| Khz::new(khz).unwrap();
        assert_eq!(ExactSpan::of_ticks(3, khz(3_000_000)), ExactSpan::of_ns(1));
        assert_eq!(ExactSpan::of_ticks(1, khz(2_000_000)), ExactSpan(1 << 62));
        assert_eq!(ExactSpan::of_ticks(u64::MAX, Khz::MIN), ExactSpan(i128::MAX));
    }

    proptest! {
        // Catches: a second formula for the line, which then differs from the one that restores use.
        #[test]
        fn from_the_base_on_the_line_is_the_exact_time(
            base in any::<u64>(), vm in 0..u64::MAX / 4, mul in Scale::MIN_MUL..=u32::MAX, shift in -31_i8..=0,
            ticks in 0_u64..1 << 60,
        ) {
            let page = page(base, vm, mul, shift);
            let tsc = GuestTsc(base.saturating_add(ticks));
            let exact = page.exact(tsc);
            let whole = ExactTime::of(exact.floor());
            let fraction = exact.since_line(whole).as_ns();
            let difference = page.line(tsc) - ExactSpan::of_u64_ns(exact.floor().0);
            prop_assert!((difference.as_ns() - fraction).abs() < 1e-12 && difference >= ExactSpan::ZERO);
        }
    }
}
