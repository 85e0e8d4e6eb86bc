//! When a machine was paused: the instant by its clocks, and how long ago that was.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use vmtime::{GuestTsc, Khz, Moment, Stood};

use crate::host::clock::wall_ns;

/// An instant in this process, by CLOCK_BOOTTIME: a clock that counts while the host sleeps, and that cannot be set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BootTime(Duration);

impl BootTime {
    /// Now.
    pub(crate) fn now() -> Self {
        // It cannot fail: Linux has the clock since 2.6.39.
        Self(clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from))
    }

    /// The instant 0 of the clock, for tests.
    #[cfg(test)]
    pub(crate) fn start() -> Self {
        Self(Duration::ZERO)
    }

    /// How long ago it was.
    pub(crate) fn elapsed(self) -> Duration {
        Self::now().since(self)
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

/// The stop of a paused machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Paused {
    /// The instant of the stop, by its clocks.
    pub moment: Moment,
    /// The TSC frequency with which it continues.
    pub khz: Khz,
    /// The same instant by CLOCK_BOOTTIME; none if the stop was in another process, with which only the wall clock is
    /// shared.
    at: Option<BootTime>,
}

impl Paused {
    /// A machine of this process, stopped at `at`.
    pub(crate) fn here(moment: Moment, at: BootTime) -> Self {
        Self { moment, khz: moment.khz, at: Some(at) }
    }

    /// A machine from a snapshot.
    pub(crate) fn saved(moment: Moment) -> Self {
        Self { moment, khz: moment.khz, at: None }
    }

    /// The same stop, after which the machine continues with the TSC frequency `khz`.
    pub(crate) fn with_khz(self, khz: Khz) -> Self {
        Self { khz, ..self }
    }

    /// How long it has been stopped.
    pub(crate) fn stood(&self) -> Stood {
        self.at.map_or_else(|| Stood::UntilWall(wall_ns()), |at| Stood::For(at.elapsed()))
    }

    /// The TSC at the stop, and how long ago that was.
    pub(crate) fn stopped_tsc(&self) -> StoppedTsc {
        let ago = match self.stood() {
            Stood::For(length) => length,
            Stood::UntilWall(now) => Duration::from_nanos(now.saturating_sub(self.moment.wall_ns)),
        };
        StoppedTsc { tsc: self.moment.tsc, ago }
    }
}

/// A guest's TSC that is to be continued.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoppedTsc {
    /// Its value.
    pub tsc: GuestTsc,
    /// How long ago it had that value.
    pub ago: Duration,
}
