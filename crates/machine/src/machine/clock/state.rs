//! The clock, saved and restored.

use serde::{Deserialize, Serialize};
use vmtime::{Moment, ReferenceClock, ReferenceClockState, Timeline};

use super::{Clock, PAST_REFERENCES};
use crate::{
    host::clock::HostClock,
    machine::config::{TimeMode, source::TscSource},
};

/// The clock as a snapshot holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClockState {
    /// The instant of the save.
    pub moment: Moment,
    /// The reference clock.
    #[serde(rename = "judge")]
    pub reference: ReferenceClockState,
    /// Virtual time: operations so far.
    pub operations: u64,
}

impl Clock {
    /// A stopped clock as it was saved.
    #[must_use]
    pub fn from_state(source: TscSource, mode: TimeMode, host: HostClock, state: &ClockState) -> Self {
        let ClockState { moment, reference, operations } = *state;
        Self {
            source,
            mode,
            host,
            tsc_settable: source == TscSource::Trapped,
            vcpu_offset: 0,
            khz: moment.khz,
            timeline: Timeline::Stopped { tsc: moment.tsc },
            page: moment.page,
            remainder: moment.remainder,
            reference: ReferenceClock::from_state(reference),
            past_references: [None; PAST_REFERENCES],
            operations,
            last_operation: host.tsc(),
        }
    }

    /// The clock for a snapshot, stopped at `moment`.
    #[must_use]
    pub fn state(&self, moment: Moment) -> ClockState {
        // The next host chooses its own clock and source. Timeline, page and remainder are in the moment.
        let Self {
            source: _,
            mode: _,
            host: _,
            tsc_settable: _,
            vcpu_offset: _,
            khz: _,
            timeline: _,
            page: _,
            remainder: _,
            reference,
            past_references: _,
            operations,
            last_operation: _,
        } = self;
        ClockState { moment, reference: reference.state(), operations: *operations }
    }
}
