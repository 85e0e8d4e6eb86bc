//! What stops do to a guest's clock and timers, measured.
//!
//! **What it is.** A guest runs, and is stopped again and again: migrated, paused and resumed, or stopped together with
//! the process, which the VMM finds out afterwards ([`gaps`]). At each stop its kvmclock pages are read from its
//! memory, as they were before the stop and as they are after it. The difference of the two lines, at the TSC of the
//! stop and at the TSC of the resume, is what the stop did to VM time ([`account`]). The figures of all stops are
//! summed up ([`series`], [`result`]).
//!
//! **What it is not.** It trusts no account of the VMM's own, except for where the stop and the resume were and how
//! much downtime was to be counted. It works alike on the VMM's kvmclock and on KVM's.
//!
//! **How.** [`measure`] drives the machine; it reads no clock of the host but the one against which it compares
//! (CLOCK_MONOTONIC_RAW, in real time).

pub mod account;
pub mod checks;
pub mod gaps;
mod raw;
pub mod result;
mod run;
pub mod series;
pub mod text;

use std::{io, time::Duration};

use machine::{
    BootOptions, End, Policies, RunError,
    blame::{Blame, Blamed},
};
use vmtime::Khz;

pub use run::measure;

/// What is done at each stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stops {
    /// The virtual machine is closed, and built anew from its saved state.
    Migrations,
    /// It stays, and is resumed as after a migration: the guest sees the same.
    InPlace,
    /// It stands still for so long. In virtual time that is the downtime, and nothing waits.
    Pauses(Duration),
    /// The process stops itself with SIGSTOP while the machine runs, and nobody requests a pause. Another process is to
    /// send SIGCONT after so long ([`fork_and_continue`](machine::host::job_control::fork_and_continue)). Real time
    /// only.
    Gaps(Duration),
}

/// What to measure.
#[derive(Clone, Debug)]
pub struct Options {
    /// How to boot.
    pub boot: BootOptions,
    /// What is done at each stop.
    pub stops: Stops,
    /// How many stops.
    pub count: u64,
    /// VM time from one stop to the next.
    pub every: Duration,
    /// The frequencies with which the guest continues, in turn; none = the present one.
    pub khz_cycle: Vec<Khz>,
    /// How the guest is resumed.
    pub policies: Policies,
    /// The fault that its restorer is, as it was written.
    pub inject: Option<String>,
}

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
pub enum ClockError {
    /// The machine cannot be built, run or restored.
    #[error(transparent)]
    Run(#[from] RunError),
    /// The options ask for something impossible.
    #[error("{0}")]
    Usage(String),
    /// The guest ended before the last stop.
    #[error(
        "the guest ended after {stops} of {wanted} stops: {}; let it run longer (--cmdline scenario=idle)",
        .end.message().unwrap_or_else(|| "its scenario was over".to_owned())
    )]
    GuestEnded {
        /// The stops that it saw.
        stops: u64,
        /// Those that were to be.
        wanted: u64,
        /// How it ended.
        end: End,
    },
    /// The process cannot be stopped.
    #[error("cannot start the thread that stops the process: {0}")]
    NoStop(#[source] io::Error),
    /// There is nothing to compare.
    #[error("vCPU 0 has no kvmclock page {0}: there is nothing to measure; use a guest that registers one")]
    NoPage(&'static str),
    /// No page of KVM's or ours has such numbers.
    #[error("vCPU {cpu}'s kvmclock page has no scale that a host publishes: {reason}")]
    BadPage {
        /// The vCPU.
        cpu: usize,
        /// What is wrong.
        reason: String,
    },
}

impl Blamed for ClockError {
    fn blame(&self) -> Blame {
        match self {
            Self::Run(error) => error.blame(),
            Self::Usage(_) => Blame::Usage,
            Self::GuestEnded { .. } | Self::NoStop(_) | Self::NoPage(_) | Self::BadPage { .. } => Blame::Run,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Catches: an impossible option reported as a failure of the guest, and the other way round.
    #[test]
    fn options_are_the_users_and_the_guest_is_the_runs() {
        assert_eq!(ClockError::Usage("x".to_owned()).blame(), Blame::Usage);
        assert_eq!(ClockError::from(RunError::Cpus(0)).blame(), Blame::Usage);
        assert_eq!(ClockError::GuestEnded { stops: 1, wanted: 2, end: End::AllParked }.blame(), Blame::Run);
        assert_eq!(ClockError::NoPage("x").blame(), Blame::Run);
        assert_eq!(ClockError::BadPage { cpu: 0, reason: "x".to_owned() }.blame(), Blame::Run);
    }
}
