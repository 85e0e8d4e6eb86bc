//! How long a machine stood still, by which clock, and how well that is known.

use std::time::Duration;

use serde::Serialize;
use vmtime::{HostTsc, Moment, Stood};

use super::instant::{HostInstant, Lasted, between};
use crate::host::{clock::HostClock, os_clocks::WallReading};

/// The clock that measured a downtime.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum DowntimeClock {
    /// The host's TSC: the stop was in this process, and the host did not sleep.
    Tsc,
    /// CLOCK_BOOTTIME: the stop was in this process, and the host slept or its TSC was reset.
    Boottime,
    /// CLOCK_TAI: the stop was in another process, perhaps on another host.
    Tai,
    /// CLOCK_REALTIME: as CLOCK_TAI, where a kernel was not told TAI − UTC.
    Realtime,
}

impl DowntimeClock {
    /// Its name, for messages.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Tsc => "the host's TSC",
            Self::Boottime => "CLOCK_BOOTTIME",
            Self::Tai => "CLOCK_TAI",
            Self::Realtime => "CLOCK_REALTIME",
        }
    }
}

/// How a downtime was measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Measured {
    /// The clock.
    #[serde(rename = "downtime_clock")]
    pub clock: DowntimeClock,
    /// By how many nanoseconds VM time may be wrong by that clock; none if it is unknown, because an older build saved
    /// the machine. Between two hosts the difference of their wall clocks comes to it.
    #[serde(rename = "downtime_error_ns")]
    pub error_ns: Option<u64>,
}

/// The downtimes that were measured in this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Downtimes {
    /// How many.
    pub measured: u64,
    /// The sum of their error bounds, in nanoseconds; none if one of them is unknown.
    pub error_ns: Option<u64>,
}

impl Downtimes {
    /// None so far.
    pub(crate) const NONE: Self = Self { measured: 0, error_ns: Some(0) };

    /// With one more.
    pub(crate) fn and(self, new: Measured) -> Self {
        let error_ns = self.error_ns.zip(new.error_ns).map(|(sum, new)| sum.saturating_add(new));
        Self { measured: self.measured.saturating_add(1), error_ns }
    }
}

/// A stop's length.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Downtime {
    pub stood: Stood,
    /// It lasted until the host's TSC was this.
    pub until: HostTsc,
    /// None if it was not measured: it was given, or counts as zero.
    pub measured: Option<Measured>,
}

impl Downtime {
    /// One whose length is given, until now.
    pub(crate) fn given(length: Duration, host: HostClock) -> Self {
        Self { stood: Stood::For(length), until: host.tsc(), measured: None }
    }

    /// From a stop in this process, `at`, until `now`.
    pub(crate) fn since(host: HostClock, at: HostInstant, now: HostInstant) -> Self {
        let Lasted { length, by_tsc, error_ns } = between(host, at, now);
        let clock = if by_tsc { DowntimeClock::Tsc } else { DowntimeClock::Boottime };
        Self { stood: Stood::For(length), until: now.tsc, measured: Some(Measured { clock, error_ns }) }
    }

    /// From a save in another process until `now`.
    pub(crate) fn since_save(saved: &Moment, now: WallReading) -> Self {
        let WallReading { real, tai_offset_s } = now;
        // The wall clock as it would be now if TAI − UTC were what it was at the save. Saved and restored are then on
        // one scale, and their difference is that of CLOCK_TAI: a leap second in between does not count.
        let (until_wall, clock) = match saved.tai_offset_s.zip(tai_offset_s) {
            Some((then, now)) => {
                let leapt = i64::from(now).saturating_sub(i64::from(then)).saturating_mul(1_000_000_000);
                (real.ns.saturating_add_signed(leapt), DowntimeClock::Tai)
            }
            None => (real.ns, DowntimeClock::Realtime),
        };
        let error_ns = saved.wall_error_ns.zip(real.error_ns).map(|(saved, now)| saved.saturating_add(now));
        let measured = Some(Measured { clock, error_ns });
        Self { stood: Stood::UntilWall(until_wall), until: real.tsc, measured }
    }
}

/// Logs how the downtime `downtime_ns` since `saved` was measured.
pub(crate) fn log(saved: &Moment, downtime_ns: u64, measured: Measured) {
    let Measured { clock, error_ns } = measured;
    let length = Duration::from_nanos(downtime_ns);
    let error = error_ns.map_or_else(|| "an unknown error".to_owned(), |ns| format!("±{ns} ns"));
    log::info!("catch-up: VM time advanced by {length:?}, {error} by {}", clock.as_str());
    if clock == DowntimeClock::Realtime && saved.tai_offset_s.is_some() {
        log::warn!(
            "the downtime is measured by CLOCK_REALTIME: the VM was saved on a host that knows TAI, and this host's \
             kernel was not told TAI − UTC (by an NTP daemon with a leap second file). A leap second since the save \
             counts as downtime"
        );
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vmtime::{DowntimePolicy, GuestTsc, Khz, PageClock, Scale, VmTime, adjust};

    use super::*;
    use crate::host::reading::Reading;

    const SECOND: u64 = 1_000_000_000;
    const SAVED_WALL_NS: u64 = 1_800_000_000 * SECOND;

    fn saved(tai_offset_s: Option<i32>, wall_error_ns: Option<u64>) -> Moment {
        let khz = Khz::new(1_000_000).unwrap();
        let page = PageClock { tsc_timestamp: GuestTsc(0), system_time: VmTime(0), scale: Scale::from_khz(khz) };
        Moment { tai_offset_s, wall_error_ns, ..Moment::new(page, GuestTsc(5), khz, SAVED_WALL_NS) }
    }

    fn wall(ns: u64, tai_offset_s: Option<i32>) -> WallReading {
        WallReading { real: Reading { tsc: HostTsc(77), ns, error_ns: Some(20) }, tai_offset_s }
    }

    /// By how much catch-up advances VM time, the clock, and the error bound.
    fn caught_up(saved: &Moment, now: WallReading) -> (u64, bool, Measured) {
        let downtime = Downtime::since_save(saved, now);
        assert_eq!(downtime.until, now.real.tsc);
        let adjusted = adjust::restore(saved, saved.khz, DowntimePolicy::CatchUp, downtime.stood, None).unwrap();
        (adjusted.downtime_ns, adjusted.clamped, downtime.measured.unwrap())
    }

    fn measured(clock: DowntimeClock, error_ns: Option<u64>) -> Measured {
        Measured { clock, error_ns }
    }

    // Catches: a leap second between save and restore that moves VM time, either way, or that makes a short downtime
    // negative.
    #[test]
    fn a_leap_second_moves_nothing() {
        let saved = saved(Some(37), Some(30));
        let by_tai = measured(DowntimeClock::Tai, Some(50));
        for down_ns in [0, 1, SECOND / 2, 3 * SECOND] {
            let no_leap = wall(SAVED_WALL_NS + down_ns, Some(37));
            // 23:59:59 comes twice, or not at all.
            let inserted = wall(SAVED_WALL_NS + down_ns - SECOND, Some(38));
            let deleted = wall(SAVED_WALL_NS + down_ns + SECOND, Some(36));
            for now in [no_leap, inserted, deleted] {
                assert_eq!(caught_up(&saved, now), (down_ns, false, by_tai), "{now:?}");
            }
        }
    }

    // Catches: an offset of one host added to the wall clock of one that has none: 37 s of downtime that nobody had.
    #[test]
    fn without_tai_on_both_sides_the_wall_clock_counts() {
        let now = SAVED_WALL_NS + 3 * SECOND;
        for (then, here) in [(None, None), (Some(37), None), (None, Some(37))] {
            let expected = (3 * SECOND, false, measured(DowntimeClock::Realtime, Some(50)));
            assert_eq!(caught_up(&saved(then, Some(30)), wall(now, here)), expected);
        }
        let set_back = wall(SAVED_WALL_NS - SECOND, None);
        assert!(caught_up(&saved(None, Some(30)), set_back).1);
    }

    // A snapshot of an older build says nothing about its reading's error.
    #[test]
    fn an_unknown_error_stays_unknown() {
        let (_, _, unknown) = caught_up(&saved(None, None), wall(SAVED_WALL_NS, None));
        assert_eq!(unknown.error_ns, None);
        let one = Downtimes::NONE.and(measured(DowntimeClock::Tsc, Some(3)));
        assert_eq!(one.and(measured(DowntimeClock::Tai, Some(4))), Downtimes { measured: 2, error_ns: Some(7) });
        assert_eq!(one.and(unknown), Downtimes { measured: 2, error_ns: None });
    }

    proptest! {
        // Catches: a panic or a wrapped sum for numbers that only an edited snapshot or a broken host has.
        #[test]
        fn no_number_is_too_large(then in any::<i32>(), here in any::<i32>(), ns in any::<u64>(), error in any::<u64>()) {
            let downtime = Downtime::since_save(&saved(Some(then), Some(error)), wall(ns, Some(here)));
            let Stood::UntilWall(until) = downtime.stood else { panic!("not a wall clock") };
            let exact = i128::from(ns) + (i128::from(here) - i128::from(then)) * i128::from(SECOND);
            prop_assert_eq!(i128::from(until), exact.clamp(0, i128::from(u64::MAX)));
        }
    }
}
