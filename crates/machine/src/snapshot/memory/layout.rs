//! The guest addresses that the `memory` file holds, and its checksums.

use serde::{Deserialize, Serialize};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::{MemoryError, PAGE};
use crate::mem::ram::GuestRam;

/// The most regions that a layout may have. A VM has one, or two around the hole below 4 GiB.
pub const MAX_REGIONS: usize = 16;
/// The smallest block that has a checksum of its own, in bytes. Reading and checking one takes some 20 µs, about as
/// long as the page fault that requests it.
const SMALLEST_BLOCK: u64 = 16 * PAGE;
/// The most blocks that a file has: larger files have larger ones, so that their checksums stay few.
const MOST_BLOCKS: u64 = 16_384;
/// No guest physical address reaches this: x86-64 has at most 52 address bits.
pub const GUEST_ADDRESS_END: u64 = 1 << 52;

/// The range in which no RAM may be: from the local APICs' page up to 4 GiB. It also has the pages that KVM uses for
/// real mode.
const DEVICES_START: u64 = 0xfee0_0000;
const DEVICES_END: u64 = 1 << 32;

/// Where guest RAM is in the `memory` file, and the checksums of its content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryLayout {
    /// The regions, by rising guest address, without gaps in the file.
    pub regions: Vec<RegionLayout>,
    /// How many pages of [`PAGE_BYTES`](super::PAGE_BYTES) have a byte that is not zero.
    pub pages: u64,
    /// CRC-32 (IEEE) over those pages in file order, each preceded by its index in the file as a little-endian u64.
    pub checksum: u32,
    /// The checksums of the file's blocks.
    pub blocks: Blocks,
}

/// Checksums of the parts of a `memory` file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Blocks {
    /// The size of a block in bytes, a power of two.
    pub bytes: u64,
    /// The checksum of the file that the blocks' checksums belong to.
    pub of: u32,
    /// The blocks with pages that are not zero, in rising order: number, and checksum, computed as that of the file.
    pub sums: Vec<(u64, u32)>,
}

/// One contiguous piece of guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegionLayout {
    /// The guest physical address of its first byte.
    pub guest_base: u64,
    /// Its size in bytes, a multiple of [`PAGE_BYTES`](super::PAGE_BYTES).
    pub bytes: u64,
    /// Where in the file it begins, in bytes.
    pub file_offset: u64,
}

impl MemoryLayout {
    /// The layout of `memory`, with nothing in it yet.
    pub(crate) fn of(memory: &GuestRam) -> Self {
        let mut file_offset = 0u64;
        let regions = memory
            .iter()
            .map(|region| {
                let layout = RegionLayout { guest_base: region.start_addr().0, bytes: region.len(), file_offset };
                file_offset = file_offset.saturating_add(region.len());
                layout
            })
            .collect();
        let blocks = Blocks { bytes: block_bytes(file_offset), of: 0, sums: Vec::new() };
        Self { regions, pages: 0, checksum: 0, blocks }
    }

    /// The guest physical address of page number `page`, if that and the `pages - 1` behind it are in one region.
    pub(crate) fn address_of(&self, page: u64, pages: u64) -> Option<u64> {
        let (at, bytes) = (page.checked_mul(PAGE)?, pages.checked_mul(PAGE)?);
        let inside =
            |place: &&RegionLayout| at.checked_sub(place.file_offset).is_some_and(|inside| inside < place.bytes);
        let place = self.regions.iter().find(inside)?;
        let inside = at.checked_sub(place.file_offset)?;
        (inside.checked_add(bytes)? <= place.bytes).then(|| place.guest_base.checked_add(inside)).flatten()
    }

    /// Whether the blocks' checksums belong to the file's. A tool that edits a snapshot may have updated only the
    /// file's checksum; the blocks' are then not used.
    #[must_use]
    pub fn has_blocks(&self) -> bool {
        self.blocks.of == self.checksum
    }

    /// The size that the file must have, in bytes.
    ///
    /// # Errors
    /// [`MemoryError::Layout`] if there are no regions or too many; if one is empty, not whole pages, overlaps another,
    /// is beyond [`GUEST_ADDRESS_END`] or where the local APICs are, or does not follow the one before it in the file;
    /// or if the blocks are not possible.
    pub fn file_bytes(&self) -> Result<u64, MemoryError> {
        let wrong = |reason: String| Err(MemoryError::Layout { reason });
        if self.regions.is_empty() || self.regions.len() > MAX_REGIONS {
            return wrong(format!("{} regions, not 1 to {MAX_REGIONS}", self.regions.len()));
        }
        let (mut file_bytes, mut guest_end) = (0u64, 0u64);
        for RegionLayout { guest_base, bytes, file_offset } in self.regions.iter().copied() {
            if bytes == 0 || bytes % PAGE != 0 || guest_base % PAGE != 0 {
                return wrong(format!("a region at {guest_base:#x} of {bytes} bytes is not whole pages"));
            }
            if guest_base < guest_end {
                return wrong(format!("the region at {guest_base:#x} overlaps the one before it"));
            }
            guest_end = match guest_base.checked_add(bytes) {
                Some(end) if end <= GUEST_ADDRESS_END => end,
                _ => return wrong(format!("a region at {guest_base:#x} of {bytes} bytes ends beyond 52 address bits")),
            };
            if guest_base < DEVICES_END && guest_end > DEVICES_START {
                return wrong(format!(
                    "a region at {guest_base:#x} of {bytes} bytes covers addresses from {DEVICES_START:#x} to \
                     {DEVICES_END:#x}, where the local APICs are"
                ));
            }
            if file_offset != file_bytes {
                return wrong(format!("a region is at {file_offset} in the file, expected {file_bytes}"));
            }
            // No overflow: disjoint ranges below 2^52.
            file_bytes = file_bytes.saturating_add(bytes);
        }
        self.check_blocks(file_bytes)?;
        Ok(file_bytes)
    }

    fn check_blocks(&self, file_bytes: u64) -> Result<(), MemoryError> {
        let wrong = |reason: String| Err(MemoryError::Layout { reason });
        let Blocks { bytes: block_bytes, of: _, sums } = &self.blocks;
        if !block_bytes.is_power_of_two() || *block_bytes < SMALLEST_BLOCK {
            return wrong(format!("blocks of {block_bytes} bytes"));
        }
        let blocks = file_bytes.div_ceil(*block_bytes);
        if blocks > MOST_BLOCKS {
            return wrong(format!("{blocks} blocks, not at most {MOST_BLOCKS}"));
        }
        let rising = sums.is_sorted_by(|(one, _), (next, _)| one < next);
        if !rising || sums.last().is_some_and(|(last, _)| *last >= blocks) {
            return wrong(format!("the checksums are not those of {blocks} blocks in their order"));
        }
        Ok(())
    }
}

/// The size of the blocks of a file of `file_bytes`.
pub(super) fn block_bytes(file_bytes: u64) -> u64 {
    let least = file_bytes.div_ceil(MOST_BLOCKS).max(SMALLEST_BLOCK);
    least.checked_next_power_of_two().unwrap_or(SMALLEST_BLOCK)
}
