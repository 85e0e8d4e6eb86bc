//! Ticks to nanoseconds by a 32-bit multiplier and a shift, as the kvmclock page does it, and the exact way back.
//!
//! `ns(d) = ((d << shift) · mul) >> 32`, with a right shift where `shift` is negative.

use crate::{Khz, saturate};

/// A multiplier in 2³¹..2³² and a shift in −31..=31: one tick is `mul · 2^(shift − 32)` nanoseconds.
///
/// Both limits hold for every value of this type, read from a file or not; the bounds below rest on them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(try_from = "RawScale", into = "RawScale"))]
pub struct Scale {
    mul: u32,
    shift: i8,
}

/// [`Scale`] as a file has it, before anything is known about it.
#[derive(Clone, Copy)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
struct RawScale {
    mul: u32,
    shift: i8,
}

/// A multiplier or shift that no page of ours has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadScale {
    /// The multiplier lacks its top bit, so precision was thrown away and the inverse's bounds do not hold.
    #[error("the page's multiplier {0:#x} is below 0x80000000")]
    Mul(u32),
    /// A shift that would push every tick out of the 64-bit delta, or none that a TSC's frequency gives.
    #[error("the page's shift {0} is not between -31 and 31")]
    Shift(i8),
}

impl Scale {
    /// The least multiplier.
    pub const MIN_MUL: u32 = 1 << 31;
    /// The largest shift, either way.
    pub const MAX_SHIFT: i8 = 31;
    /// One second.
    const NS_PER_SEC: u64 = 1_000_000_000;

    /// The scale with multiplier `mul` and shift `shift`.
    ///
    /// # Errors
    /// [`BadScale`] for `mul` below 2³¹ or `shift` outside −31..=31.
    pub const fn new(mul: u32, shift: i8) -> Result<Self, BadScale> {
        if mul < Self::MIN_MUL {
            return Err(BadScale::Mul(mul));
        }
        if shift < -Self::MAX_SHIFT || shift > Self::MAX_SHIFT {
            return Err(BadScale::Shift(shift));
        }
        Ok(Self { mul, shift })
    }

    /// The scale that KVM publishes for a TSC of `khz` (`kvm_get_time_scale` in Linux `arch/x86/kvm/x86.c`).
    ///
    /// A tick is scaled by a power of two until a second has more than 10⁹ and at most 2·10⁹ of them; the multiplier
    /// is then 10⁹ over that number, as a 32-bit fraction. With `f` that number:
    ///
    /// - `10⁹ < f ≤ 2·10⁹`, so `2³² > mul ≥ 2³¹`: at `f = 2·10⁹` exactly 2³¹.
    /// - 10⁷ Hz doubles 7 times and 10¹¹ Hz halves 6 times, so the shift stays in −6..=7.
    /// - Halving drops less than one of `f`'s units, under 10⁻⁹ of it: the page runs fast by less than 3600 ns an hour.
    ///   Rounding the multiplier down drops less than 2⁻³¹ of it: slow by less than 1677 ns an hour.
    #[must_use]
    pub fn from_khz(khz: Khz) -> Self {
        let mut f = u64::from(khz.get()) * 1000; // at most 10¹¹
        let mut shift = 0;
        while f > 2 * Self::NS_PER_SEC {
            f >>= 1;
            shift -= 1;
        }
        while f <= Self::NS_PER_SEC {
            f <<= 1;
            shift += 1;
        }
        // 10⁹ · 2³² < 2⁶², and the quotient is below 2³² because f > 10⁹: the fallback is never taken.
        let mul = u32::try_from((Self::NS_PER_SEC << 32) / f).unwrap_or(u32::MAX);
        Self { mul, shift }
    }

    /// Nanoseconds per shifted tick, as a 32-bit fraction; at least 2³¹.
    #[must_use]
    pub const fn mul(self) -> u32 {
        self.mul
    }

    /// Left shift of the ticks, right if negative; −31..=31.
    #[must_use]
    pub const fn shift(self) -> i8 {
        self.shift
    }

    /// The shift's size.
    fn by(self) -> u32 {
        u32::from(self.shift.unsigned_abs())
    }

    /// Nanoseconds that `ticks` take, rounded down.
    ///
    /// Exact: a shifted tick count is below 2⁹⁵ and its product below 2¹²⁷. Equal to [`Self::ns_as_guest`] as long as
    /// that loses no bits. With a scale of [`Self::from_khz`] it first does after 2⁶⁴ shifted ticks, at most 2·10⁹ a
    /// second: 292 years from the page's base.
    #[must_use]
    pub fn ns(&self, ticks: u64) -> u128 {
        let wide = u128::from(ticks);
        let shifted = if self.shift < 0 { wide >> self.by() } else { wide << self.by() };
        (shifted * u128::from(self.mul)) >> 32
    }

    /// Nanoseconds that a guest computes for a delta of `ticks`, bit for bit.
    ///
    /// The guest shifts in 64 bits, so bits shifted out at the top are lost, and keeps bits 32..96 of a 96-bit product
    /// (`pvclock_scale_delta` in Linux `arch/x86/include/asm/pvclock.h`).
    #[must_use]
    pub fn ns_as_guest(&self, ticks: u64) -> u64 {
        let shifted = if self.shift < 0 { ticks >> self.by() } else { ticks << self.by() };
        saturate((u128::from(shifted) * u128::from(self.mul)) >> 32) // below 2⁶⁴: nothing is cut
    }

    /// The least number of ticks `d` with `ns(d) ≥ ns`; `None` if it is above [`u64::MAX`].
    ///
    /// With `m` the shifted ticks: `⌊m · mul / 2³²⌋ ≥ ns` exactly if `m · mul ≥ ns · 2³²`, so the least `m` is
    /// `⌈ns · 2³² / mul⌉`. From `m` to `d`:
    /// - right shift by k: `⌊d / 2ᵏ⌋ ≥ m` exactly if `d ≥ m · 2ᵏ`;
    /// - left shift by k: `d · 2ᵏ ≥ m` exactly if `d ≥ ⌈m / 2ᵏ⌉`.
    ///
    /// Rounding once, over the combined shift, is not enough: a right shift drops bits that the guest never sees, so
    /// the least `d` is a multiple of 2ᵏ.
    ///
    /// Bounds: `ns · 2³² < 2⁹⁶`; `mul ≥ 2³¹`, so `m ≤ 2⁶⁵`; `m · 2³¹ ≤ 2⁹⁶`.
    #[must_use]
    pub fn ticks(&self, ns: u64) -> Option<u64> {
        let m = (u128::from(ns) << 32).div_ceil(u128::from(self.mul));
        let d = if self.shift < 0 { m << self.by() } else { m.div_ceil(1 << self.by()) };
        u64::try_from(d).ok()
    }
}

impl TryFrom<RawScale> for Scale {
    type Error = BadScale;

    fn try_from(raw: RawScale) -> Result<Self, BadScale> {
        let RawScale { mul, shift } = raw;
        Self::new(mul, shift)
    }
}

impl From<Scale> for RawScale {
    fn from(scale: Scale) -> Self {
        let Scale { mul, shift } = scale;
        Self { mul, shift }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn scales() -> impl Strategy<Value = Scale> {
        (Scale::MIN_MUL..=u32::MAX, -31_i8..=31).prop_map(|(mul, shift)| Scale::new(mul, shift).unwrap())
    }

    /// Numbers of every magnitude, the ends included.
    fn any_size() -> impl Strategy<Value = u64> {
        prop_oneof![(any::<u64>(), 0_u32..64).prop_map(|(n, by)| n >> by), Just(0), Just(u64::MAX)]
    }

    const HOUR_NS: i128 = 3_600_000_000_000;

    /// How far a clock on the page is from the truth after one hour of ticks, in ns.
    fn reading_after_an_hour(khz: u64) -> i128 {
        let scale = Scale::from_khz(Khz::new(khz).unwrap());
        i128::try_from(scale.ns(khz * 1000 * 3600)).unwrap() - HOUR_NS
    }

    /// How far the page's rate, `mul · 2^(shift − 32)` ns a tick, is from the truth, in ns an hour, to the nearest.
    fn drift_per_hour(khz: u64) -> i128 {
        let scale = Scale::from_khz(Khz::new(khz).unwrap());
        let fraction_bits = u32::try_from(32 - i32::from(scale.shift())).unwrap();
        let ns = i128::from(khz * 1000 * 3600) * i128::from(scale.mul()); // in 2^-fraction_bits
        let error = ns - (HOUR_NS << fraction_bits);
        (error + (1 << (fraction_bits - 1))) >> fraction_bits
    }

    #[test]
    fn drifts_as_published() {
        let khz = [1_000_000, 2_000_000, 1_500_000, 3_000_000, 2_600_000];
        assert_eq!(khz.map(drift_per_hour), [0, 0, -838, -838, -1006]);
        // The clock itself shows whole nanoseconds, rounded down: −838.2 is −839.
        assert_eq!(khz.map(reading_after_an_hour), [0, 0, -839, -839, -1006]);
    }

    #[test]
    fn known_scales() {
        let of = |khz| RawScale::from(Scale::from_khz(Khz::new(khz).unwrap()));
        for (khz, mul, shift) in [(1_000_000, 1 << 31, 1), (2_000_000, 1 << 31, 0), (4_000_000, 1 << 31, -1)] {
            assert_eq!((of(khz).mul, of(khz).shift), (mul, shift));
        }
        assert_eq!(of(u64::from(Khz::MIN.get())).shift, 7);
        assert_eq!(of(u64::from(Khz::MAX.get())).shift, -6);
    }

    #[test]
    fn a_left_shift_that_overflows_is_lost_in_the_guest_only() {
        let scale = Scale::new(1 << 31, 1).unwrap();
        assert_eq!(scale.ns(1 << 63), 1 << 63);
        assert_eq!(scale.ns_as_guest(1 << 63), 0);
    }

    #[cfg(feature = "serde")]
    #[test]
    fn refuses_what_a_file_must_not_hold() {
        for bad in
            [r#"{"mul":1,"shift":0}"#, r#"{"mul":2147483648,"shift":32}"#, r#"{"mul":2147483648,"shift":0,"x":1}"#]
        {
            serde_json::from_str::<Scale>(bad).unwrap_err();
        }
        let good = Scale::new(u32::MAX, -31).unwrap();
        assert_eq!(serde_json::from_str::<Scale>(&serde_json::to_string(&good).unwrap()).unwrap(), good);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4096))]

        #[test]
        fn ticks_is_the_exact_inverse(scale in scales(), ns in any_size()) {
            match scale.ticks(ns) {
                Some(d) => {
                    prop_assert!(scale.ns(d) >= u128::from(ns));
                    prop_assert!(d == 0 || scale.ns(d - 1) < u128::from(ns));
                }
                None => prop_assert!(scale.ns(u64::MAX) < u128::from(ns)),
            }
        }

        #[test]
        fn guest_and_host_agree_while_no_bit_is_lost(scale in scales(), ticks in any_size()) {
            if scale.shift() < 0 || ticks.leading_zeros() >= u32::from(scale.shift().unsigned_abs()) {
                prop_assert_eq!(u128::from(scale.ns_as_guest(ticks)), scale.ns(ticks));
            }
        }

        #[test]
        fn outside_the_limits_is_an_error(mul in any::<u32>(), shift in any::<i8>()) {
            let legal = mul >= 1 << 31 && (-31..=31).contains(&shift);
            prop_assert_eq!(Scale::new(mul, shift).is_ok(), legal);
        }

        // The two errors of `from_khz`'s comment, and 2 ns for the two roundings of `ns` itself. A wrong shift or a
        // multiplier off by a few units is far outside: one unit of `mul` is 838 to 1677 ns an hour.
        #[test]
        fn every_frequency_has_a_scale_that_drifts_little(khz in Khz::MIN.get()..=Khz::MAX.get()) {
            let scale = Scale::from_khz(Khz::new(u64::from(khz)).unwrap());
            prop_assert_eq!(Scale::new(scale.mul(), scale.shift()), Ok(scale));
            let drift = reading_after_an_hour(u64::from(khz));
            prop_assert!((-1679..3600).contains(&drift), "{} ns/h", drift);
        }
    }
}
