//! Errors of a snapshot's directory.

use std::{io, path::PathBuf};

use crate::{
    blame::{Blame, Blamed},
    snapshot::container::ContainerError,
};

/// Why a snapshot's directory was not created or not opened.
#[derive(Debug, thiserror::Error)]
pub enum DirectoryError {
    /// A path such as `/` or `..`, which nothing can be renamed to.
    #[error("snapshot directory {}: give the name of a directory to create", dir.display())]
    NoName {
        /// The path.
        dir: PathBuf,
    },
    /// The directory exists and is not empty.
    #[error("snapshot directory {} exists and is not empty: remove it or choose another name", dir.display())]
    NotEmpty {
        /// The directory.
        dir: PathBuf,
    },
    /// The path exists and is not a directory.
    #[error("snapshot directory {} exists and is not a directory: remove it or choose another name", dir.display())]
    NotADirectory {
        /// The path.
        dir: PathBuf,
    },
    /// A system call failed.
    #[error("snapshot: cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// The path that it was tried on.
        path: PathBuf,
        /// The error that the host returned.
        source: io::Error,
    },
    /// A file of the snapshot is a directory, a pipe or a device.
    #[error("snapshot file {} is {kind}, not a regular file", path.display())]
    NotAFile {
        /// The file.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// The `state` file is not usable.
    #[error("snapshot file {}: {source}", path.display())]
    State {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: ContainerError,
    },
}

impl Blamed for DirectoryError {
    fn blame(&self) -> Blame {
        match self {
            Self::NoName { .. }
            | Self::NotEmpty { .. }
            | Self::NotADirectory { .. }
            | Self::Io { .. }
            | Self::NotAFile { .. } => Blame::Usage,
            Self::State { source, .. } => source.blame(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blame::tests::all_blame;

    // Catches: a path that cannot be read or written, reported as a guest that failed.
    #[test]
    fn a_snapshots_path_is_the_users() {
        let path = || PathBuf::from("snapshot");
        let errors = [
            DirectoryError::NoName { dir: path() },
            DirectoryError::NotEmpty { dir: path() },
            DirectoryError::NotADirectory { dir: path() },
            DirectoryError::Io { action: "open", path: path(), source: io::Error::other("x") },
            DirectoryError::NotAFile { path: path(), kind: "a FIFO" },
            DirectoryError::State { path: path(), source: ContainerError::NotASnapshot },
        ];
        all_blame(Blame::Usage, errors);
    }
}
