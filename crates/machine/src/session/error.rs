//! What can go wrong with a session.

use crate::{
    blame::{Blame, Blamed},
    host::unix_socket::SocketError,
    live::LiveError,
    machine::error::RunError,
    snapshot::SnapshotError,
};

/// What can go wrong with a session.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The machine.
    #[error(transparent)]
    Run(#[from] RunError),
    /// Saving it.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The memory that it was restored with is not what was saved.
    #[error(transparent)]
    Damaged(SnapshotError),
    /// The control socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// Its arrival from another VMM.
    #[error(transparent)]
    Live(#[from] LiveError),
    /// The event loop.
    #[error("the event loop failed: {0}")]
    Events(String),
    /// A thread panicked, or the machine was lost in a migration that failed.
    #[error("a thread ended unexpectedly")]
    Lost,
}

pub(super) fn events(error: impl std::fmt::Display) -> SessionError {
    SessionError::Events(error.to_string())
}

impl Blamed for SessionError {
    fn blame(&self) -> Blame {
        match self {
            Self::Run(error) => error.blame(),
            // Writing a snapshot is a part of the run; the user only named its directory.
            Self::Snapshot(error) => match error {
                SnapshotError::Directory(error) => error.blame(),
                SnapshotError::Run(error) => error.blame(),
                SnapshotError::Container(_)
                | SnapshotError::Memory(_)
                | SnapshotError::Chain(_)
                | SnapshotError::Paging(_) => Blame::Run,
            },
            Self::Damaged(error) => error.blame(),
            Self::Socket(error) => error.blame(),
            Self::Live(error) => error.blame(),
            Self::Events(_) | Self::Lost => Blame::Run,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{blame::tests::all_blame, snapshot::DirectoryError, snapshot::tests::file_errors};

    // Catches: exit code 2 for a disk that became full while a snapshot was written, exit code 1 for damaged memory,
    // and a wrapper that changes the blame.
    #[test]
    fn a_failed_write_is_blamed_on_the_run_and_a_bad_input_on_the_user() {
        all_blame(Blame::Run, file_errors().map(SessionError::Snapshot));
        all_blame(Blame::Usage, file_errors().map(SessionError::Damaged));
        all_blame(Blame::Run, [SessionError::Events(String::new()), SessionError::Lost]);
        let directory = DirectoryError::NotEmpty { dir: "snapshot".into() };
        let socket = SocketError::InUse { path: "socket".into() };
        all_blame(Blame::Usage, [SessionError::Snapshot(directory.into()), socket.into()]);
        for (blame, error) in [
            (Blame::Host, || RunError::HostTsc(0)),
            (Blame::Usage, || RunError::Cpus(0)),
            (Blame::Run, || RunError::Thread(String::new())),
        ] as [(Blame, fn() -> RunError); 3]
        {
            all_blame(blame, [SessionError::Run(error()), SessionError::Snapshot(error().into())]);
        }
    }
}
