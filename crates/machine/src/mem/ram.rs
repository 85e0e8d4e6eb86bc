//! Guest RAM: anonymous memory below and above the MMIO hole, with a log of the pages that the VMM writes.

use std::{num::NonZeroUsize, sync::OnceLock};

use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
    bitmap::{AtomicBitmap, BS, Bitmap, NewBitmap, WithBitmapSlice},
};

use crate::blame::{Blame, Blamed};

/// Guest RAM.
pub type GuestRam = GuestMemoryMmap<WriteLog>;
/// One region of guest RAM.
pub type RamRegion = GuestRegionMmap<WriteLog>;

/// The MMIO hole, which contains the LAPIC's page: its first address, and the one after its end.
const HOLE_START: u64 = 0xc000_0000;
const HOLE_END: u64 = 0x1_0000_0000;
/// The unit in which RAM is allocated and writes are logged, in bytes.
const PAGE: u64 = 4096;
const PAGE_BYTES: NonZeroUsize = NonZeroUsize::new(4096).unwrap();

/// Guest RAM cannot be allocated.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// Too small, too large or not whole pages.
    #[error("a memory size of {0} bytes is not possible: use whole pages, from 2M to 1T")]
    Size(u64),
    /// The host refuses the mapping.
    #[error("the host cannot provide {bytes} bytes of guest memory: {reason}; use a smaller --memory")]
    Mapping {
        /// Size asked for.
        bytes: u64,
        /// Why mmap failed.
        reason: String,
    },
}

impl Blamed for RamError {
    fn blame(&self) -> Blame {
        match self {
            Self::Size(_) => Blame::Usage,
            Self::Mapping { .. } => Blame::Host,
        }
    }
}

/// The log of the VMM's writes into `region`.
#[must_use]
pub fn write_log(region: &RamRegion) -> &WriteLog {
    // The trait has a method of the same name, but that returns a slice, with which pages can only be marked.
    let mapping: &MmapRegion<WriteLog> = region;
    mapping.bitmap()
}

/// A log of the pages of a region that the VMM writes, kept from [`Self::begin`] on. KVM's dirty log has only the pages
/// that the guest wrote. Every write through vm-memory is logged, on any thread.
#[derive(Debug, Default)]
pub struct WriteLog {
    bytes: usize,
    /// Set once by `begin`.
    log: OnceLock<AtomicBitmap>,
}

impl WriteLog {
    /// Begins to log writes.
    pub fn begin(&self) {
        self.log.get_or_init(|| AtomicBitmap::new(self.bytes, PAGE_BYTES));
    }

    /// The pages written since the last call, one bit each; empty if the log was not begun.
    #[must_use]
    pub fn take(&self) -> Vec<u64> {
        self.log.get().map(AtomicBitmap::get_and_reset).unwrap_or_default()
    }
}

impl<'a> WithBitmapSlice<'a> for WriteLog {
    type S = Option<BS<'a, AtomicBitmap>>;
}

impl Bitmap for WriteLog {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if let Some(log) = self.log.get() {
            log.mark_dirty(offset, len);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.log.get().is_some_and(|log| log.dirty_at(offset))
    }

    fn slice_at(&self, offset: usize) -> BS<'_, Self> {
        self.log.get().map(|log| log.slice_at(offset))
    }
}

impl NewBitmap for WriteLog {
    fn with_len(bytes: usize) -> Self {
        Self { bytes, log: OnceLock::new() }
    }
}

/// `bytes` of zeroed RAM from address 0, continued at 4 GiB where it would reach the MMIO hole.
///
/// # Errors
/// [`RamError`].
pub fn allocate(bytes: u64) -> Result<GuestRam, RamError> {
    if !(2 << 20..=1 << 40).contains(&bytes) || !bytes.is_multiple_of(PAGE) {
        return Err(RamError::Size(bytes));
    }
    let low = bytes.min(HOLE_START);
    let mut ranges = vec![(GuestAddress(0), low)];
    if bytes > low {
        ranges.push((GuestAddress(HOLE_END), bytes - low));
    }
    let ranges: Result<Vec<_>, _> =
        ranges.into_iter().map(|(base, size)| usize::try_from(size).map(|size| (base, size))).collect();
    let ranges = ranges.map_err(|_| RamError::Size(bytes))?;
    GuestRam::from_ranges(&ranges).map_err(|error| RamError::Mapping { bytes, reason: error.to_string() })
}

/// RAM with the same content as `ram`, at the same addresses. Pages of zeros take no memory.
///
/// # Errors
/// [`RamError::Mapping`].
pub fn copy(ram: &GuestRam) -> Result<GuestRam, RamError> {
    let mut ranges = Vec::new();
    let mut bytes = 0u64;
    for region in ram.iter() {
        bytes = bytes.saturating_add(region.len());
        ranges.push((region.start_addr(), usize::try_from(region.len()).map_err(|_| RamError::Size(region.len()))?));
    }
    let refused = |reason: String| RamError::Mapping { bytes, reason };
    let copy = GuestRam::from_ranges(&ranges).map_err(|error| refused(error.to_string()))?;
    let mut page = [0; 4096];
    for (start, len) in ranges {
        for offset in (0..u64::try_from(len).unwrap_or(u64::MAX)).step_by(page.len()) {
            let address = GuestAddress(start.0.saturating_add(offset));
            ram.read_slice(&mut page, address).map_err(|error| refused(error.to_string()))?;
            if page.iter().any(|byte| *byte != 0) {
                copy.write_slice(&page, address).map_err(|error| refused(error.to_string()))?;
            }
        }
    }
    Ok(copy)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;
    use crate::blame::tests::all_blame;

    // Catches: a size that no VM can have, reported as a host that lacks memory, and the other way round.
    #[test]
    fn a_size_is_the_users_and_memory_the_hosts() {
        all_blame(Blame::Usage, [RamError::Size(1)]);
        all_blame(Blame::Host, [RamError::Mapping { bytes: 1, reason: String::new() }]);
    }

    // Catches: a copy that lacks a region or a page, has one at another address, or shares memory with the original.
    #[test]
    fn a_copy_is_the_same_and_apart() {
        let ranges = [(GuestAddress(0x1_0000), 0x3000), (GuestAddress(HOLE_END), 0x2000)];
        let ram = GuestRam::from_ranges(&ranges).unwrap();
        let marks = [(0x1_0000, 1u8), (0x1_2fff, 2), (HOLE_END + 0x1800, 3)];
        for (address, mark) in marks {
            ram.write_obj(mark, GuestAddress(address)).unwrap();
        }
        let copy = copy(&ram).unwrap();
        ram.write_obj(9u8, GuestAddress(0x1_0000)).unwrap();
        for (start, len) in ranges {
            let mut bytes = vec![0; len];
            copy.read_slice(&mut bytes, start).unwrap();
            let found: Vec<(u64, u8)> = (start.0..).zip(bytes).filter(|(_, byte)| *byte != 0).collect();
            let expected: Vec<(u64, u8)> =
                marks.into_iter().filter(|(at, _)| (start.0..start.0 + len as u64).contains(at)).collect();
            assert_eq!(found, expected);
        }
    }

    // Catches: a way to write guest memory that is not logged, or a page that `take` returns twice.
    #[test]
    fn every_write_is_logged_once_the_log_has_begun() {
        let ram = GuestRam::from_ranges(&[(GuestAddress(0x1_0000), 0x8_0000)]).unwrap();
        let log = write_log(ram.find_region(GuestAddress(0x1_0000)).unwrap());
        ram.write_slice(&[1], GuestAddress(0x1_1000)).unwrap();
        assert!(log.take().is_empty());
        log.begin();
        log.begin();
        assert_eq!(log.take(), [0; 2]);
        ram.write_slice(&[1; 2], GuestAddress(0x1_2fff)).unwrap();
        ram.store(7u32, GuestAddress(0x1_5ffc), Ordering::Release).unwrap();
        ram.write_obj(9u64, GuestAddress(0x5_0000)).unwrap();
        ram.read_slice(&mut [0; 9], GuestAddress(0x1_7000)).unwrap();
        assert_eq!(log.take(), [1 << 2 | 1 << 3 | 1 << 5, 1]);
        assert_eq!(log.take(), [0; 2]);
    }
}
