//! The requests to a running VM, and its answers.
//!
//! | request | body | answer |
//! |---|---|---|
//! | `GET /v1/status` | | 200, [`Status`] |
//! | `PUT /v1/pause` | | 204 |
//! | `PUT /v1/resume` | [`Resume`] or none | 204 |
//! | `PUT /v1/snapshot` | [`Snapshot`] | 204 |
//! | `PUT /v1/migrate` | [`Migrate`] or none | 204; with `to` 200, [`Figures`] |
//! | `PUT /v1/quit` | | 204 |
//!
//! A refusal has one of the codes of [`ApiError`] and the body `{"error": "..."}`. Requests deny unknown fields, so
//! that a misspelt option is an error and not a default; answers may gain fields within `v1`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use vmtime::{DeadlinePolicy, DowntimePolicy, GuestTsc, Khz, VmTime};

use super::Answer;
use crate::{
    live::{Address, Figures},
    machine::config::{LapicKind, source::TscSource},
};

/// One request to the VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Return the VM's status. Changes nothing, works in every state.
    Status,
    /// Stop the vCPUs at an instruction boundary. Pausing a paused VM is no error.
    Pause,
    /// Let a paused VM run. Resuming a running VM is no error.
    Resume(Resume),
    /// Save the VM to a directory.
    Snapshot(Snapshot),
    /// Save and restore within the process, at another TSC frequency if wanted; or move to another process.
    Migrate(Migrate),
    /// End the VM and the VMM, without notice to the guest.
    Quit,
}

/// The body of `PUT /v1/resume`. Fields that it omits have the values that the VM was started with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Resume {
    /// What becomes of a deadline in flight.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline: Option<DeadlinePolicy>,
    /// What VM time does between pause and resume.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime: Option<DowntimePolicy>,
}

/// The body of `PUT /v1/snapshot`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Snapshot {
    /// The directory to create: an absolute path, because the server does not know the client's working directory.
    pub dir: PathBuf,
    /// Save only what differs from this snapshot: the VM's latest, or the one that it was restored from. An absolute
    /// path too. The VM must have been started with --track-dirty.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<PathBuf>,
    /// Leave the VM paused afterwards. Otherwise it is then running or paused as it was before.
    #[serde(default)]
    pub stay_paused: bool,
}

/// The body of `PUT /v1/migrate`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Migrate {
    /// Move the VM to the VMM that waits at this address, while it runs; none = migrate within the process. What
    /// follows from a stop is then for the destination to say: no frequency and no policies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<Address>,
    /// With `to`: how long the guest may be stopped to send the rest of its memory, in milliseconds; 10 by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_downtime_ms: Option<u64>,
    /// With `to`: TCP without encryption is meant.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub insecure: bool,
    /// The guest TSC frequency after the migration, in kHz; none = the present one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tsc_khz: Option<Khz>,
    /// What becomes of a deadline in flight.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline: Option<DeadlinePolicy>,
    /// What VM time does between save and restore.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime: Option<DowntimePolicy>,
}

/// The downtime that is allowed if none is named, in milliseconds.
pub const MAX_DOWNTIME_MS: u64 = 10;

/// Whether the guest makes progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunState {
    /// The vCPUs run, or wait for an interrupt.
    Running,
    /// The vCPUs are stopped; VM time stands still.
    Paused,
}

/// The answer to `GET /v1/status`. Numbers are 64-bit integers: readers that keep them as floating point lose the low
/// bits of `guest_tsc`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Whether the guest makes progress.
    pub state: RunState,
    /// Whether the VMM or KVM emulates the local APICs.
    pub lapic: LapicKind,
    /// Where the guest's RDTSC gets its value.
    pub tsc_source: TscSource,
    /// The guest TSC frequency now, in kHz.
    pub tsc_khz: Khz,
    /// The guest TSC now, in ticks.
    pub guest_tsc: GuestTsc,
    /// What the guest's kvmclock shows at `guest_tsc`, in nanoseconds.
    pub vm_time_ns: VmTime,
    /// Whether ticks are audited: the guest has a tick ring that can be read.
    pub judged: bool,
    /// How many ticks the guest has recorded since it booted; null if it has no ring, or one that cannot be read.
    pub ticks: Option<u64>,
    /// How often the VM was migrated since it booted, in whatever process; a restore is a migration.
    pub migrations: u64,
    /// How often the VM was migrated within this process, restores not counted.
    pub migrations_here: u64,
    /// Progress of the snapshot that is being saved; null if none is.
    pub saving: Option<Saving>,
    /// Progress of the VM's move to another VMM; null if it does not move.
    pub moving: Option<Moving>,
}

/// Progress of a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moving {
    /// Rounds of pages that are over.
    pub rounds: u64,
    /// Bytes sent.
    pub sent_bytes: u64,
    /// Bytes of memory that were left to send when this round began.
    pub left_bytes: u64,
}

/// Progress of a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saving {
    /// Bytes done: first those of guest RAM written to the host's page cache, while the VM is stopped; then the same
    /// bytes again as they reach the disk.
    pub done_bytes: u64,
    /// Bytes in all.
    pub total_bytes: u64,
}

/// A command that was carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// Done; the answer has no body. 204.
    Done,
    /// The VM's status. 200.
    Status(Box<Status>),
    /// The VM runs elsewhere, and has ended here. 200.
    Moved(Figures),
}

/// A command that was not carried out. The VM is as it was.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ApiError {
    /// The request is malformed, or asks for something that no VM can do. 400.
    #[error("{0}")]
    BadRequest(String),
    /// There is no such path. 404.
    #[error("no such path {path}: the API is under /v1/ (status, pause, resume, snapshot, migrate, quit)")]
    NotFound {
        /// The path asked for.
        path: String,
    },
    /// The path has another method. 405.
    #[error("use {allow} for this path")]
    MethodNotAllowed {
        /// The method to use.
        allow: &'static str,
    },
    /// The VM is not in a state for it, such as pausing after the guest has ended. 409.
    #[error("{0}")]
    WrongState(String),
    /// The body has no `Content-Length`. 411.
    #[error("send the body with a Content-Length, not chunked")]
    LengthRequired,
    /// The body is larger than any request needs. 413.
    #[error("a body of {bytes} bytes is more than the {limit} that a request may have")]
    TooLarge {
        /// The size that was announced, in bytes.
        bytes: u64,
        /// The size that is possible, in bytes.
        limit: usize,
    },
    /// The request line and headers are larger than any request needs. 431.
    #[error("the request's headers are too large")]
    HeadersTooLarge,
    /// The VMM tried and failed, for example to write a snapshot. 500.
    #[error("{0}")]
    Internal(String),
}

impl ApiError {
    /// The HTTP status code.
    #[must_use]
    pub fn code(&self) -> u16 {
        match self {
            Self::BadRequest(_) => 400,
            Self::NotFound { .. } => 404,
            Self::MethodNotAllowed { .. } => 405,
            Self::WrongState(_) => 409,
            Self::LengthRequired => 411,
            Self::TooLarge { .. } => 413,
            Self::HeadersTooLarge => 431,
            Self::Internal(_) => 500,
        }
    }
}

/// Carries out commands. It is called on the event loop's thread, which serves other clients, too. So it must not
/// block; the answer may be given later, and on another thread.
pub trait Handler {
    /// Carries out one command, or begins to. A command that fails is usually answered with [`ApiError::WrongState`] or
    /// [`ApiError::Internal`]. If `answer` is dropped, the client is answered that the VM has ended.
    fn handle(&mut self, command: Command, answer: Answer<Result<Reply, ApiError>>);
}
