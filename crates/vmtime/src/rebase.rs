//! Gives a page another base without losing what is below a nanosecond.
//!
//! # With the same multiplier and shift
//!
//! - [`moved`]: both sides of the base advance by whole ticks and whole nanoseconds. The guest then reads the same
//!   function of its TSC.
//! - [`renewed`]: the base advances by whole periods of `2^(32 − shift)` ticks. A period is exactly `mul` nanoseconds,
//!   because `2^(32 − shift) · mul · 2^(shift − 32) = mul`. So no reading changes, not even by its rounding.
//!
//! # With others
//!
//! [`through`]: the line of the new page is to pass through a VM time with a fraction, but a base has whole nanoseconds
//! and whole ticks. A base that lies `k` ticks back adds the fraction of `k · mul · 2^(shift − 32)` to it. Of
//! [`LOOK_BACK`] such bases the one whose line passes nearest is taken. What is left is the [`Remainder`]: VM time
//! itself continues exactly, and the next page starts from it. So errors do not add up: after any number of
//! restores the last page is off by its own remainder, and by nothing else.
//!
//! The remainder is below 1 ns, always:
//!
//! - The nearest whole nanosecond at `k = 0` is off by at most 1/2.
//! - But the guest's clock must not go back, so the new page has to read at least what the old one read last. Let `e`
//!   be the old remainder. The old reading is at most the old line, which is VM time minus `e`. If it is above VM time,
//!   then by at most `−e`; a page that reads exactly that has the remainder `e` or nearer to 0.
//! - Otherwise the next whole nanosecond above VM time serves, which is off by less than 1.
//!
//! How small it is depends on the multiplier, because the bases add only certain fractions. At 1 GHz a tick is one
//! nanosecond: no base adds a fraction, and the remainder is up to 1/2. At 2.1 GHz two ticks are 20/21 ns: there are 21
//! fractions, and it is up to 1/42. At a frequency that is not near a round one 256 bases have as many, and it is some
//! thousandths.

use crate::{ExactTime, GuestTsc, PageClock, Remainder, Scale, VmTime};

/// How many bases [`through`] compares. They are 0 to 255 steps back. A step is one tick. With a right shift by k it is
/// 2ᵏ ticks, so that the guest's shift drops no bits at the TSC where it continues.
pub const LOOK_BACK: u64 = 256;

/// `page` for a guest whose TSC was `from` and continues as `to`, `downtime_ns` later; none if no such base exists,
/// because the new TSC is too low.
#[must_use]
pub fn moved(page: &PageClock, from: GuestTsc, to: GuestTsc, downtime_ns: u64) -> Option<PageClock> {
    let at = |page: &PageClock| {
        let since_base = from.0.checked_sub(page.tsc_timestamp.0)?;
        Some(PageClock {
            tsc_timestamp: GuestTsc(to.0.checked_sub(since_base)?),
            system_time: VmTime(page.system_time.0.checked_add(downtime_ns)?),
            ..*page
        })
    };
    at(page).or_else(|| at(&renewed(page, from)))
}

/// The same clock with a later base, the last one before or at `now` from which no reading differs.
#[must_use]
pub fn renewed(page: &PageClock, now: GuestTsc) -> PageClock {
    let ticks = now.0.saturating_sub(page.tsc_timestamp.0);
    // 2^(32 − shift) is 2 to 2⁶³: the shift is within ±31.
    let period =
        1_u64.checked_shl(u32::from(32_i8.saturating_sub(page.scale.shift()).unsigned_abs())).unwrap_or(u64::MAX);
    let periods = ticks / period;
    // At the end of 64 bits both pages read the last nanosecond.
    PageClock {
        tsc_timestamp: GuestTsc(page.tsc_timestamp.0.saturating_add(periods.saturating_mul(period))),
        system_time: VmTime(page.system_time.0.saturating_add(periods.saturating_mul(u64::from(page.scale.mul())))),
        ..*page
    }
}

/// A page with `scale` whose line passes nearest to `at` when the guest's TSC is `tsc`, and which then reads `least` or
/// later; and how far VM time is ahead of it.
#[must_use]
pub fn through(at: ExactTime, tsc: GuestTsc, least: VmTime, scale: Scale) -> (PageClock, Remainder) {
    let step = 1_u64 << scale.shift().min(0).unsigned_abs();
    let base = |back: u64, system_time: VmTime| PageClock {
        tsc_timestamp: GuestTsc(tsc.0.saturating_sub(back)),
        system_time,
        scale,
    };
    let here = base(0, at.floor().max(least));
    let mut best = (at.distance(here.exact(tsc)), here);
    for back in (0..LOOK_BACK).map(|steps| steps.saturating_mul(step)).take_while(|back| *back <= tsc.0) {
        let Some(wanted) = at.checked_sub(here.span(back)) else { break };
        let below = wanted.floor();
        for system_time in [below, VmTime(below.0.saturating_add(1))] {
            let page = base(back, system_time);
            let off = at.distance(page.exact(tsc));
            if off < best.0 && page.vm_time(tsc) >= least {
                best = (off, page);
            }
        }
        if best.0 == 0 {
            break;
        }
    }
    let (_, page) = best;
    (page, at.since_line(page.exact(tsc)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::Khz;

    fn scale(khz: u64) -> Scale {
        Scale::from_khz(Khz::new(khz).unwrap())
    }

    fn page(tsc: u64, vm: u64, khz: u64) -> PageClock {
        PageClock { tsc_timestamp: GuestTsc(tsc), system_time: VmTime(vm), scale: scale(khz) }
    }

    // The figures of this module's documentation.
    #[test]
    fn remainders_are_small_where_fractions_are_spread() {
        let (halves, of_13, of_21, of_256) = (0.25, 1.0 / 26.0, 1.0 / 42.0, 0.01);
        for (khz, most) in
            [(1_000_000, 0.5), (2_000_000, halves), (2_100_000, of_21), (2_600_000, of_13), (2_718_281, of_256)]
        {
            let worst = (0..1000_u64)
                .map(|n| {
                    let at = page(0, 1_000_000, 3_900_000).exact(GuestTsc(n * 7919));
                    through(at, GuestTsc(1 << 40), VmTime(0), scale(khz)).1.as_ns().abs()
                })
                .fold(0.0, f64::max);
            assert!(worst <= most + 1e-4, "{khz}: {worst}");
        }
    }

    #[test]
    fn the_first_page_has_no_look_back() {
        let (page, rest) = through(ExactTime::of(VmTime(0)), GuestTsc(77), VmTime(0), scale(2_100_000));
        assert_eq!((page.tsc_timestamp, page.system_time, rest), (GuestTsc(77), VmTime(0), Remainder::ZERO));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2048))]

        // Catches: a renewal after which the guest's clock steps or rounds differently.
        #[test]
        fn a_renewed_page_reads_the_same(
            base in 0..1_u64 << 60, vm in 0..1_u64 << 60, khz in 10_000..100_000_001_u64, age in 0..1_u64 << 50,
            later in 0..1_u64 << 40,
        ) {
            let old = page(base, vm, khz);
            let now = GuestTsc(base + age);
            let new = renewed(&old, now);
            prop_assert!(new.tsc_timestamp >= old.tsc_timestamp && new.tsc_timestamp <= now);
            prop_assert!(old.vm_time(now).0 - new.system_time.0 <= u64::from(new.scale.mul()));
            for tsc in [now, GuestTsc(now.0 + later), GuestTsc(now.0 + later + 1)] {
                prop_assert_eq!(old.vm_time(tsc), new.vm_time(tsc));
                prop_assert_eq!(old.exact(tsc), new.exact(tsc));
            }
        }

        // Catches: a fraction that is lost, a remainder of 1 ns or more, and a clock that goes back.
        #[test]
        fn a_page_passes_within_a_nanosecond_and_never_goes_back(
            from in 10_000..100_000_001_u64, to in 10_000..100_000_001_u64, vm in 0..1_u64 << 60, age in 0..1_u64 << 50,
            tsc in any::<u64>(),
        ) {
            let old = page(5, vm, from);
            let saved = GuestTsc(5 + age);
            let at = old.exact(saved);
            let (new, rest) = through(at, GuestTsc(tsc), old.vm_time(saved), scale(to));
            prop_assert!(new.tsc_timestamp.0 <= tsc && tsc - new.tsc_timestamp.0 < LOOK_BACK << 6);
            prop_assert!(new.vm_time(GuestTsc(tsc)) >= old.vm_time(saved));
            prop_assert_eq!(new.exact(GuestTsc(tsc)).ahead_by(rest), at);
            prop_assert!(rest.as_ns().abs() < 1.0);
        }
    }
}
