//! The host's clocks: its TSC, and those of the operating system.

use std::time::Duration;

use vmtime::{HostTsc, Khz, NS_KHZ_PER_TICK};

use super::os_clocks::OsClocks;

/// The host's TSC and its frequency, and the operating system's clocks.
///
/// The counter is read by a function that is passed in, so that a test can pass its own; so are the others.
#[derive(Clone, Copy, Debug)]
pub struct HostClock {
    read_tsc: fn() -> u64,
    /// The frequency that guests see and that VM time is computed with.
    khz: Khz,
    /// The frequency that host timers are set with.
    true_khz: Khz,
    os: OsClocks,
}

impl HostClock {
    /// A clock whose counter `read_tsc` returns and that runs at `khz`.
    #[must_use]
    pub fn new(read_tsc: fn() -> u64, khz: Khz) -> Self {
        Self { read_tsc, khz, true_khz: khz, os: OsClocks::LINUX }
    }

    /// The same with other clocks than the operating system's.
    #[cfg(test)]
    pub(crate) fn with_os_clocks(self, os: OsClocks) -> Self {
        Self { os, ..self }
    }

    /// The functions that read the operating system's clocks.
    #[must_use]
    pub fn os_clocks(&self) -> OsClocks {
        self.os
    }

    /// The same clock, treated as if it ran at `khz`: VM time then runs faster or slower than the host's time, and
    /// nothing else changes. With it a test shows what would differ on a host with another TSC frequency.
    #[must_use]
    pub fn taken_for(self, khz: Khz) -> Self {
        Self { khz, ..self }
    }

    /// The clock without [`Self::taken_for`], for what KVM itself computes with the true frequency.
    #[must_use]
    pub fn as_it_is(self) -> Self {
        Self { khz: self.true_khz, ..self }
    }

    /// Whether [`Self::taken_for`] changed the frequency.
    #[must_use]
    pub fn is_taken_for_another(&self) -> bool {
        self.khz != self.true_khz
    }

    /// The host TSC now.
    #[must_use]
    pub fn tsc(&self) -> HostTsc {
        HostTsc((self.read_tsc)())
    }

    /// The host TSC's frequency.
    #[must_use]
    pub fn khz(&self) -> Khz {
        self.khz
    }

    /// How long the host's TSC takes from `from` to `to`: `⌈(to − from) · 10⁶ / khz⌉` ns, zero if `to` is not later.
    ///
    /// Rounded up, because callers sleep for it: rounded down, a thread would wake before its deadline and sleep again.
    #[must_use]
    pub fn duration(&self, from: HostTsc, to: HostTsc) -> Duration {
        const NS_PER_SEC: u128 = 1_000_000_000;
        let ticks = u128::from(to.0.saturating_sub(from.0));
        // At most 2⁶⁴ · 10⁶ / 10⁴ = 2⁶⁴ · 100 ns, which is below 2⁶⁴ s: neither fallback is taken.
        let ns = (ticks * NS_KHZ_PER_TICK).div_ceil(u128::from(self.true_khz.get()));
        let sec = u64::try_from(ns / NS_PER_SEC).unwrap_or(u64::MAX);
        Duration::new(sec, u32::try_from(ns % NS_PER_SEC).unwrap_or(0))
    }

    /// How far VM time advances while the host's TSC counts from `from` to `to`: `(to − from) · 10⁶ / khz` ns, rounded
    /// to the nearest; zero if `to` is not later. Other than [`Self::duration`] it knows [`Self::taken_for`].
    #[must_use]
    pub fn vm_time_between(&self, from: HostTsc, to: HostTsc) -> Duration {
        let ticks = u128::from(to.0.saturating_sub(from.0));
        let khz = u128::from(self.khz.get());
        Duration::from_nanos(vmtime::saturate((ticks * NS_KHZ_PER_TICK + khz / 2) / khz))
    }

    /// The host's TSC `length` after `from`, rounded down; the greatest value if that overflows.
    #[must_use]
    pub fn after(&self, from: HostTsc, length: Duration) -> HostTsc {
        let ticks = length.as_nanos().saturating_mul(u128::from(self.true_khz.get())) / NS_KHZ_PER_TICK;
        HostTsc(from.0.saturating_add(vmtime::saturate(ticks)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_round_up() {
        let clock = HostClock::new(|| 1234, Khz::new(3_000_000).unwrap());
        assert_eq!((clock.tsc(), clock.khz().get()), (HostTsc(1234), 3_000_000));
        let ns = |from, to| clock.duration(HostTsc(from), HostTsc(to)).as_nanos();
        assert_eq!([ns(0, 1), ns(0, 3), ns(0, 4), ns(5, 5), ns(6, 5)], [1, 1, 2, 0, 0]);
        let after = |from, ns| clock.after(HostTsc(from), Duration::from_nanos(ns)).0;
        assert_eq!([after(7, 0), after(7, 1), after(7, 1_000_000), after(7, u64::MAX)], [7, 10, 3_000_007, u64::MAX]);
        let slow = HostClock::new(|| 0, Khz::MIN);
        assert_eq!(slow.duration(HostTsc(0), HostTsc(u64::MAX)).as_nanos(), u128::from(u64::MAX) * 100);
    }

    #[test]
    fn timers_are_set_with_the_true_frequency() {
        let clock = HostClock::new(|| 0, Khz::new(2_000_000).unwrap()).taken_for(Khz::new(400_000).unwrap());
        assert_eq!((clock.khz().get(), clock.as_it_is().khz().get()), (400_000, 2_000_000));
        assert_eq!([clock, clock.as_it_is()].map(|clock| clock.is_taken_for_another()), [true, false]);
        assert_eq!(clock.duration(HostTsc(0), HostTsc(2)).as_nanos(), 1);
        assert_eq!(clock.after(HostTsc(0), Duration::from_nanos(1)), HostTsc(2));
        let vm_ns = |clock: HostClock, ticks: u64| clock.vm_time_between(HostTsc(7), HostTsc(7 + ticks)).as_nanos();
        assert_eq!([vm_ns(clock, 2), vm_ns(clock.as_it_is(), 2)], [5, 1]);
        let thirds = HostClock::new(|| 0, Khz::new(3_000_000).unwrap());
        assert_eq!([0, 1, 2, 3, 4].map(|ticks| vm_ns(thirds, ticks)), [0, 0, 1, 1, 1]);
    }
}
