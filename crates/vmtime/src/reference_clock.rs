//! The host's own judge of VM time, which knows nothing of pages.
//!
//! A tick is judged twice, so that an error in the page's arithmetic shows. This is the second time: ticks over
//! frequency, summed over the stretches between migrations as an exact fraction, so that it has no drift to forgive.
//! Against it the page drifts as KVM's does (see [`crate::Scale::from_khz`]).

use crate::{GuestTsc, Khz, NS_KHZ_PER_TICK, VmTime};

/// VM time from the true frequencies, at any guest TSC of the current stretch.
///
/// All arithmetic saturates at [`u64::MAX`] ns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReferenceClock {
    /// Whole nanoseconds of VM time at `tsc`.
    ns: u64,
    /// What is left below one nanosecond.
    part: Part,
    /// Where the current stretch began.
    tsc: GuestTsc,
    /// The current stretch's frequency.
    khz: Khz,
}

/// A saved [`ReferenceClock`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct ReferenceClockState {
    /// Whole nanoseconds of VM time at `tsc`.
    ns: u64,
    /// What is left below one nanosecond.
    part: Part,
    /// Where the stretch began.
    tsc: GuestTsc,
    /// The stretch's frequency.
    khz: Khz,
}

impl ReferenceClockState {
    /// The TSC at which the stretch began that was the current one.
    #[must_use]
    pub const fn begins(&self) -> GuestTsc {
        self.tsc
    }
}

impl ReferenceClock {
    /// The state to save.
    #[must_use]
    pub const fn state(&self) -> ReferenceClockState {
        let Self { ns, part, tsc, khz } = *self;
        ReferenceClockState { ns, part, tsc, khz }
    }

    /// The clock as it was saved.
    #[must_use]
    pub const fn from_state(state: ReferenceClockState) -> Self {
        let ReferenceClockState { ns, part, tsc, khz } = state;
        Self { ns, part, tsc, khz }
    }

    /// A judge that says `at` when the guest's TSC is `tsc`, which from there on runs at `khz`.
    #[must_use]
    pub fn start(at: VmTime, tsc: GuestTsc, khz: Khz) -> Self {
        Self { ns: at.0, part: Part { num: 0, den: 1 }, tsc, khz }
    }

    /// The TSC at which the current stretch began.
    #[must_use]
    pub fn begins(&self) -> GuestTsc {
        self.tsc
    }

    /// VM time at `tsc`, rounded down; a `tsc` before the current stretch gives the stretch's beginning.
    #[must_use]
    pub fn at(&self, tsc: GuestTsc) -> VmTime {
        VmTime(self.sum(tsc).0)
    }

    /// A migration: the guest was saved at `tsc_saved`, VM time then advanced by `downtime_ns` (0 under freeze), and
    /// the guest went on at `tsc_restored` with a TSC of `khz`.
    pub fn rebase(&mut self, tsc_saved: GuestTsc, downtime_ns: u64, tsc_restored: GuestTsc, khz: Khz) {
        let (ns, part) = self.sum(tsc_saved);
        *self = Self { ns: ns.saturating_add(downtime_ns), part, tsc: tsc_restored, khz };
    }

    /// VM time at `tsc`, in whole nanoseconds and what is left.
    ///
    /// `ns + num / den + ticks · 10⁶ / khz`
    fn sum(&self, tsc: GuestTsc) -> (u64, Part) {
        let khz = u128::from(self.khz.get());
        let ticks = u128::from(tsc.0.saturating_sub(self.tsc.0));
        let (whole, rest) = (ticks * NS_KHZ_PER_TICK / khz, ticks * NS_KHZ_PER_TICK % khz); // below 2⁸⁴
        // num / den + rest / khz = (num · khz + rest · den) / (den · khz): below 2⁶⁴ · 2²⁷ each, and less than 2.
        let den = u128::from(self.part.den) * khz;
        let num = u128::from(self.part.num) * khz + rest * u128::from(self.part.den);
        let ns = u128::from(self.ns) + whole + num / den;
        (crate::saturate(ns), Part::of(num % den, den))
    }
}

/// A fraction below 1, in lowest terms.
///
/// Its denominator divides the least common multiple of the frequencies so far, in kHz. While that fits 64 bits, as it
/// does for any set of frequencies in practice, the fraction is exact. Past that it is rounded down to
/// 2⁻³⁶ ns, so that even a million migrations between arbitrary frequencies are off by less than 2⁻¹⁶ ns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(try_from = "RawPart", into = "RawPart"))]
struct Part {
    num: u64,
    den: u64,
}

impl Part {
    /// `num / den` for `num < den < 2⁹¹`.
    fn of(num: u128, den: u128) -> Self {
        const GRID_BITS: u32 = 36;
        let divisor = gcd(num, den);
        match (u64::try_from(num / divisor), u64::try_from(den / divisor)) {
            (Ok(num), Ok(den)) => Self { num, den },
            // num · 2³⁶ < 2¹²⁷, and the quotient is below 2³⁶.
            _ => Self { num: crate::saturate((num << GRID_BITS) / den), den: 1 << GRID_BITS },
        }
    }
}

/// Greatest common divisor of `a` and a `b` that is not 0, so not 0 itself.
fn gcd(mut a: u128, mut b: u128) -> u128 {
    while a != 0 {
        (a, b) = (b % a, a);
    }
    b
}

/// [`Part`] as a file has it, before anything is known about it.
#[derive(Clone, Copy)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
struct RawPart {
    num: u64,
    den: u64,
}

/// A fraction of a nanosecond that is not below 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{num}/{den} is not a fraction of a nanosecond")]
struct BadPart {
    num: u64,
    den: u64,
}

impl TryFrom<RawPart> for Part {
    type Error = BadPart;

    fn try_from(raw: RawPart) -> Result<Self, BadPart> {
        let RawPart { num, den } = raw;
        if num < den { Ok(Self { num, den }) } else { Err(BadPart { num, den }) }
    }
}

impl From<Part> for RawPart {
    fn from(part: Part) -> Self {
        let Part { num, den } = part;
        Self { num, den }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn khz(n: u32) -> Khz {
        Khz::new(u64::from(n)).unwrap()
    }

    #[test]
    fn three_thirds_make_one() {
        let mut judge = ReferenceClock::start(VmTime(0), GuestTsc(0), khz(3_000_000));
        for _ in 0..3 {
            judge.rebase(GuestTsc(1), 0, GuestTsc(0), khz(3_000_000)); // a third of a nanosecond
        }
        assert_eq!(judge, ReferenceClock::start(VmTime(1), GuestTsc(0), khz(3_000_000)));
    }

    #[test]
    fn a_stretch_begins_where_the_guest_goes_on() {
        let mut clock = ReferenceClock::start(VmTime(10), GuestTsc(100), khz(3_000_000));
        assert_eq!(clock.begins(), GuestTsc(100));
        clock.rebase(GuestTsc(400), 0, GuestTsc(70), khz(3_000_000));
        assert_eq!((clock.begins(), clock.at(GuestTsc(70))), (GuestTsc(70), VmTime(110)));
    }

    /// A whole nanosecond is no fraction of one: there is one way to write each instant. Nothing is divided by 0.
    #[test]
    fn a_part_is_less_than_one() {
        assert_eq!(Part::try_from(RawPart { num: 2, den: 3 }), Ok(Part { num: 2, den: 3 }));
        for (num, den) in [(3, 3), (4, 3), (0, 0)] {
            assert_eq!(Part::try_from(RawPart { num, den }), Err(BadPart { num, den }));
        }
    }

    #[test]
    fn arbitrary_frequencies_round_below_a_billionth() {
        // Neighbouring primes: the common denominator outgrows 64 bits at the third.
        let primes = [2_600_011, 2_600_021, 2_600_033, 2_600_047, 2_600_081, 2_600_083];
        let mut judge = ReferenceClock::start(VmTime(0), GuestTsc(0), khz(primes[0]));
        // A second at each frequency, in two parts of no whole nanosecond: six fractions are open at once.
        let first = |f: u32| u64::from(f) / 3;
        let second = |f: u32| u64::from(f) * 1000 - first(f);
        for _ in 0..10_000 {
            for part in [&first as &dyn Fn(u32) -> u64, &second] {
                for (i, f) in primes.into_iter().enumerate() {
                    judge.rebase(GuestTsc(part(f)), 0, GuestTsc(0), khz(primes[(i + 1) % 6]));
                }
            }
        }
        // 120,000 times rounded down by less than 2⁻³⁶ ns: less than a nanosecond short.
        assert!((59_999_999_999_999..=60_000_000_000_000).contains(&judge.at(GuestTsc(0)).0));
    }

    #[test]
    fn ends_saturate_and_the_past_is_clamped() {
        let judge = ReferenceClock::start(VmTime(10), GuestTsc(100), Khz::MIN);
        assert_eq!(judge.at(GuestTsc(5)), VmTime(10));
        assert_eq!(judge.at(GuestTsc(u64::MAX)), VmTime(u64::MAX));
    }

    #[cfg(feature = "serde")]
    #[test]
    fn survives_a_file_and_refuses_a_bad_one() {
        let mut judge = ReferenceClock::start(VmTime(10), GuestTsc(100), khz(3_000_000));
        judge.rebase(GuestTsc(101), 7, GuestTsc(5), khz(2_600_000));
        let text = serde_json::to_string(&judge.state()).unwrap();
        assert_eq!(ReferenceClock::from_state(serde_json::from_str(&text).unwrap()), judge);
        assert!(text.contains(r#""den":3"#));
        serde_json::from_str::<ReferenceClockState>(&text.replace(r#""den":3"#, r#""den":0"#)).unwrap_err();
    }

    /// The frequencies of the model below, and their least common multiple in kHz, found by hand: over it every stretch
    /// is a whole number.
    const KHZ: [u32; 6] = [1_300_000, 2_600_000, 3_900_000, 2_099_998, 700_001, 3_000_000];
    // 2,099,998 = 2 · 1,049,999 and 700,001 need not be prime: any common multiple will do.
    const COMMON: u128 = 39_000_000 * 1_049_999 * 700_001;

    proptest! {
        #[test]
        fn no_error_accumulates(moves in prop::collection::vec((0_u64..1 << 40, 0_u64..1 << 30, 0_usize..6), 1000)) {
            let mut judge = ReferenceClock::start(VmTime(5), GuestTsc(9), khz(KHZ[0]));
            let (mut model, mut tsc, mut f) = (5 * COMMON, 9, KHZ[0]); // model: ns · COMMON
            for (ticks, downtime, next) in moves {
                model += u128::from(ticks) * 1_000_000 * (COMMON / u128::from(f)) + u128::from(downtime) * COMMON;
                judge.rebase(GuestTsc(tsc + ticks), downtime, GuestTsc(ticks / 3), khz(KHZ[next]));
                (tsc, f) = (ticks / 3, KHZ[next]);
                prop_assert_eq!(u128::from(judge.at(GuestTsc(tsc)).0), model / COMMON);
                prop_assert_eq!(u128::from(judge.part.num) * COMMON, model % COMMON * u128::from(judge.part.den));
            }
        }
    }
}
