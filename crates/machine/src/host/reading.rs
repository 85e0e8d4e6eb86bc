//! One instant on two clocks: the host's TSC, and a clock of the operating system.
//!
//! Two clocks cannot be read at once. So the other clock is read between two readings of the TSC: it had its value
//! somewhere between them, and half the distance is the error bound. A thread may lose its CPU in between; of several
//! tries the one with the least distance is kept.

use std::time::Duration;

use vmtime::HostTsc;

use super::clock::HostClock;

/// How often both clocks are read. A reading takes some 50 ns where the vDSO has the clock.
const TRIES: usize = 8;

/// The value of a clock when the host's TSC had the value `tsc`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reading {
    /// The host's TSC.
    pub tsc: HostTsc,
    /// The other clock, in nanoseconds.
    pub ns: u64,
    /// By how many nanoseconds `ns` may differ from that clock's value at `tsc`; none if nothing bounds it.
    pub error_ns: Option<u64>,
}

impl Reading {
    /// Reads `clock`.
    pub fn of(host: HostClock, clock: impl Fn() -> u64) -> Self {
        Self::narrowest(host, || [host.tsc().0, clock(), host.tsc().0])
    }

    /// The best of several tries, each of which reads the TSC, the other clock and the TSC.
    fn narrowest(host: HostClock, mut read: impl FnMut() -> [u64; 3]) -> Self {
        let mut best = read();
        for _ in 1..TRIES {
            let new = read();
            if width(new) < width(best) {
                best = new;
            }
        }
        let [before, ns, after] = best;
        let half = after.saturating_sub(before).div_ceil(2);
        // The clock shows whole nanoseconds.
        let error_ns = width(best).map(|_| nanos(host.duration(HostTsc(0), HostTsc(half))).saturating_add(1));
        Self { tsc: HostTsc(after.saturating_sub(half)), ns, error_ns: error_ns.ok() }
    }
}

/// The distance of the two TSC readings. A TSC that went back is another CPU's, whose distance is unknown: such a try
/// is wider than any other.
fn width([before, _, after]: [u64; 3]) -> Result<u64, NotOneCounter> {
    after.checked_sub(before).ok_or(NotOneCounter)
}

/// Two TSC readings that are not of one counter. As an error it sorts behind every distance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct NotOneCounter;

/// The nanoseconds of a duration; [`u64::MAX`] if they do not fit, after 584 years.
#[must_use]
pub fn nanos(length: Duration) -> u64 {
    u64::try_from(length.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vmtime::Khz;

    use super::*;

    /// 1 GHz: a tick is a nanosecond.
    fn host() -> HostClock {
        HostClock::new(|| 0, Khz::new(1_000_000).unwrap())
    }

    fn best_of(tries: &[[u64; 3]]) -> Reading {
        let mut tries = tries.iter().copied().cycle();
        Reading::narrowest(host(), || tries.next().unwrap())
    }

    #[test]
    fn the_narrowest_try_is_kept_with_its_middle() {
        let reading = best_of(&[[100, 1, 900], [1000, 2, 1010], [2000, 3, 2011]]);
        assert_eq!(reading, Reading { tsc: HostTsc(1005), ns: 2, error_ns: Some(6) });
    }

    // Catches: a TSC that goes back between two readings, taken for a try of no width.
    #[test]
    fn another_cpus_tsc_is_no_narrow_try() {
        let reading = best_of(&[[500, 1, 400], [1000, 2, 1100], [3000, 3, 2999]]);
        assert_eq!(reading, Reading { tsc: HostTsc(1050), ns: 2, error_ns: Some(51) });
        assert_eq!(best_of(&[[500, 7, 400]]), Reading { tsc: HostTsc(400), ns: 7, error_ns: None });
    }

    proptest! {
        // Catches: a bound that is too small (half of a tick, or the clock's own rounding, forgotten), and a pick other
        // than the narrowest. The clock runs at its own rate and is read at any instant between the two.
        #[test]
        fn the_bound_covers_the_error(
            khz in 10_000_u64..10_000_000, offset in 0..1_u64 << 60,
            tries in prop::collection::vec((0..1_u64 << 40, 0..1_u64 << 20, 0..1_u64 << 20), 1..=TRIES),
        ) {
            let host = HostClock::new(|| 0, Khz::new(khz).unwrap());
            // In millionths of a nanosecond, so that nothing is rounded.
            let exact = |tsc: u64| u128::from(tsc) * 1_000_000_000_000 / u128::from(khz);
            let shown = |tsc: u64| offset + u64::try_from(exact(tsc) / 1_000_000).unwrap();
            let tries: Vec<_> = tries.iter().map(|&(at, a, b)| [at, shown(at + a), at + a + b]).collect();
            let mut next = tries.iter().copied().cycle();
            let reading = Reading::narrowest(host, || next.next().unwrap());
            let error = (u128::from(reading.ns - offset) * 1_000_000).abs_diff(exact(reading.tsc.0));
            prop_assert!(error <= u128::from(reading.error_ns.unwrap()) * 1_000_000);
            let least = tries.iter().map(|[before, _, after]| after - before).min().unwrap();
            prop_assert!(reading.error_ns.unwrap() <= nanos(host.duration(HostTsc(0), HostTsc(least.div_ceil(2)))) + 1);
        }
    }
}
