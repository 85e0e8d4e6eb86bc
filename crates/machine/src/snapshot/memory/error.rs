//! Why guest RAM was not saved or not restored.

use std::io;
use std::path::PathBuf;

use vm_memory::{GuestMemoryError, GuestRegionCollectionError};

use crate::blame::{Blame, Blamed};

/// Why guest RAM was not saved or not restored.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The save was cancelled.
    #[error("the save was given up")]
    Cancelled,
    /// A layout that no VM has.
    #[error("the memory layout of the snapshot is not possible: {reason}")]
    Layout {
        /// What is wrong with it.
        reason: String,
    },
    /// The file is shorter than the layout says.
    #[error("memory file {} is truncated: {found} bytes, expected {expected}", path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        found: u64,
        /// The size that the layout asks for.
        expected: u64,
    },
    /// The file is longer than the layout says.
    #[error("memory file {} is too long: {found} bytes, expected {expected}", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        found: u64,
        /// The size that the layout asks for.
        expected: u64,
    },
    /// The file does not hold what was written.
    #[error("memory file {} is not what was saved, its checksum differs: the file was changed or damaged", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
    },
    /// The file cannot be read, written or mapped.
    #[error("memory file {}: cannot {action}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// The error that the host returned.
        source: io::Error,
    },
    /// The file was usable at first, and became unreadable while the VM used it.
    #[error("memory file {} can no longer be read, the VM ran from it: {reason}", path.display())]
    Lost {
        /// The file.
        path: PathBuf,
        /// How that was noticed.
        reason: String,
    },
    /// Guest RAM of the running VM cannot be read.
    #[error("guest memory at {address:#x} cannot be read: {source}")]
    Guest {
        /// The guest physical address.
        address: u64,
        /// Why.
        source: GuestMemoryError,
    },
    /// The regions cannot be put together.
    #[error("guest memory cannot be made from the snapshot: {0}")]
    Regions(#[from] GuestRegionCollectionError),
}

impl Blamed for MemoryError {
    fn blame(&self) -> Blame {
        match self {
            Self::Cancelled
            | Self::Layout { .. }
            | Self::Truncated { .. }
            | Self::TooLong { .. }
            | Self::Damaged { .. }
            | Self::Io { .. }
            | Self::Lost { .. }
            | Self::Guest { .. }
            | Self::Regions(_) => Blame::Usage,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blame::tests::all_blame;

    // Catches: a damaged memory file reported as a guest that failed.
    #[test]
    fn a_memory_file_is_the_users() {
        let path = || PathBuf::from("memory");
        let errors = [
            MemoryError::Cancelled,
            MemoryError::Layout { reason: String::new() },
            MemoryError::Truncated { path: path(), found: 1, expected: 2 },
            MemoryError::TooLong { path: path(), found: 2, expected: 1 },
            MemoryError::Damaged { path: path() },
            MemoryError::Io { path: path(), action: "read", source: io::Error::other("x") },
            MemoryError::Lost { path: path(), reason: String::new() },
            MemoryError::Guest { address: 1, source: GuestMemoryError::InvalidBackendAddress },
            MemoryError::Regions(GuestRegionCollectionError::NoMemoryRegion),
        ];
        all_blame(Blame::Usage, errors);
    }
}
