//! The pages of RAM that have changed since a machine was last saved.
//!
//! There are two logs. KVM logs the guest's writes. RAM itself ([`WriteLog`](crate::mem::ram::WriteLog)) logs the
//! VMM's: kvmclock pages, patched instructions, and all other writes through vm-memory. Reading a log clears it. The
//! pages are therefore kept here until a snapshot is complete, so that a snapshot that fails loses none.

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::error::RunError;
use crate::{
    kvm::Vm,
    mem::{
        pages::PageSet,
        ram::{GuestRam, write_log},
    },
};

/// Identifies a snapshot by its content: the SHA-256 of its `state` file.
pub type SnapshotId = [u8; 32];

/// The changed pages, and the snapshot that they are relative to.
pub(crate) struct Changes {
    /// Pages that may differ from the latest snapshot.
    pub(crate) pages: PageSet,
    /// Pages that differed when a snapshot began that is not complete yet: they are in that snapshot.
    pub(crate) in_save: Option<PageSet>,
    /// While RAM is copied: what has changed since.
    pub(crate) in_copy: Option<InCopy>,
    /// The latest snapshot: all other pages are equal to its pages. None before the first.
    pub(crate) latest: Option<SnapshotId>,
}

/// What is recorded for a copy of RAM that is made while the guest runs.
pub(crate) struct InCopy {
    /// The pages that have changed since they were last taken.
    pub(crate) pages: PageSet,
    /// Nothing else is recorded: the record ends with the copy.
    pub(crate) ends_with_copy: bool,
}

impl Changes {
    /// Starts both logs.
    pub(crate) fn begin(vm: &Vm, memory: &GuestRam, latest: Option<SnapshotId>) -> Result<Self, RunError> {
        vm.log_dirty_pages()?;
        memory.iter().for_each(|region| write_log(region).begin());
        let bytes: u64 = memory.iter().map(GuestMemoryRegion::len).sum();
        Ok(Self { pages: PageSet::none(pages(bytes)), in_save: None, in_copy: None, latest })
    }

    /// Adds the pages that were written since the last call.
    pub(crate) fn collect(&mut self, vm: &Vm, memory: &GuestRam) -> Result<(), RunError> {
        let mut first = 0;
        let mut insert = |first, bits: &[u64]| {
            self.pages.insert_bits(first, bits);
            if let Some(InCopy { pages, .. }) = &mut self.in_copy {
                pages.insert_bits(first, bits);
            }
        };
        for (number, region) in (0u32..).zip(memory.iter()) {
            let bytes = usize::try_from(region.len()).unwrap_or(usize::MAX);
            insert(first, &vm.take_dirty_pages(number, bytes)?);
            insert(first, &write_log(region).take());
            first = first.saturating_add(pages(region.len()));
        }
        Ok(())
    }
}

/// The number of pages in `bytes`.
fn pages(bytes: u64) -> usize {
    usize::try_from(bytes / 4096).unwrap_or(usize::MAX)
}
