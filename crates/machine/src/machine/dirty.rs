//! Which pages of RAM have changed since a machine was last saved.
//!
//! Two keep account: KVM of what the guest writes, RAM itself ([`WriteLog`](crate::mem::ram::WriteLog)) of what the VMM
//! writes: kvmclock pages, patched instructions, whatever a device or a later part of the VMM writes by way of vm-memory.
//! Both forget what they told. It is kept here until a snapshot is whole, so that one that fails loses nothing.

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::error::RunError;
use crate::{
    kvm::Vm,
    mem::{
        pages::PageSet,
        ram::{GuestRam, write_log},
    },
};

/// Which snapshot, by its content: the SHA-256 of its `state` file.
pub type SnapshotId = [u8; 32];

/// What is known of the pages.
pub(crate) struct Changes {
    /// They differ from the latest snapshot, or may.
    pub(crate) pages: PageSet,
    /// So did these, which a snapshot has that is not whole yet.
    pub(crate) in_save: Option<PageSet>,
    /// Of which every other page is the same; none before the first.
    pub(crate) latest: Option<SnapshotId>,
}

impl Changes {
    /// Keeps account from now on.
    pub(crate) fn begin(vm: &Vm, memory: &GuestRam, latest: Option<SnapshotId>) -> Result<Self, RunError> {
        vm.log_dirty_pages()?;
        memory.iter().for_each(|region| write_log(region).begin());
        let bytes: u64 = memory.iter().map(GuestMemoryRegion::len).sum();
        Ok(Self { pages: PageSet::none(page(bytes)), in_save: None, latest })
    }

    /// Adds what was written since the last time.
    pub(crate) fn collect(&mut self, vm: &Vm, memory: &GuestRam) -> Result<(), RunError> {
        let mut first = 0;
        for (number, region) in (0u32..).zip(memory.iter()) {
            let bytes = usize::try_from(region.len()).unwrap_or(usize::MAX);
            self.pages.insert_bits(first, &vm.take_dirty_pages(number, bytes)?);
            self.pages.insert_bits(first, &write_log(region).take());
            first = first.saturating_add(page(region.len()));
        }
        Ok(())
    }
}

/// How many pages `bytes` are.
fn page(bytes: u64) -> usize {
    usize::try_from(bytes / 4096).unwrap_or(usize::MAX)
}
