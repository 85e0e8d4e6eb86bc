//! Errors of chains of snapshots.

use std::path::PathBuf;

use super::MAX_LAYERS;
use crate::{
    blame::{Blame, Blamed},
    snapshot::SnapshotError,
};

/// Why a chain cannot be followed, or a snapshot of changes cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ChainError {
    /// The base is missing, damaged, or itself a snapshot whose base is.
    #[error("snapshot {} holds changes only, and its base cannot be used: {source}", dir.display())]
    Base {
        /// The snapshot.
        dir: PathBuf,
        /// What is wrong with the base.
        source: Box<SnapshotError>,
    },
    /// The base's directory has another snapshot.
    #[error(
        "snapshot {} holds changes only, and {} is not the snapshot that they were made to: it was changed, or replaced",
        dir.display(),
        base.display()
    )]
    WrongBase {
        /// The snapshot.
        dir: PathBuf,
        /// What should be its base.
        base: PathBuf,
    },
    /// More than [`MAX_LAYERS`].
    #[error("snapshot {}: a chain of more than {MAX_LAYERS} snapshots", dir.display())]
    TooLong {
        /// The newest snapshot of the chain.
        dir: PathBuf,
    },
    /// Runs of pages that no writer makes.
    #[error("snapshot {}: its list of pages is not possible: {reason}", dir.display())]
    Pages {
        /// The snapshot.
        dir: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The number of snapshots that a snapshot stores for its chain is wrong.
    #[error("snapshot {}: it counts {layers} snapshots in its chain, which has {found}", dir.display())]
    Layers {
        /// The snapshot.
        dir: PathBuf,
        /// The number that it stores.
        layers: usize,
        /// How many there are.
        found: usize,
    },
    /// The VM was not started with `--track-dirty`.
    #[error("no account is kept of the pages that change: start the VM with --track-dirty, or save it without a base")]
    NotTracked,
    /// The VM has no earlier snapshot that could be the base.
    #[error("the VM has not been saved yet: save it without a base first")]
    NeverSaved,
    /// A snapshot, but not the VM's latest: the pages that changed since it was made are not known.
    #[error(
        "{} is not the latest snapshot of this VM, nor the one that it was restored from: name that one, or save without a \
         base",
        base.display()
    )]
    NotLatest {
        /// What was named as the base.
        base: PathBuf,
    },
    /// One more would make the chain too long to restore.
    #[error("{} is the last of a chain of {MAX_LAYERS} snapshots: save without a base, or merge it", base.display())]
    Full {
        /// What was named as the base.
        base: PathBuf,
    },
    /// A path that JSON cannot hold, or that is gone.
    #[error("base {}: {reason}", base.display())]
    Path {
        /// What was named as the base.
        base: PathBuf,
        /// Why.
        reason: String,
    },
}

impl ChainError {
    /// Whether a save was refused because the request cannot be met, such as one with a base that does not fit. A
    /// client of the control socket then gets status 400, not 500.
    #[must_use]
    pub fn refuses_save(&self) -> bool {
        match self {
            Self::NotTracked | Self::NeverSaved | Self::NotLatest { .. } | Self::Full { .. } | Self::Path { .. } => {
                true
            }
            Self::Base { .. }
            | Self::WrongBase { .. }
            | Self::TooLong { .. }
            | Self::Pages { .. }
            | Self::Layers { .. } => false,
        }
    }
}

impl Blamed for ChainError {
    fn blame(&self) -> Blame {
        match self {
            // Also where the base fails for another reason: the snapshot that the user named cannot be restored.
            Self::Base { .. }
            | Self::WrongBase { .. }
            | Self::TooLong { .. }
            | Self::Pages { .. }
            | Self::Layers { .. }
            | Self::NotTracked
            | Self::NeverSaved
            | Self::NotLatest { .. }
            | Self::Full { .. }
            | Self::Path { .. } => Blame::Usage,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{blame::tests::all_blame, machine::error::RunError};

    // Catches: exit code 1 for a broken chain, and HTTP status 500 for a base that does not fit.
    #[test]
    fn a_chain_is_the_users() {
        let path = || PathBuf::from("snapshot");
        let damaged = [
            ChainError::Base { dir: path(), source: Box::new(RunError::HostTsc(0).into()) },
            ChainError::WrongBase { dir: path(), base: path() },
            ChainError::TooLong { dir: path() },
            ChainError::Pages { dir: path(), reason: String::new() },
            ChainError::Layers { dir: path(), layers: 2, found: 1 },
        ];
        let refused = [
            ChainError::NotTracked,
            ChainError::NeverSaved,
            ChainError::NotLatest { base: path() },
            ChainError::Full { base: path() },
            ChainError::Path { base: path(), reason: String::new() },
        ];
        assert!(!damaged.iter().any(ChainError::refuses_save) && refused.iter().all(ChainError::refuses_save));
        all_blame(Blame::Usage, damaged.into_iter().chain(refused));
    }
}
