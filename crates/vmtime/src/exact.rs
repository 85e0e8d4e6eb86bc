//! VM time without rounding: the line through a page's base, and what a page cannot express.
//!
//! The guest reads a page's line rounded down to whole nanoseconds. A restore that continued from such a reading would
//! lose the fraction, each time anew. So a restore continues from the line itself, and keeps what the new page's
//! numbers cannot express as a [`Remainder`].
//!
//! The unit is 2⁻⁶³ ns. With a shift of −31, the least of any [`Scale`](crate::Scale), a tick is `mul · 2⁻⁶³` ns. So
//! every line of every page is a whole number of units at every tick, and no sum of them rounds.

use crate::{GuestTsc, PageClock, VmTime};

/// The number of fraction bits.
pub(crate) const FRACTION_BITS: u32 = 63;

/// A VM time in 2⁻⁶³ ns. It ends, as [`VmTime`] does, after 64 bits of whole nanoseconds, and stands still there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(try_from = "RawTime", into = "RawTime"))]
pub struct ExactTime(u128);

/// [`ExactTime`] as a file has it.
#[derive(Clone, Copy)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
struct RawTime {
    ns: u64,
    fraction: u64,
}

/// The error for a `fraction` of 2⁶³ or more, which is 1 ns or more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} of 2^63 is not a fraction of a nanosecond")]
pub struct BadFraction(u64);

/// How far VM time is ahead of a page's line, in 2⁻⁶³ ns: less than 1 ns either way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(transparent))]
pub struct Remainder(i64);

impl Remainder {
    /// The page's line is VM time.
    pub const ZERO: Self = Self(0);

    /// Whether the page's line is VM time.
    #[must_use]
    pub const fn is_zero(&self) -> bool {
        self.0 == 0
    }

    /// In nanoseconds, to the precision of a floating-point number: for people.
    #[must_use]
    #[allow(clippy::cast_precision_loss, reason = "for people")]
    pub fn as_ns(self) -> f64 {
        self.0 as f64 / (1_u64 << FRACTION_BITS) as f64
    }
}

impl ExactTime {
    const MAX: Self = Self((1 << (64 + FRACTION_BITS)) - 1);

    /// The whole nanoseconds `vm`.
    #[must_use]
    pub const fn of(vm: VmTime) -> Self {
        Self((vm.0 as u128) << FRACTION_BITS)
    }

    /// Rounded down to whole nanoseconds.
    #[must_use]
    pub const fn floor(self) -> VmTime {
        // Below 2⁶⁴ by this type's limit.
        #[allow(clippy::cast_possible_truncation, reason = "below 2^64")]
        VmTime((self.0 >> FRACTION_BITS) as u64)
    }

    /// Later by whole nanoseconds.
    #[must_use]
    pub fn after_ns(self, ns: u64) -> Self {
        Self(self.0.saturating_add(Self::of(VmTime(ns)).0)).min(Self::MAX)
    }

    /// VM time where a page's line shows this, if it is ahead of the line by `remainder`.
    #[must_use]
    pub fn ahead_by(self, remainder: Remainder) -> Self {
        Self(self.0.saturating_add_signed(i128::from(remainder.0))).min(Self::MAX)
    }

    /// What a page's line shows at this VM time, if VM time is ahead of it by `remainder`.
    #[must_use]
    pub fn on_line(self, remainder: Remainder) -> Self {
        Self(self.0.saturating_add_signed(-i128::from(remainder.0))).min(Self::MAX)
    }

    /// How far this is ahead of `line`; at most 1 ns either way is kept.
    #[must_use]
    pub fn since_line(self, line: Self) -> Remainder {
        // Both are below 2¹²⁷.
        let ahead = self.0.cast_signed() - line.0.cast_signed();
        Remainder(i64::try_from(ahead).unwrap_or(if ahead.is_negative() { i64::MIN } else { i64::MAX }))
    }

    /// How far this and `other` are apart, in 2⁻⁶³ ns.
    pub(crate) const fn distance(self, other: Self) -> u128 {
        self.0.abs_diff(other.0)
    }

    /// Earlier by `by`; none before VM time 0.
    pub(crate) fn checked_sub(self, by: Self) -> Option<Self> {
        self.0.checked_sub(by.0).map(Self)
    }
}

impl PageClock {
    /// The page's line at `tsc`: [`Self::vm_time`] without its two roundings (a right shift drops half a tick or more,
    /// then the product is cut to whole nanoseconds). A `tsc` before the base gives the base.
    #[must_use]
    pub fn exact(&self, tsc: GuestTsc) -> ExactTime {
        let ticks = tsc.0.saturating_sub(self.tsc_timestamp.0);
        ExactTime(ExactTime::of(self.system_time).0.saturating_add(self.units(ticks))).min(ExactTime::MAX)
    }

    /// The least guest TSC, not before the page's base, at which the page's line is `at` or later; `None` if the TSC
    /// ends before that.
    #[must_use]
    pub fn least_tsc_of_line(&self, at: ExactTime) -> Option<GuestTsc> {
        let left = at.0.saturating_sub(ExactTime::of(self.system_time).0);
        // The divisor is at least 2³¹.
        let ticks = u64::try_from(left.div_ceil(self.units(1))).ok()?;
        self.tsc_timestamp.0.checked_add(ticks).map(GuestTsc)
    }

    /// `ticks` on the line, in 2⁻⁶³ ns: `ticks · mul · 2^(shift + 31)`, and the shift is −31 or more.
    pub(crate) fn units(&self, ticks: u64) -> u128 {
        let product = u128::from(ticks) * u128::from(self.scale.mul()); // below 2⁹⁶
        let by = u32::from(self.scale.shift().saturating_add(31).unsigned_abs());
        product.saturating_mul(1 << by)
    }

    /// `ticks` on the line, as a time.
    pub(crate) fn span(&self, ticks: u64) -> ExactTime {
        ExactTime(self.units(ticks)).min(ExactTime::MAX)
    }
}

impl TryFrom<RawTime> for ExactTime {
    type Error = BadFraction;

    fn try_from(raw: RawTime) -> Result<Self, BadFraction> {
        let RawTime { ns, fraction } = raw;
        if fraction >> FRACTION_BITS != 0 {
            return Err(BadFraction(fraction));
        }
        Ok(Self(Self::of(VmTime(ns)).0 + u128::from(fraction)))
    }
}

impl From<ExactTime> for RawTime {
    fn from(time: ExactTime) -> Self {
        let VmTime(ns) = time.floor();
        let fraction = time.0 - ExactTime::of(VmTime(ns)).0;
        // Below 2⁶³.
        Self { ns, fraction: crate::saturate(fraction) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{Scale, page::PageClock};

    fn pages() -> impl Strategy<Value = PageClock> {
        (any::<u64>(), any::<u64>(), Scale::MIN_MUL..=u32::MAX, -31_i8..=31).prop_map(|(tsc, vm, mul, shift)| {
            PageClock { tsc_timestamp: GuestTsc(tsc), system_time: VmTime(vm), scale: Scale::new(mul, shift).unwrap() }
        })
    }

    #[test]
    fn a_time_has_its_parts() {
        let time = ExactTime::of(VmTime(7)).ahead_by(Remainder(-1));
        assert_eq!(time.floor(), VmTime(6));
        assert_eq!(time.since_line(ExactTime::of(VmTime(7))), Remainder(-1));
        assert_eq!(time.on_line(Remainder(-1)), ExactTime::of(VmTime(7)));
        assert_eq!(ExactTime::MAX.after_ns(1), ExactTime::MAX);
        assert_eq!(ExactTime::of(VmTime(u64::MAX)).floor(), VmTime(u64::MAX));
        assert!((Remainder(1 << 62).as_ns() - 0.5).abs() < f64::EPSILON);
        let (first, last) = (ExactTime::default(), ExactTime::MAX);
        assert_eq!([last.since_line(first), first.since_line(last)], [Remainder(i64::MAX), Remainder(i64::MIN)]);
        assert!(Remainder::ZERO.is_zero() && !Remainder(1).is_zero());
    }

    #[cfg(feature = "serde")]
    #[test]
    fn a_file_keeps_every_bit_and_no_fraction_of_1() {
        let time = ExactTime::of(VmTime(u64::MAX)).ahead_by(Remainder(i64::MAX));
        let json = serde_json::to_string(&time).unwrap();
        assert_eq!(serde_json::from_str::<ExactTime>(&json).unwrap(), time);
        let error = serde_json::from_str::<ExactTime>(r#"{"ns":1,"fraction":9223372036854775808}"#).unwrap_err();
        assert!(error.to_string().contains("9223372036854775808"), "{error}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4096))]

        // Catches: a line that is not the one the guest reads. A reading is at most a nanosecond and the dropped ticks
        // below the line, and equal to it where both are whole.
        #[test]
        fn a_reading_is_below_the_line_by_its_two_roundings(page in pages(), ticks in (any::<u64>(), 0_u32..64)) {
            let tsc = GuestTsc(page.tsc_timestamp.0.saturating_add(ticks.0 >> ticks.1));
            let (line, read) = (page.exact(tsc), page.vm_time(tsc));
            prop_assert!(read <= line.floor());
            if line < ExactTime::MAX {
                let dropped = page.span((1 << page.scale.shift().min(0).unsigned_abs()) - 1);
                prop_assert!(line.distance(ExactTime::of(read)) < (1 << 63) + dropped.0);
            }
        }

        #[test]
        fn the_least_tick_of_a_line_is_least(page in pages(), ns in any::<u64>(), part in any::<i64>()) {
            let at = ExactTime::of(VmTime(ns)).ahead_by(Remainder(part));
            match page.least_tsc_of_line(at) {
                Some(tsc) => {
                    prop_assert!(page.exact(tsc) >= at);
                    prop_assert!(tsc == page.tsc_timestamp || page.exact(GuestTsc(tsc.0 - 1)) < at);
                }
                None => prop_assert!(page.exact(GuestTsc(u64::MAX)) < at),
            }
        }
    }
}
