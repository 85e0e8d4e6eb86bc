//! Finds the pages of guest RAM that may not be zero, without reading RAM.
//!
//! RAM is a private mapping: anonymous in a VM that was booted, of a snapshot's file in one that was restored. A page
//! that was written, by the guest or by the VMM, is an anonymous page, and present or swapped. `/proc/self/pagemap`
//! lists those (Linux `Documentation/admin-guide/mm/pagemap.rst`). A page that was not written is zero, or has the
//! file's content. SEEK_DATA finds the file's data. A page that was only read may be listed, too, which does no harm:
//! the writer skips pages of zeros.
//!
//! If one of the two fails, every page of the region counts as touched: that is slow, but the result is the same.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use libc::MAP_SHARED;
use vm_memory::GuestMemoryBackend;

use super::{MemoryError, MemoryLayout, PAGE_BYTES, RegionLayout, bytes, next_data, page};
use crate::mem::{
    pages::PageSet,
    ram::{GuestRam, RamRegion},
};

/// The file that describes this process' pages.
pub(super) const PAGEMAP: &str = "/proc/self/pagemap";

/// The size of its entries, which are little-endian u64s.
const ENTRY_BYTES: usize = 8;
/// "Bit 63 page present", "Bit 62 page swapped", "Bit 61 page is file-page or shared-anon".
const PRESENT_OR_SWAPPED: u64 = 3 << 62;
const FILE_PAGE: u64 = 1 << 61;
/// How many entries are read at once.
const ENTRIES: usize = 8192;

/// The touched pages of `memory`, by their index in a file of `layout`. `pagemap` is [`PAGEMAP`], but in tests.
pub(super) fn pages(memory: &GuestRam, layout: &MemoryLayout, pagemap: &Path) -> Result<PageSet, MemoryError> {
    let mut set = PageSet::none(page(layout.file_bytes()?));
    let mut entries = vec![0; ENTRIES * ENTRY_BYTES];
    for (region, place) in memory.iter().zip(&layout.regions) {
        let all = page(place.file_offset)..page(place.file_offset.saturating_add(place.bytes));
        let found =
            written(region, &all, pagemap, &mut entries, &mut set).and_then(|()| in_file(region, place, &mut set));
        if let Err(error) = found {
            log::debug!("all of guest memory at {:#x} is read: {error}", place.guest_base);
            set.insert(all);
        }
    }
    Ok(set)
}

/// Adds the pages that were written: anonymous pages of this process.
fn written(
    region: &RamRegion,
    all: &Range<usize>,
    pagemap: &Path,
    entries: &mut [u8],
    set: &mut PageSet,
) -> io::Result<()> {
    // Pages of a shared mapping can hold data without being in this process' page tables.
    if region.flags() & MAP_SHARED != 0 {
        return Err(io::Error::other("it is shared"));
    }
    let file = File::open(pagemap)?;
    let first = region.as_ptr().addr() / PAGE_BYTES;
    let mut done = 0;
    while done < all.len() {
        let count = (all.len() - done).min(entries.len() / ENTRY_BYTES);
        let (entries, _) = entries.split_at_mut(count.saturating_mul(ENTRY_BYTES));
        let offset = first.saturating_add(done).saturating_mul(ENTRY_BYTES);
        file.read_exact_at(entries, u64::try_from(offset).unwrap_or(u64::MAX))?;
        let start = all.start.saturating_add(done);
        let (entries, _) = entries.as_chunks::<ENTRY_BYTES>();
        let mut own = start..start;
        for (number, entry) in (start..).zip(entries.iter().map(|entry| u64::from_le_bytes(*entry))) {
            if entry & PRESENT_OR_SWAPPED == 0 || entry & FILE_PAGE != 0 {
                continue;
            }
            if own.end != number {
                set.insert(own);
                own = number..number;
            }
            own.end = number.saturating_add(1);
        }
        set.insert(own);
        done = done.saturating_add(count);
    }
    Ok(())
}

/// Adds the pages that the file behind `region`, if there is one, has data for.
fn in_file(region: &RamRegion, place: &RegionLayout, set: &mut PageSet) -> io::Result<()> {
    let Some(behind) = region.file_offset() else { return Ok(()) };
    let mut at = behind.start();
    let end = at.saturating_add(place.bytes);
    let number = |offset: u64| page(offset.saturating_sub(behind.start()).saturating_add(place.file_offset));
    while let Some((start, stop)) = next_data(behind.file(), at, end)? {
        set.insert(number(start.max(behind.start()))..number(stop.saturating_add(bytes(1) - 1)));
        at = stop;
    }
    Ok(())
}
