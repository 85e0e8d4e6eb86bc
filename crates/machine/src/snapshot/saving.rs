//! A save that is under way, beside the machine.
//!
//! The machine stands still only while its RAM is written into the page cache. That it reaches the disk, and that the
//! snapshot gets its name, is waited for while the guest runs on. And whoever is no longer interested says so: then nothing of
//! it is left behind.

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

/// How far a save is, and whether it is still wanted.
#[derive(Debug, Default)]
pub struct Progress {
    done: AtomicU64,
    total: AtomicU64,
    cancelled: AtomicBool,
}

impl Progress {
    /// The save is to end, and to leave nothing behind.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// Bytes that are done, of how many. Each byte of RAM that is written counts twice: once for the page cache, once for the
    /// disk.
    #[must_use]
    pub fn bytes(&self) -> (u64, u64) {
        (self.done.load(Ordering::Relaxed), self.total.load(Ordering::Relaxed))
    }

    /// So much is to be done.
    pub(super) fn begin(&self, bytes: u64) {
        self.total.store(bytes, Ordering::Relaxed);
    }

    /// So much more is done.
    ///
    /// # Errors
    /// [`MemoryError::Cancelled`].
    pub(super) fn advance(&self, bytes: u64) -> Result<(), MemoryError> {
        self.done.fetch_add(bytes, Ordering::Relaxed);
        if self.cancelled.load(Ordering::Relaxed) { Err(MemoryError::Cancelled) } else { Ok(()) }
    }
}

/// Everything that a snapshot of a machine takes, apart from the machine.
pub struct Job {
    state: MachineState,
    note: Option<HostFingerprint>,
    memory: Arc<GuestRam>,
    /// What changed since the latest snapshot; none if no account is kept.
    changed: Option<PageSet>,
    base: Option<BaseState>,
    dir: PathBuf,
    progress: Arc<Progress>,
}

/// Prepares to save a paused machine to the new (or empty) directory `dir`: all of it or nothing. With a `base`, which must be
/// the machine's latest snapshot or the one that it was restored from, only those pages of RAM that differ from it.
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
    let note = env.note().map_err(crate::machine::error::RunError::from)?;
    // After the state, whose reading lets KVM finish what it has begun to write.
    let changed = machine.changed_pages()?;
    if let (Some(base), Some(pages)) = (&mut base, &changed) {
        base.pages = pages.runs().map(|run| (run.start, run.len())).collect();
    }
    let memory = machine.memory();
    Ok(Job { state, note, memory, changed, base, dir: dir.to_owned(), progress: Arc::default() })
}

impl Job {
    /// How far it is.
    #[must_use]
    pub fn progress(&self) -> Arc<Progress> {
        Arc::clone(&self.progress)
    }

    /// Writes the snapshot, on whatever thread. RAM must hold the guest's own instructions at trap sites and no vCPU may run
    /// until `memory_written` is called. Gives the snapshot's id, if account is kept of what changes.
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

/// How much is waited for at a time: so long a save goes on that nobody wants any more.
const FLUSH_BYTES: u64 = 8 << 20;

/// Waits until the `pages` of `file` are on the disk, piece by piece: the flush that makes sure has little left to do then.
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
