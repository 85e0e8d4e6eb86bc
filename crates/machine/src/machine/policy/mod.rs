//! How a machine goes on after it stood still, and what goes wrong with that on purpose.

pub mod deadline;
pub mod fault;

use std::time::Duration;

use vmtime::{Adjusted, DeadlinePolicy, DowntimePolicy, Khz, Moment};

use self::fault::InjectedFault;
use super::error::RunError;

/// How a paused machine goes on.
#[derive(Clone, Copy, Debug, Default)]
pub struct Policies {
    /// The guest's TSC frequency from now on; none = as before.
    pub khz: Option<Khz>,
    /// What becomes of a deadline in flight.
    pub deadline: DeadlinePolicy,
    /// Whether VM time counts the time it stood still.
    pub downtime: DowntimePolicy,
    /// How long that was, instead of measuring it by wall time.
    pub downtime_length: Option<Duration>,
    /// What goes wrong, on purpose.
    pub fault: Option<InjectedFault>,
}

/// A machine that goes on: its clock was started again, its vCPUs are to follow.
#[derive(Clone, Copy)]
pub(crate) struct Restart<'a> {
    pub policies: &'a Policies,
    /// When it stopped.
    pub moment: &'a Moment,
    /// Where it goes on.
    pub adjusted: &'a Adjusted,
}

/// A migration may change the frequency by at most this factor, either way.
const MAX_RATIO: u64 = 10;

/// Whether a migration may go from one frequency to the other.
///
/// # Errors
/// [`RunError::Ratio`].
pub fn check_ratio(present: Khz, wanted: Khz) -> Result<(), RunError> {
    let (p, w) = (u64::from(present.get()), u64::from(wanted.get()));
    if w > p * MAX_RATIO || w * MAX_RATIO < p {
        return Err(RunError::Ratio { wanted, present });
    }
    Ok(())
}
