//! Migrate at every instruction.
//!
//! **What it is.** A guest in virtual time is stepped through a stretch, by default one whole tick. At each instruction
//! boundary it is migrated to other TSC frequencies and runs until its next ticks came or should have come. The ticks
//! give the verdict, and the guest goes back to the boundary. A race of a few instructions, which elsewhere is hit once
//! in a million migrations, is hit every time.
//!
//! **What it is not.** It does not depend on the guest's clockevent or on the policy: it reports what happened at each
//! point. It reads host time only to print how long it took: the findings are the same on every run ([`result`]).
//!
//! **How.** Stepping costs no virtual time ([`machine::Stepper`]), so that boundaries between two operations differ
//! only in the guest's registers and memory, and a race depends on just these. A point costs a checkpoint in memory and
//! the run of about one tick.

mod code;
mod cost;
mod interrupts;
pub mod merge;
mod options;
mod pairs;
mod point;
mod replay;
pub mod result;
mod tally;
pub mod verdict;
mod walk;
mod windows;
mod workers;

pub use cost::Cost;
pub use options::{Depth, Edge, Every, Options, Ratio};
pub use replay::{Replay, replay};
pub use tally::{Tally, tally};
pub use workers::{Progress, sweep};

use machine::{
    End, RunError,
    blame::{Blame, Blamed},
};

use crate::recipe::RecipeError;

/// What can go wrong with a sweep.
#[derive(Debug, thiserror::Error)]
pub enum SweepError {
    /// The machine cannot be built, run or restored.
    #[error(transparent)]
    Run(#[from] RunError),
    /// The recipe cannot be used.
    #[error(transparent)]
    Recipe(#[from] RecipeError),
    /// The options ask for something impossible.
    #[error("{0}")]
    Usage(String),
    /// No function has this name.
    #[error("the guest image has no function {0:?}; see its symbol table, for example with nm -C")]
    NoSymbol(String),
    /// Several functions have this name.
    #[error("{name:?} could be any of: {}; write more of the name, or an address", .found.join(", "))]
    SeveralSymbols {
        /// The name.
        name: String,
        /// The functions.
        found: Vec<String>,
    },
    /// The guest ended before the stretch did.
    #[error("the guest ended before {before}: {}", reason(.end))]
    GuestEnded {
        /// What it did not reach.
        before: String,
        /// How it ended.
        end: End,
    },
    /// The stretch is too long to sweep.
    #[error("the stretch from {from} to {to} has more than {limit} instructions; choose a nearer end")]
    TooLong {
        /// Its beginning.
        from: String,
        /// Its end.
        to: String,
        /// The limit.
        limit: u64,
    },
    /// The guest cannot go back to a checkpoint.
    #[error("the guest cannot be taken back to an earlier instant: {0}")]
    NotBack(&'static str),
    /// A worker thread panicked or could not be started.
    #[error("a worker failed: {0}")]
    Worker(String),
    /// Interrupted before there was anything to keep.
    #[error("interrupted before the first point")]
    Interrupted,
}

fn reason(end: &End) -> String {
    end.message().unwrap_or_else(|| "its scenario was over; let it make more ticks (count=…)".to_owned())
}

impl Blamed for SweepError {
    fn blame(&self) -> Blame {
        match self {
            Self::Run(error) => error.blame(),
            Self::Recipe(error) => error.blame(),
            Self::Usage(_) | Self::NoSymbol(_) | Self::SeveralSymbols { .. } | Self::TooLong { .. } => Blame::Usage,
            Self::GuestEnded { .. } | Self::NotBack(_) | Self::Worker(_) | Self::Interrupted => Blame::Run,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Catches: a stretch that cannot be, reported as a guest that failed, and the other way round.
    #[test]
    fn a_stretch_is_the_users_and_what_becomes_of_it_the_runs() {
        let text = || "x".to_owned();
        let of = |errors: &[SweepError]| errors.iter().map(Blamed::blame).collect::<Vec<_>>();
        let usage = [
            SweepError::Usage(text()),
            SweepError::NoSymbol(text()),
            SweepError::SeveralSymbols { name: text(), found: vec![text()] },
            SweepError::TooLong { from: text(), to: text(), limit: 1 },
            RunError::Cpus(0).into(),
        ];
        assert_eq!(of(&usage), [Blame::Usage; 5]);
        let run = [
            SweepError::GuestEnded { before: text(), end: End::AllParked },
            SweepError::NotBack("x"),
            SweepError::Worker(text()),
            SweepError::Interrupted,
            RunError::Thread(text()).into(),
        ];
        assert_eq!(of(&run), [Blame::Run; 5]);
        assert_eq!(of(&[RunError::Copy(1).into()]), [Blame::Host]);
    }
}
