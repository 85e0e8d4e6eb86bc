//! The checksums of a `memory` file, block by block, for the writer and the reader alike.

use super::{PAGE, ZERO_PAGE};

/// Counts and sums up pages that are not zero. They come in file order.
pub(super) struct Sums {
    block_bytes: u64,
    pages: u64,
    blocks: Vec<(u64, u32)>,
    /// The block that the last page was in.
    present: Option<(u64, crc32fast::Hasher)>,
}

impl Sums {
    /// Of no page yet, in blocks of `block_bytes`.
    pub(super) fn of_blocks(block_bytes: u64) -> Self {
        Self { block_bytes, pages: 0, blocks: Vec::new(), present: None }
    }

    /// Takes the page at `offset` in the file; says whether it has a byte that is not zero.
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

    /// The block that the last page that is not zero was in.
    pub(super) fn present_block(&self) -> Option<u64> {
        self.present.as_ref().map(|(block, _)| *block)
    }

    fn end_block(&mut self) {
        self.blocks.extend(self.present.take().map(|(block, crc)| (block, crc.finalize())));
    }

    /// How many pages there were, and each block that had some with its sum.
    pub(super) fn finish(mut self) -> (u64, Vec<(u64, u32)>) {
        self.end_block();
        (self.pages, self.blocks)
    }
}
