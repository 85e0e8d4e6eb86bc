//! Incremental copies of guest RAM: updating one costs only the pages that were written since.
//!
//! Each copy holds RAM as it was at one instant, and a set of the pages in which RAM may differ from it now. KVM logs
//! the guest's writes, and RAM those of the VMM (kvmclock pages, instructions that KVM cannot emulate). Taking a copy
//! again, or going back to it, then copies those pages only: a few, for a guest that handles a timer.

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::{
    kvm::Vm,
    machine::error::RunError,
    mem::ram::{GuestRam, write_log},
};

const PAGE: usize = 4096;
const PAGE_U64: u64 = 4096;

/// RAM at some instants.
pub(crate) struct RamCheckpoint {
    memory: Arc<GuestRam>,
    regions: Vec<(GuestAddress, usize)>,
    copies: Vec<Copy>,
}

/// RAM at one instant.
struct Copy {
    regions: Vec<Region>,
}

/// One region of it.
struct Region {
    bytes: Vec<u8>,
    /// Pages in which RAM may differ from `bytes`, a bit each.
    differs: Vec<u64>,
}

impl RamCheckpoint {
    /// No copy yet; writes are logged from now on.
    pub(crate) fn new(vm: &Vm) -> Result<Self, RunError> {
        vm.log_dirty_pages()?;
        let memory = Arc::clone(vm.memory());
        let mut regions = Vec::new();
        for region in memory.iter() {
            write_log(region).begin();
            let bytes = usize::try_from(region.len()).map_err(|_| lost(region.start_addr()))?;
            regions.push((region.start_addr(), bytes));
        }
        Ok(Self { memory, regions, copies: Vec::new() })
    }

    /// Makes copy number `level` what RAM is now.
    pub(crate) fn take(&mut self, vm: &Vm, level: usize) -> Result<(), RunError> {
        self.collect_writes(vm)?;
        while self.copies.len() <= level {
            let copy = self.whole_copy()?;
            self.copies.push(copy);
        }
        let Some(copy) = self.copies.get_mut(level) else { return Ok(()) };
        for (region, (start, _)) in copy.regions.iter_mut().zip(&self.regions) {
            for page in pages(&region.differs) {
                let at = page.saturating_mul(PAGE);
                let Some(to) = region.bytes.get_mut(at..at.saturating_add(PAGE)) else { continue };
                self.memory.read_slice(to, address(*start, page)).map_err(|_| lost(*start))?;
            }
            region.differs.fill(0);
        }
        Ok(())
    }

    /// Makes RAM what it was when copy number `level` was taken.
    pub(crate) fn go_back(&mut self, vm: &Vm, level: usize) -> Result<(), RunError> {
        self.collect_writes(vm)?;
        let count = self.copies.len();
        let (before, rest) = self.copies.split_at_mut(level.min(count));
        let Some((copy, after)) = rest.split_first_mut() else {
            return Err(RunError::BadState(format!("there is no copy number {level} of guest memory")));
        };
        for (index, (region, (start, _))) in copy.regions.iter_mut().zip(&self.regions).enumerate() {
            for page in pages(&region.differs) {
                let at = page.saturating_mul(PAGE);
                let Some(from) = region.bytes.get(at..at.saturating_add(PAGE)) else { continue };
                self.memory.write_slice(from, address(*start, page)).map_err(|_| lost(*start))?;
            }
            // The pages that were just written may differ from the other copies.
            for other in before.iter_mut().chain(after.iter_mut()).filter_map(|copy| copy.regions.get_mut(index)) {
                merge(&mut other.differs, &region.differs);
            }
            region.differs.fill(0);
        }
        // Not from this one.
        self.memory.iter().for_each(|ram| drop(write_log(ram).take()));
        Ok(())
    }

    /// Whether RAM is equal to copy number `level`. Compares every byte.
    pub(crate) fn is(&self, level: usize) -> bool {
        let Some(copy) = self.copies.get(level) else { return false };
        let mut now = [0; PAGE];
        copy.regions.iter().zip(&self.regions).all(|(region, (start, _))| {
            region.bytes.chunks(PAGE).enumerate().all(|(page, then)| {
                let Some(now) = now.get_mut(..then.len()) else { return false };
                self.memory.read_slice(now, address(*start, page)).is_ok() && now == then
            })
        })
    }

    /// Adds the pages that were written since the last call to every copy's set.
    fn collect_writes(&mut self, vm: &Vm) -> Result<(), RunError> {
        for ((index, ram), (_, bytes)) in (0u32..).zip(self.memory.iter()).zip(&self.regions) {
            let mut written = vm.take_dirty_pages(index, *bytes)?;
            merge(&mut written, &write_log(ram).take());
            let position = usize::try_from(index).unwrap_or(usize::MAX);
            for region in self.copies.iter_mut().filter_map(|copy| copy.regions.get_mut(position)) {
                merge(&mut region.differs, &written);
            }
        }
        Ok(())
    }

    fn whole_copy(&self) -> Result<Copy, RunError> {
        let mut regions = Vec::new();
        for (start, size) in &self.regions {
            let mut bytes = Vec::new();
            bytes.try_reserve_exact(*size).map_err(|_| RunError::Copy(*size))?;
            bytes.resize(*size, 0);
            self.memory.read_slice(&mut bytes, *start).map_err(|_| lost(*start))?;
            regions.push(Region { bytes, differs: vec![0; size.div_ceil(PAGE * 64)] });
        }
        Ok(Copy { regions })
    }
}

fn address(start: GuestAddress, page: usize) -> GuestAddress {
    let offset = u64::try_from(page).unwrap_or(u64::MAX).saturating_mul(PAGE_U64);
    GuestAddress(start.0.saturating_add(offset))
}

fn lost(start: GuestAddress) -> RunError {
    RunError::BadState(format!("guest memory at {:#x} cannot be copied", start.0))
}

fn merge(into: &mut [u64], from: &[u64]) {
    for (to, from) in into.iter_mut().zip(from) {
        *to |= from;
    }
}

/// The numbers of the bits that are set.
fn pages(bits: &[u64]) -> impl Iterator<Item = usize> {
    bits.iter().enumerate().filter(|(_, word)| **word != 0).flat_map(|(index, word)| {
        let word = *word;
        (0..64).filter(move |bit| word & 1 << bit != 0).map(move |bit| index.saturating_mul(64).saturating_add(bit))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_pages() {
        assert_eq!(pages(&[0, 1 << 63 | 1, 2]).collect::<Vec<_>>(), [64, 127, 129]);
        assert_eq!(pages(&[]).count(), 0);
    }
}
