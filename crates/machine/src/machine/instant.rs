//! Instants in this process, by clocks that nobody can set.

use std::time::Duration;

use vmtime::HostTsc;

use crate::host::{
    clock::HostClock,
    os_clocks::{OsClocks, WallReading},
    reading::{Reading, nanos},
};

/// An instant by CLOCK_BOOTTIME: a clock that counts while the host sleeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BootTime(Duration);

impl BootTime {
    /// The instant 0 of the clock, for tests.
    #[cfg(test)]
    pub(crate) fn start() -> Self {
        Self(Duration::ZERO)
    }

    /// How long after `earlier` it is.
    pub(crate) fn since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }

    /// The instant `length` after this one.
    pub(crate) fn after(self, length: Duration) -> Self {
        Self(self.0.saturating_add(length))
    }

    /// The instant `length` before this one.
    pub(crate) fn before(self, length: Duration) -> Self {
        Self(self.0.saturating_sub(length))
    }
}

/// An instant by the host's TSC and by CLOCK_BOOTTIME.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HostInstant {
    /// The host's TSC.
    pub tsc: HostTsc,
    /// CLOCK_BOOTTIME.
    pub boot: BootTime,
    /// How long the host had slept since it was booted.
    pub slept: Duration,
    /// By how many nanoseconds `boot` may be wrong for `tsc`; none if that is unknown.
    pub error_ns: Option<u64>,
}

impl HostInstant {
    /// Now.
    pub(crate) fn now(host: HostClock) -> Self {
        let OsClocks { boot_ns, monotonic_ns, .. } = host.os_clocks();
        let monotonic = Reading::of(host, monotonic_ns);
        let Reading { tsc, ns, error_ns } = Reading::of(host, boot_ns);
        let boot = BootTime(Duration::from_nanos(ns));
        let awake = Duration::from_nanos(monotonic.ns).saturating_add(host.duration(monotonic.tsc, tsc));
        Self { tsc, boot, slept: boot.0.saturating_sub(awake), error_ns }
    }

    /// The instant of the same clocks at which the host's TSC was or will be `tsc`; the host does not sleep in between.
    pub(crate) fn moved_to(self, host: HostClock, tsc: HostTsc) -> Self {
        let boot = if tsc >= self.tsc {
            self.boot.after(host.duration(self.tsc, tsc))
        } else {
            self.boot.before(host.duration(tsc, self.tsc))
        };
        Self { tsc, boot, ..self }
    }
}

/// How long something lasted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lasted {
    pub length: Duration,
    /// The host's TSC measured it, not CLOCK_BOOTTIME.
    pub by_tsc: bool,
    /// By how many nanoseconds `length` may be wrong by that clock; none if that is unknown.
    pub error_ns: Option<u64>,
}

/// Beyond its error bound CLOCK_BOOTTIME may differ from the TSC by one part in this. NTP slews it by up to 500 ppm,
/// and KVM's value of the TSC's frequency may be as wrong.
const SLEW_PART: u32 = 1000;
/// How far `slept` may differ between two instants, because it is computed from two readings. No host sleeps for less.
const NO_SLEEP: Duration = Duration::from_millis(1);

/// How long it was from `from` to `to`.
///
/// VM time follows the host's TSC while the VM runs. Measured by the TSC, a stop therefore adds to VM time exactly what
/// the VM would have counted if it had run. CLOCK_BOOTTIME differs from that by what NTP slews it. It is used if the
/// TSC did not count all the time: the host slept, or its TSC was reset.
pub(crate) fn between(host: HostClock, from: HostInstant, to: HostInstant) -> Lasted {
    let boot = to.boot.since(from.boot);
    let error_ns = from.error_ns.zip(to.error_ns).map(|(from, to)| from.saturating_add(to));
    let counted = host.duration(from.tsc, to.tsc);
    let slack = NO_SLEEP.saturating_add(boot / SLEW_PART);
    if from.slept.abs_diff(to.slept) < NO_SLEEP && to.tsc >= from.tsc && counted.abs_diff(boot) <= slack {
        return Lasted { length: host.vm_time_between(from.tsc, to.tsc), by_tsc: true, error_ns: Some(1) };
    }
    Lasted { length: boot, by_tsc: false, error_ns }
}

/// The wall clock at an instant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Wall {
    /// CLOCK_REALTIME, in nanoseconds since the Unix epoch.
    pub ns: u64,
    /// TAI − UTC in seconds; none if the kernel was not told.
    pub tai_offset_s: Option<i32>,
    /// By how many nanoseconds `ns` may be wrong; none if that is unknown.
    pub error_ns: Option<u64>,
}

/// The wall clock at the instant `at`, which was a short while ago.
pub(crate) fn wall_at(host: HostClock, at: HostInstant) -> Wall {
    let WallReading { real, tai_offset_s } = WallReading::now(host);
    let ago = between(host, at, HostInstant::now(host).moved_to(host, real.tsc));
    let error_ns = real.error_ns.zip(ago.error_ns).map(|(reading, ago)| reading.saturating_add(ago));
    Wall { ns: real.ns.saturating_sub(nanos(ago.length)), tai_offset_s, error_ns }
}

#[cfg(test)]
mod tests {
    use vmtime::Khz;

    use super::*;

    /// 1 GHz: a tick is a nanosecond.
    fn host() -> HostClock {
        HostClock::new(|| 0, Khz::new(1_000_000).unwrap())
    }

    fn at(tsc_ns: u64, boot_ns: u64, slept_ns: u64) -> HostInstant {
        let [boot, slept] = [boot_ns, slept_ns].map(Duration::from_nanos);
        HostInstant { tsc: HostTsc(tsc_ns), boot: BootTime(boot), slept, error_ns: Some(40) }
    }

    const HOUR: u64 = 3_600_000_000_000;

    // Catches: a downtime that follows NTP's slew, by which VM time would step against what it counts while it runs.
    #[test]
    fn the_tsc_measures_while_it_counts() {
        // Slewed by 500 ppm.
        let lasted = between(host(), at(1000, 50, 0), at(1000 + HOUR, 50 + HOUR + HOUR / 2000, 0));
        assert_eq!(lasted, Lasted { length: Duration::from_nanos(HOUR), by_tsc: true, error_ns: Some(1) });
    }

    // Catches: a sleep of the host that is not counted, also one that is short beside the stop, and a TSC that was
    // reset.
    #[test]
    fn the_clock_measures_where_the_tsc_stood_still_or_began_anew() {
        let slept = 2_000_000_000;
        for (from, to) in [
            (at(1000, 50, 7), at(1000 + HOUR, 50 + HOUR + slept, 7 + slept)),
            (at(2 * HOUR, 50, 7), at(5, 50 + HOUR + slept, 7)),
            (at(1000, 50, 7), at(1000 + HOUR / 2, 50 + HOUR + slept, 7)),
        ] {
            let expected = Duration::from_nanos(HOUR + slept);
            assert_eq!(between(host(), from, to), Lasted { length: expected, by_tsc: false, error_ns: Some(80) });
        }
    }

    #[test]
    fn the_wall_clock_is_taken_back_to_the_instant() {
        fn second(n: u64) -> u64 {
            n * 1_000_000_000
        }
        let os = OsClocks {
            boot_ns: || second(100),
            monotonic_ns: || second(90),
            raw_ns: || second(90),
            real_ns: || second(5000),
            tai_offset_s: || 37,
            sync_error_ns: || None,
        };
        let host = HostClock::new(|| second(70), Khz::new(1_000_000).unwrap()).with_os_clocks(os);
        let now = HostInstant::now(host);
        assert_eq!((now.tsc.0, now.boot.0, now.slept), (second(70), Duration::from_secs(100), Duration::from_secs(10)));
        let wall = wall_at(host, now.moved_to(host, HostTsc(second(67))));
        assert_eq!(wall, Wall { ns: second(4997), tai_offset_s: Some(37), error_ns: Some(2) });
        // It slept for 6 of the last 8 seconds.
        let earlier = HostInstant {
            tsc: HostTsc(second(68)),
            boot: now.boot.before(Duration::from_secs(8)),
            slept: Duration::from_secs(4),
            ..now
        };
        assert_eq!(wall_at(host, earlier).ns, second(4992));
    }
}
