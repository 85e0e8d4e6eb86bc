//! When a machine was paused: the instant by its clocks and by the host's, and how long ago that was.

use std::time::Duration;

use vmtime::{GuestTsc, Khz, Moment};

use super::{downtime::Downtime, instant::HostInstant};
use crate::host::{clock::HostClock, os_clocks::WallReading};

/// The stop of a paused machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Paused {
    /// The instant of the stop, by its clocks.
    pub moment: Moment,
    /// The TSC frequency with which it continues.
    pub khz: Khz,
    /// The same instant by the host's clocks; none if the stop was in another process, with which only the wall clock
    /// is shared.
    at: Option<HostInstant>,
}

impl Paused {
    /// A machine of this process, stopped at `at`.
    pub(crate) fn here(moment: Moment, at: HostInstant) -> Self {
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

    /// Whether the stop was in this process: if not, others may continue from it, too.
    pub(crate) fn is_here(&self) -> bool {
        self.at.is_some()
    }

    /// How long it has been stopped.
    pub(crate) fn downtime(&self, host: HostClock) -> Downtime {
        match self.at {
            Some(at) => Downtime::since(host, at, HostInstant::now(host)),
            None => Downtime::since_save(&self.moment, WallReading::now(host)),
        }
    }

    /// The TSC at the stop, and how long ago that was.
    pub(crate) fn stopped_tsc(&self, host: HostClock) -> StoppedTsc {
        let ago = match self.at {
            Some(at) => HostInstant::now(host).boot.since(at.boot),
            None => Duration::from_nanos(WallReading::now(host).real.ns.saturating_sub(self.moment.wall_ns)),
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
