//! What can go wrong with a live migration.

use std::io;

use super::{Address, frame::FrameError};
use crate::{
    blame::{Blame, Blamed},
    host::unix_socket::SocketError,
    mem::ram::RamError,
    snapshot::{ContainerError, MemoryError, SnapshotError},
};

/// What can go wrong with a live migration. At the source the VM goes on, except where [`Self::Unknown`] says that it
/// is not known where the VM runs.
#[derive(Debug, thiserror::Error)]
pub enum LiveError {
    /// The address cannot be listened at.
    #[error("{address}: {source}")]
    Listen {
        /// The address.
        address: Address,
        /// Why.
        source: io::Error,
    },
    /// The Unix socket cannot be made.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// A connection that is neither encrypted nor named as such.
    #[error(
        "{0}: guest memory would go over the network unencrypted, from and to anyone: name a Unix socket (over ssh -L, for \
         example), or say --insecure"
    )]
    Insecure(Address),
    /// Nobody can be reached at the address.
    #[error("{address}: {source}; start vmm receive {address} there first")]
    Connect {
        /// The address.
        address: Address,
        /// Why.
        source: io::Error,
    },
    /// The connection was lost, or the peer is silent.
    #[error("the connection to {peer} was lost: {why}")]
    Lost {
        /// The other end.
        peer: &'static str,
        /// Why.
        why: String,
    },
    /// SIGINT or SIGTERM came before the guest did.
    #[error("stopped by a signal before the guest was handed over")]
    Stopped,
    /// The peer sends what it may not.
    #[error("{peer} does not keep to the protocol: {why}")]
    Protocol {
        /// The other end.
        peer: &'static str,
        /// What it did.
        why: String,
    },
    /// The destination refuses the VM.
    #[error("the destination refuses the VM: {0}")]
    Refused(String),
    /// The VM is too large for the destination.
    #[error("the VM has {bytes} bytes of memory, and --max-memory allows {most}")]
    TooLarge {
        /// Its memory.
        bytes: u64,
        /// What is allowed.
        most: u64,
    },
    /// The guest writes faster than its memory can be sent.
    #[error(
        "after {rounds} rounds {left_bytes} bytes are still to be sent, which takes {expected_ms} ms at {rate_mib} MiB/s: the \
         guest writes too fast for a downtime of {most_ms} ms; allow a longer one (--max-downtime)"
    )]
    TooFast {
        /// Rounds.
        rounds: u32,
        /// What is left.
        left_bytes: u64,
        /// How long that takes, in milliseconds.
        expected_ms: u128,
        /// How fast memory was sent, in MiB a second.
        rate_mib: u64,
        /// The downtime that was asked for, in milliseconds.
        most_ms: u128,
    },
    /// Nobody here knows where the VM runs.
    #[error(
        "{address} was told to run the VM, its confirmation was lost, and it does not answer: the VM stays stopped here, \
         because it may run there; if you know that it does not, vmm ctl … resume lets it go on here"
    )]
    Unknown {
        /// The destination.
        address: Address,
    },
    /// The machine has ended, or the session ends.
    #[error("the VM ended before it was moved")]
    Ended,
    /// Guest memory cannot be read or written.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Guest memory cannot be allocated.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// The machine's state cannot be encoded, or is damaged.
    #[error(transparent)]
    Container(#[from] ContainerError),
    /// The machine's state cannot be used.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
}

impl LiveError {
    /// From an error of a frame.
    pub(super) fn of(peer: &'static str) -> impl Fn(FrameError) -> Self {
        move |error| match error {
            FrameError::Io(error) => Self::Lost { peer, why: why(&error) },
            bad @ FrameError::Bad { .. } => Self::Protocol { peer, why: bad.to_string() },
        }
    }

    /// From an error of a connection.
    pub(super) fn lost(peer: &'static str) -> impl Fn(io::Error) -> Self {
        move |error| Self::Lost { peer, why: why(&error) }
    }
}

/// What an error of a connection means.
fn why(error: &io::Error) -> String {
    match error.kind() {
        // A socket's timeout is reported as "would block".
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => "it was silent for too long".to_owned(),
        io::ErrorKind::UnexpectedEof => "it closed the connection".to_owned(),
        _ => error.to_string(),
    }
}

impl Blamed for LiveError {
    fn blame(&self) -> Blame {
        match self {
            Self::Listen { .. } | Self::Insecure(_) | Self::TooLarge { .. } => Blame::Usage,
            Self::Socket(error) => error.blame(),
            Self::Ram(error) => error.blame(),
            Self::Connect { .. }
            | Self::Lost { .. }
            | Self::Protocol { .. }
            | Self::Refused(_)
            | Self::TooFast { .. }
            | Self::Unknown { .. }
            | Self::Ended
            | Self::Stopped
            | Self::Memory(_)
            | Self::Container(_) => Blame::Run,
            Self::Snapshot(error) => match error.blame() {
                // What came over the connection is not the user's.
                Blame::Usage => Blame::Run,
                other => other,
            },
        }
    }
}
