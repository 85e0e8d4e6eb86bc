//! Records which pages of RAM change from one snapshot to the next.

use vm_memory::GuestMemoryBackend;

use super::{
    Machine,
    dirty::{Changes, InCopy, SnapshotId},
    error::RunError,
};
use crate::mem::{pages::PageSet, ram::write_log};

impl Machine {
    /// Records from now on which pages change. `latest` is the snapshot that RAM is equal to now, if there is one.
    ///
    /// # Errors
    /// If KVM cannot log dirty pages.
    pub fn track_changes(&mut self, latest: Option<SnapshotId>) -> Result<(), RunError> {
        self.changes = Some(Changes::begin(&self.vm, &self.shared.memory, latest)?);
        Ok(())
    }

    /// Whether changed pages are recorded.
    #[must_use]
    pub fn tracks_changes(&self) -> bool {
        self.changes.is_some()
    }

    /// The latest snapshot of this machine, or the one that it was restored from; none if there is none, or if
    /// changes are not recorded.
    #[must_use]
    pub fn latest_snapshot(&self) -> Option<SnapshotId> {
        self.changes.as_ref()?.latest
    }

    /// The pages of RAM in which it may differ from [`Self::latest_snapshot`], by their index in a snapshot's memory
    /// file. The machine is paused, and its vCPUs are drained: what KVM still has to write on their behalf is written.
    ///
    /// # Errors
    /// If the ioctl fails.
    pub fn changed_pages(&mut self) -> Result<Option<PageSet>, RunError> {
        let Some(changes) = &mut self.changes else { return Ok(None) };
        changes.collect(&self.vm, &self.shared.memory)?;
        Ok(Some(changes.pages.clone()))
    }

    /// Call it when the snapshot that is being made has all of RAM: patches trap sites again, so that the guest may
    /// run.
    pub fn memory_is_saved(&mut self) {
        self.show_patched_code();
        let Some(changes) = &mut self.changes else { return };
        changes.in_save = Some(changes.pages.clone());
        changes.pages.clear();
        // Since the save began the VMM has written the guest's own instructions at trap sites, and now its patches
        // again: together no change. The guest has written nothing.
        for region in self.shared.memory.iter() {
            let _ = write_log(region).take();
        }
    }

    /// Call it when that snapshot is complete, with its `id`. With none it has failed, and its pages count as changed
    /// again.
    pub fn saved_as(&mut self, id: Option<SnapshotId>) {
        let Some(changes) = &mut self.changes else { return };
        match (id, changes.in_save.take()) {
            (Some(id), _) => changes.latest = Some(id),
            (None, Some(pages)) => changes.pages.union(&pages),
            (None, None) => {}
        }
    }

    /// Begins a copy of RAM while the guest runs: records from now on which pages change, besides what is recorded for
    /// snapshots. The vCPUs are stopped.
    ///
    /// # Errors
    /// If KVM cannot log dirty pages.
    pub fn begin_copy(&mut self) -> Result<(), RunError> {
        let ends_with_copy = self.changes.is_none();
        if ends_with_copy {
            self.track_changes(None)?;
        } else {
            drop(self.changed_pages()?);
        }
        if let Some(changes) = &mut self.changes {
            let mut pages = changes.pages.clone();
            pages.clear();
            changes.in_copy = Some(InCopy { pages, ends_with_copy });
        }
        Ok(())
    }

    /// The pages that have changed since the copy began, or since the last call. The vCPUs are stopped.
    ///
    /// # Errors
    /// If the ioctl fails.
    pub fn take_copy_changes(&mut self) -> Result<PageSet, RunError> {
        drop(self.changed_pages()?);
        let Some(InCopy { pages, .. }) = self.changes.as_mut().and_then(|changes| changes.in_copy.as_mut()) else {
            return Err(RunError::BadState("no copy of RAM is being made".to_owned()));
        };
        let taken = pages.clone();
        pages.clear();
        Ok(taken)
    }

    /// Ends the copy.
    ///
    /// # Errors
    /// If the ioctl fails.
    pub fn end_copy(&mut self) -> Result<(), RunError> {
        let ended = self.changes.as_mut().and_then(|changes| changes.in_copy.take());
        if ended.is_some_and(|InCopy { ends_with_copy, .. }| ends_with_copy) {
            self.changes = None;
            self.vm.end_dirty_log()?;
        }
        Ok(())
    }

    /// Takes out the set of changed pages, with all writes so far, before the virtual machine is closed.
    pub(crate) fn take_changes(&mut self) -> Result<Option<Changes>, RunError> {
        let mut changes = self.changes.take();
        if let Some(changes) = &mut changes {
            changes.collect(&self.vm, &self.shared.memory)?;
        }
        Ok(changes)
    }

    /// Continues with a set of changed pages in a new virtual machine that has the same RAM and has not run.
    pub(crate) fn set_changes(&mut self, changes: Option<Changes>) -> Result<(), RunError> {
        if changes.is_some() {
            self.vm.log_dirty_pages()?;
        }
        self.changes = changes;
        Ok(())
    }
}
