//! Judges any guest over migrations, by what the VMM itself sees: the LAPIC's timer, the kvmclock pages and, for Linux,
//! the console.
//!
//! **What it is.** A guest runs and is migrated again and again ([`check`]). From each migration on its timer's first
//! armings are compared with those of a copy that was not migrated ([`compare`]): both are in the same state, so they
//! want the same interrupts. One that is armed for the same VM time shows a guest that follows the TSC's frequency; one
//! that is as many TSC ticks away shows a guest that uses the old one. The rest is what the VMM knows anyway: what
//! became of deadlines in flight, when interrupts came, what is in the pages. [`judge`] makes verdicts of it.
//!
//! **What it is not.** It reads no record of the guest's, and does not know what the guest wanted, only what it armed.

pub mod compare;
pub mod console;
pub mod judge;
pub mod result;
mod run;

use std::time::Duration;

use machine::{
    BootOptions, Policies, RunError,
    blame::{Blame, Blamed},
};
use vmtime::Khz;

pub use run::check;

/// What to do with the guest.
#[derive(Clone, Debug)]
pub struct Options {
    /// How to boot. The LAPICs are the VMM's.
    pub boot: BootOptions,
    /// How often it is migrated.
    pub migrations: u64,
    /// VM time before the first migration, between two, and after the last.
    pub every: Duration,
    /// The frequencies, in turn; empty: half of that at boot, that, twice that, and that again.
    pub khz_cycle: Vec<Khz>,
    /// How it is resumed.
    pub policies: Policies,
    /// The fault of each resume, as it was written.
    pub inject: Option<String>,
    /// What the console must show before the first migration; by default the guest must have had some timer interrupts.
    pub wait_for: Option<String>,
    /// VM time within which that must have come.
    pub within: Duration,
    /// VM time that the guest has to end, after the last migration. Zero: it need not end.
    pub end_within: Duration,
    /// Something that was to come, by the guest's account or the VMM's, and comes later than this fails a check.
    pub late: Option<Duration>,
    /// The guest is Linux: its console is read, too.
    pub linux: bool,
}

/// Why nothing was judged.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// The machine cannot be built, run or migrated.
    #[error(transparent)]
    Run(#[from] RunError),
    /// The guest did not come to where the migrations begin.
    #[error("{0}")]
    NotReady(String),
    /// It was interrupted.
    #[error("interrupted after {made} of {wanted} migrations")]
    Interrupted {
        /// Migrations that were made.
        made: u64,
        /// Those that were to be.
        wanted: u64,
    },
}

impl Blamed for CheckError {
    fn blame(&self) -> Blame {
        match self {
            Self::Run(error) => error.blame(),
            Self::NotReady(_) | Self::Interrupted { .. } => Blame::Run,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Catches: a guest that does not get ready, reported as a wrong command line or a host that lacks something.
    #[test]
    fn a_guest_that_is_not_ready_is_the_runs() {
        assert_eq!(CheckError::NotReady(String::new()).blame(), Blame::Run);
        assert_eq!(CheckError::Interrupted { made: 1, wanted: 2 }.blame(), Blame::Run);
        assert_eq!(CheckError::from(RunError::Cpus(0)).blame(), Blame::Usage);
    }
}
