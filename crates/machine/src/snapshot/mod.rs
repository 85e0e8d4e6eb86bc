//! Snapshots on disk: their format, how they are written so that only complete ones exist, and how damage is detected.
//!
//! A snapshot is a directory with two files. `state` holds one section per kind of state, each with its name, version
//! and checksum ([`container`]); `memory` is the raw image of guest RAM, with holes where RAM is zero ([`memory`]).
//! [`directory`] publishes both with one rename. The split is there because the two want opposite things: the state is
//! small, structured, read whole and shown to people; the memory is large, flat, and mapped rather than read.
//!
//! A snapshot may also hold only the pages that changed since another one ([`chain`]).
//!
//! It is no protection against malice. The checksums find truncation and changed bytes, and every size and address is
//! checked before it is used. But a user who can write the directory can write a snapshot that boots any code.
//!
//! This layer does not use KVM: the state types are serde types of the modules that the state belongs to.

pub mod chain;
pub mod container;
pub mod directory;
pub mod machine;
pub mod memory;
pub mod pager;
pub mod saving;

pub use chain::ChainError;
pub use container::{ContainerError, SectionInfo, StateReader, StateWriter};
pub use directory::{DirectoryError, MEMORY_FILE, STATE_FILE};
pub use memory::{MemoryError, MemoryLayout, RegionLayout};
pub use pager::Pager;

use crate::{
    blame::{Blame, Blamed},
    machine::error::RunError,
};

/// Anything that can go wrong with a snapshot's files.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// A section could not be written or read.
    #[error(transparent)]
    Container(#[from] ContainerError),
    /// Guest RAM could not be written, or is not what was written.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A snapshot of changes and its base do not go together, or it cannot be made.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// The directory or one of its files could not be made or opened.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    /// Guest RAM cannot be mapped block by block.
    #[error("guest memory cannot be mapped from the snapshot: {0}")]
    Paging(std::io::Error),
    /// The machine's state cannot be read from KVM.
    #[error(transparent)]
    Run(#[from] RunError),
}

/// For a snapshot that is read, which the user named. For one that a session writes, see the implementation for
/// [`SessionError`](crate::session::SessionError).
impl Blamed for SnapshotError {
    fn blame(&self) -> Blame {
        match self {
            Self::Container(error) => error.blame(),
            Self::Memory(error) => error.blame(),
            Self::Chain(error) => error.blame(),
            Self::Directory(error) => error.blame(),
            Self::Paging(_) => Blame::Usage,
            Self::Run(error) => error.blame(),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io;

    use super::*;
    use crate::{blame::tests::all_blame, mem::ram::RamError};

    /// Errors of the files alone, apart from those of the directory.
    pub(crate) fn file_errors() -> [SnapshotError; 4] {
        [
            ContainerError::NotASnapshot.into(),
            MemoryError::Cancelled.into(),
            ChainError::NeverSaved.into(),
            SnapshotError::Paging(io::Error::other("x")),
        ]
    }

    // Catches: a wrapper that changes the blame, such as a host that lacks memory for a snapshot reported as a bad
    // snapshot.
    #[test]
    fn a_snapshot_is_the_users_and_a_wrapped_error_keeps_its_blame() {
        all_blame(Blame::Usage, file_errors());
        all_blame::<SnapshotError>(Blame::Usage, [DirectoryError::NoName { dir: "/".into() }.into()]);
        let run = |error: RunError| [SnapshotError::Run(error)];
        all_blame(Blame::Host, run(RamError::Mapping { bytes: 1, reason: String::new() }.into()));
        all_blame(Blame::Usage, run(RunError::Usage(String::new())));
        all_blame(Blame::Run, run(RunError::Thread(String::new())));
    }
}
