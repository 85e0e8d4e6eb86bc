//! The checksums of a `memory` file, of the whole and by block. Writer and reader use the same code.

use super::{Blocks, MemoryLayout, PAGE, ZERO_PAGE};

/// Counts the pages that are not zero, and computes their checksums. Pages must be added in file order.
pub(super) struct Sums {
    block_bytes: u64,
    pages: u64,
    blocks: Vec<(u64, u32)>,
    /// The checksum of all completed blocks.
    all: crc32fast::Hasher,
    /// The block of the last page, which is not completed, and its checksum so far.
    present: Option<(u64, crc32fast::Hasher)>,
}

impl Sums {
    /// The checksums of no pages yet, for blocks of `block_bytes`.
    pub(super) fn of_blocks(block_bytes: u64) -> Self {
        Self { block_bytes, pages: 0, blocks: Vec::new(), all: crc32fast::Hasher::new(), present: None }
    }

    /// Adds the page at `offset` in the file. Returns whether it has a byte that is not zero.
    pub(super) fn page(&mut self, offset: u64, page: &[u8]) -> bool {
        // One comparison of slices is a memcmp, which beats a loop over bytes in builds of every kind.
        if page == ZERO_PAGE.as_slice() {
            return false;
        }
        self.pages = self.pages.saturating_add(1);
        let block = offset.checked_div(self.block_bytes).unwrap_or(0);
        if self.present.as_ref().is_none_or(|(present, _)| *present != block) {
            self.end_block();
        }
        let (_, crc) = self.present.get_or_insert_with(|| (block, crc32fast::Hasher::new()));
        crc.update(&(offset / PAGE).to_le_bytes());
        crc.update(page);
        true
    }

    /// The block of the last page that is not zero.
    pub(super) fn present_block(&self) -> Option<u64> {
        self.present.as_ref().map(|(block, _)| *block)
    }

    fn end_block(&mut self) {
        let Some((block, crc)) = self.present.take() else { return };
        self.all.combine(&crc);
        self.blocks.push((block, crc.finalize()));
    }

    /// The number and checksum of the block, if all pages were in one; none if all pages were zero.
    pub(super) fn of_block(mut self) -> Option<(u64, u32)> {
        self.end_block();
        self.blocks.first().copied()
    }

    /// Stores the number of pages and the checksums in `layout`.
    pub(super) fn describe(mut self, layout: &mut MemoryLayout) {
        self.end_block();
        layout.pages = self.pages;
        layout.checksum = self.all.finalize();
        layout.blocks = Blocks { bytes: self.block_bytes, of: layout.checksum, sums: self.blocks };
    }

    /// Whether `layout` has the same checksums for the blocks before number `end`, or for all if that is none.
    pub(super) fn are_those_of(mut self, layout: &MemoryLayout, end: Option<u64>) -> bool {
        self.end_block();
        let sums = &layout.blocks.sums;
        let before = end.map_or(sums.len(), |end| sums.partition_point(|(block, _)| *block < end));
        let blocks = !layout.has_blocks() || sums.get(..before) == Some(self.blocks.as_slice());
        blocks && (end.is_some() || (self.pages, self.all.finalize()) == (layout.pages, layout.checksum))
    }
}
