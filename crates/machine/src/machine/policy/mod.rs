//! The policies of a resume, and the seam for other VMMs' restores and for faulty ones.

pub mod deadline;
pub mod restorer;

use std::{sync::Arc, time::Duration};

use vmtime::{Adjusted, DeadlinePolicy, DowntimePolicy, Khz, Moment};

use self::restorer::{RestoredCpu, Restorer};
use super::error::RunError;

/// How a paused machine is resumed.
#[derive(Clone, Debug, Default)]
pub struct Policies {
    /// What happens to an armed deadline.
    pub deadline: DeadlinePolicy,
    /// Whether VM time advances by the length of the pause.
    pub downtime: DowntimePolicy,
    /// The length of the pause, instead of the one measured by wall time.
    pub downtime_length: Option<Duration>,
    /// For experiments: the rules of another VMM, or of a faulty one, by which each vCPU with a LAPIC in user space
    /// continues.
    pub restorer: Option<Arc<dyn Restorer>>,
}

/// A resume in progress: the clock was started again, and the vCPUs are to be prepared for it.
#[derive(Clone, Copy)]
pub(crate) struct Restart<'a> {
    pub policies: &'a Policies,
    /// The instant at which it stopped.
    pub moment: &'a Moment,
    /// The instant at which it continues.
    pub adjusted: &'a Adjusted,
    /// How each vCPU continues by the rules of another VMM; empty: by this VMM's.
    pub restored: &'a [RestoredCpu],
}

/// A migration may change the frequency by at most this factor, either way.
const MAX_RATIO: u64 = 10;

/// Checks that a migration may change the frequency from `present` to `wanted`.
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
