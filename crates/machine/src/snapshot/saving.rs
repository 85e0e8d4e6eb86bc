//! A save in progress, which outlives the machine's pause.
//!
//! The machine is paused only while its RAM is written to the page cache. The guest runs again while the data reaches
//! the disk and the snapshot gets its name. A save can be cancelled; it then leaves nothing behind.

use std::{
    fs::File,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use super::{
    ChainError, MEMORY_FILE, MemoryError, SnapshotError,
    chain::{self, BaseState},
    directory,
    machine::{encode, write_state},
    memory,
};
use crate::{
    host::writeback::write_back,
    machine::{
        Machine,
        config::{HostEnvironment, host_fingerprint::HostFingerprint},
        dirty::SnapshotId,
        state::MachineState,
    },
    mem::{pages::PageSet, ram::GuestRam},
};

/// The progress of a save, and whether it was cancelled.
#[derive(Debug, Default)]
pub struct Progress {
    done: AtomicU64,
    total: AtomicU64,
    cancelled: AtomicBool,
}

impl Progress {
    /// Makes the save end at its next step, and leave nothing behind.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// The bytes done, and the bytes in all. Each byte of RAM counts twice: once when it is written to the page cache,
    /// and once when it is on the disk.
    #[must_use]
    pub fn bytes(&self) -> (u64, u64) {
        (self.done.load(Ordering::Relaxed), self.total.load(Ordering::Relaxed))
    }

    /// Sets the number of bytes in all.
    pub(super) fn begin(&self, bytes: u64) {
        self.total.store(bytes, Ordering::Relaxed);
    }

    /// Adds to the bytes done.
    ///
    /// # Errors
    /// [`MemoryError::Cancelled`] if the save was cancelled.
    pub(super) fn advance(&self, bytes: u64) -> Result<(), MemoryError> {
        self.done.fetch_add(bytes, Ordering::Relaxed);
        if self.cancelled.load(Ordering::Relaxed) { Err(MemoryError::Cancelled) } else { Ok(()) }
    }
}

/// Everything that a save needs after the machine's state was read: it can run on another thread.
pub struct Job {
    state: MachineState,
    note: Option<HostFingerprint>,
    memory: Arc<GuestRam>,
    /// The pages that changed since the latest snapshot; none if changes are not tracked.
    changed: Option<PageSet>,
    base: Option<BaseState>,
    dir: PathBuf,
    progress: Arc<Progress>,
}

/// Prepares to save a paused machine to the new (or empty) directory `dir`. With a `base`, only the pages of RAM that
/// differ from it are saved; it must be the machine's latest snapshot or the one that the machine was restored from.
///
/// # Errors
/// [`SnapshotError`]; the machine is unharmed.
pub fn prepare(
    machine: &mut Machine,
    env: &HostEnvironment,
    dir: &Path,
    base: Option<&Path>,
) -> Result<Job, SnapshotError> {
    let base = base.map(|base| -> Result<_, SnapshotError> {
        if !machine.tracks_changes() {
            return Err(ChainError::NotTracked.into());
        }
        chain::new_base(machine.latest_snapshot().ok_or(ChainError::NeverSaved)?, base, dir)
    });
    let mut base = base.transpose()?;
    directory::refuse_occupied(dir)?;
    let state = machine.state(env)?;
    let note = env.fingerprint().map_err(crate::machine::error::RunError::from)?;
    // The pages after the state: reading the state makes KVM complete a pending access, which can still write to RAM.
    let changed = machine.changed_pages()?;
    if let (Some(base), Some(pages)) = (&mut base, &changed) {
        base.pages = pages.runs().map(|run| (run.start, run.len())).collect();
    }
    let memory = machine.memory();
    Ok(Job { state, note, memory, changed, base, dir: dir.to_owned(), progress: Arc::default() })
}

impl Job {
    /// The save's progress, which is also how to cancel it.
    #[must_use]
    pub fn progress(&self) -> Arc<Progress> {
        Arc::clone(&self.progress)
    }

    /// Writes the snapshot, on any thread. Until `memory_written` is called, no vCPU may run, and RAM must hold the
    /// guest's own instructions at trap sites. Returns the snapshot's id if changes are tracked.
    ///
    /// # Errors
    /// [`SnapshotError`]; the directory is as it was.
    pub fn write(self, memory_written: impl FnOnce()) -> Result<Option<SnapshotId>, SnapshotError> {
        let Self { state, note, memory, changed, base, dir, progress } = self;
        let mut id = None;
        directory::save(&dir, |temporary| {
            let path = temporary.join(MEMORY_FILE);
            let file = directory::create_file(temporary, MEMORY_FILE)?;
            let in_use;
            let pages = match (&base, &changed) {
                (Some(_), Some(pages)) => pages,
                _ => {
                    in_use = memory::in_use(&memory)?;
                    &in_use
                }
            };
            let layout = memory::write(&file, &path, &memory, pages, &progress)?;
            let bytes = encode(&state, note.as_ref(), &layout, base.as_ref())?;
            memory_written();
            write_state(temporary, &bytes)?;
            flush(&file, &path, pages, &progress)?;
            id = changed.is_some().then(|| chain::id_of(&bytes));
            Ok::<_, SnapshotError>(())
        })?;
        Ok(id)
    }
}

/// How much is flushed at a time, in bytes. A cancelled save goes on for at most as long as this takes.
const FLUSH_BYTES: u64 = 8 << 20;

/// Waits until the `pages` of `file` are on the disk, piece by piece, so that there is progress to report and a point
/// to cancel at. The fsync(2) that makes them durable then has little left to do.
fn flush(file: &File, path: &Path, pages: &PageSet, progress: &Progress) -> Result<(), MemoryError> {
    let io = |source| MemoryError::Io { path: path.to_owned(), action: "write", source };
    for run in pages.runs() {
        let (mut at, end) = (memory::bytes(run.start), memory::bytes(run.end));
        while at < end {
            let length = FLUSH_BYTES.min(end - at);
            write_back(file, at, length).map_err(io)?;
            progress.advance(length)?;
            at = at.saturating_add(length);
        }
    }
    Ok(())
}
