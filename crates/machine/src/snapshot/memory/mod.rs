//! The `memory` file: guest RAM, byte for byte, with holes where it is zero.
//!
//! Regions follow one another in the order of their guest addresses. Only pages that are not zero are written, so that
//! a guest that uses 3 MiB of 128 MiB takes 3 MiB of disk. A copy in which the holes are filled is still the same
//! snapshot. The file has no header, because it is mapped into the restored VM as it is. [`MemoryLayout`] has the
//! checksums; it is a section of the `state` file, which thereby belongs to this `memory` file only.

mod error;
mod layout;
mod sums;
#[cfg(test)]
mod tests;
mod touched;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use libc::{MAP_NORESERVE, MAP_PRIVATE, PROT_READ, PROT_WRITE, off_t};
use nix::{
    errno::Errno,
    unistd::{Whence, lseek},
};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress, MmapRegion};

use self::sums::Sums;
use super::saving::Progress;
use crate::{
    host::writeback::begin_writeback,
    mem::{
        pages::PageSet,
        ram::{GuestRam, RamRegion},
    },
};

pub use error::MemoryError;
pub use layout::{Blocks, GUEST_ADDRESS_END, MAX_REGIONS, MemoryLayout, RegionLayout};

/// The unit in which RAM is written and checked, in bytes.
pub const PAGE_BYTES: usize = 4096;
const PAGE: u64 = 4096;
const ZERO_PAGE: [u8; PAGE_BYTES] = [0; PAGE_BYTES];
/// How much is read at once, in bytes: enough to make system calls rare, small enough to stay in the cache.
pub(crate) const CHUNK_BYTES: usize = 64 * PAGE_BYTES;

/// The pages of guest RAM that may hold a byte that is not zero, by their index in the file. See `touched.rs` for how
/// they are found without reading RAM.
///
/// # Errors
/// The layout is impossible.
pub fn in_use(memory: &GuestRam) -> Result<PageSet, MemoryError> {
    let layout = MemoryLayout::of(memory);
    touched::pages(memory, &layout, Path::new(touched::PAGEMAP))
}

/// Writes those pages of guest RAM that are in `pages` and not zero into `file`, which is empty and named `path` in
/// errors. No vCPU may run meanwhile.
///
/// # Errors
/// RAM cannot be read, is not whole pages, or the file cannot be written.
pub fn write(
    file: &File,
    path: &Path,
    memory: &GuestRam,
    pages: &PageSet,
    progress: &Progress,
) -> Result<MemoryLayout, MemoryError> {
    let mut layout = MemoryLayout::of(memory);
    let total = layout.file_bytes()?;
    let io = |source| MemoryError::Io { path: path.to_owned(), action: "write", source };
    file.set_len(total).map_err(io)?;
    let mut sums = Sums::of_blocks(layout.blocks.bytes);
    progress.begin(pages.runs().map(|run| bytes(run.len())).sum::<u64>().saturating_mul(2));
    for_each_piece(memory, &layout, pages, |piece, chunk| {
        piece.read(chunk)?;
        write_chunk(file, chunk, piece.at, &mut sums).map_err(io)?;
        progress.advance(length(chunk))
    })?;
    begin_writeback(file);
    sums.describe(&mut layout);
    Ok(layout)
}

/// How many pages a file of this layout has.
///
/// # Errors
/// The layout is impossible.
pub fn pages(layout: &MemoryLayout) -> Result<usize, MemoryError> {
    Ok(page(layout.file_bytes()?))
}

/// Pages that follow one another in one region.
pub(crate) struct Piece<'a> {
    region: &'a RamRegion,
    place: &'a RegionLayout,
    /// Where in the region it begins, in bytes.
    inside: u64,
    /// Where in the file it begins, in bytes.
    at: u64,
}

impl Piece<'_> {
    /// The number of its first page.
    pub(crate) fn page(&self) -> u64 {
        self.at / PAGE
    }

    /// Fills `chunk`, which has its size, with its content. The guest may change it meanwhile.
    pub(crate) fn read(&self, chunk: &mut [u8]) -> Result<(), MemoryError> {
        let Self { region, place, inside, at: _ } = *self;
        let guest = |source| MemoryError::Guest { address: place.guest_base.saturating_add(inside), source };
        region.get_slice(MemoryRegionAddress(inside), chunk.len()).map_err(guest)?.copy_to(chunk);
        Ok(())
    }
}

/// Calls `handle` for `pages` in pieces of at most [`CHUNK_BYTES`], in file order, each with a buffer of its size.
pub(crate) fn for_each_piece<E>(
    memory: &GuestRam,
    layout: &MemoryLayout,
    pages: &PageSet,
    mut handle: impl FnMut(Piece<'_>, &mut [u8]) -> Result<(), E>,
) -> Result<(), E> {
    let mut buffer = vec![0; CHUNK_BYTES];
    for run in pages.runs() {
        let (mut at, end) = (bytes(run.start), bytes(run.end));
        while at < end {
            // Regions follow one another, so `at` is in the first region that ends after it.
            let mut regions = memory.iter().zip(&layout.regions);
            let found = regions.find(|(_, place)| at < place.file_offset.saturating_add(place.bytes));
            let Some((region, place)) = found else { break };
            let inside = at.saturating_sub(place.file_offset);
            let chunk = take(&mut buffer, (end - at).min(place.bytes.saturating_sub(inside)));
            let length = length(chunk);
            handle(Piece { region, place, inside, at }, chunk)?;
            at = at.saturating_add(length);
        }
    }
    Ok(())
}

/// Writes the pages of `chunk` that are not zero, consecutive pages with one call.
fn write_chunk(file: &File, chunk: &[u8], at: u64, sums: &mut Sums) -> io::Result<()> {
    let mut unwritten = 0..0usize;
    let flush = |range: std::ops::Range<usize>| match chunk.get(range.clone()) {
        Some(bytes) if !bytes.is_empty() => {
            file.write_all_at(bytes, at.saturating_add(u64::try_from(range.start).unwrap_or(u64::MAX)))
        }
        _ => Ok(()),
    };
    for (page, start) in chunk.chunks(PAGE_BYTES).zip((0..).step_by(PAGE_BYTES)) {
        let end = start + page.len();
        if sums.page(at.saturating_add(u64::try_from(start).unwrap_or(u64::MAX)), page) {
            unwritten.end = end;
        } else {
            flush(unwritten)?;
            unwritten = end..end;
        }
    }
    flush(unwritten)
}

/// Checks that `file` has the size that `layout` says, without reading it.
///
/// # Errors
/// The layout is impossible, or the file has another size.
pub fn check_size(file: &File, path: &Path, layout: &MemoryLayout) -> Result<(), MemoryError> {
    let expected = layout.file_bytes()?;
    let io = |source| MemoryError::Io { path: path.to_owned(), action: "read", source };
    let found = file.metadata().map_err(io)?.len();
    if found < expected {
        return Err(MemoryError::Truncated { path: path.to_owned(), found, expected });
    }
    if found > expected {
        return Err(MemoryError::TooLong { path: path.to_owned(), found, expected });
    }
    Ok(())
}

/// Checks that `file` holds exactly what `layout` was made from. Reads data only: holes are known to be zero.
///
/// # Errors
/// As [`check_size`], or the file has other content, or cannot be read.
pub fn verify(file: &File, path: &Path, layout: &MemoryLayout) -> Result<(), MemoryError> {
    check_size(file, path, layout)?;
    let expected = layout.file_bytes()?;
    let io = |source| MemoryError::Io { path: path.to_owned(), action: "read", source };
    let mut sums = Sums::of_blocks(layout.blocks.bytes);
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut at = 0;
    while let Some((start, end)) = next_data(file, at, expected).map_err(io)? {
        at = start;
        while at < end {
            let chunk = take(&mut buffer, end - at);
            file.read_exact_at(chunk, at).map_err(io)?;
            for (page, offset) in chunk.chunks(PAGE_BYTES).zip((at..).step_by(PAGE_BYTES)) {
                sums.page(offset, page);
            }
            at = at.saturating_add(length(chunk));
        }
    }
    if sums.are_those_of(layout, None) { Ok(()) } else { Err(MemoryError::Damaged { path: path.to_owned() }) }
}

/// Checks `memory`, which is mapped from `file` and was not written to, against the checksums in `layout`. It begins at
/// the start of RAM, and ends at the end of the block in which `most` bytes were read. Returns the number of the first
/// block that was not checked, or none.
///
/// # Errors
/// The checksums differ, or the file system cannot report where the file has data.
pub fn check_mapped(
    memory: &GuestRam,
    file: &File,
    path: &Path,
    layout: &MemoryLayout,
    most: u64,
) -> Result<Option<u64>, MemoryError> {
    let io = |source| MemoryError::Io { path: path.to_owned(), action: "read", source };
    let total = layout.file_bytes()?;
    let mut sums = Sums::of_blocks(layout.blocks.bytes);
    // One page at a time: fresh memory for a larger buffer would cost more than larger reads save.
    let mut page = ZERO_PAGE;
    let (mut at, mut read, mut rest) = (0, 0_u64, None);
    'data: while let Some((start, end)) = next_data(file, at, total).map_err(io)? {
        for offset in (start..end).step_by(PAGE_BYTES) {
            let block = offset.checked_div(layout.blocks.bytes).unwrap_or(0);
            if read >= most && sums.present_block() != Some(block) {
                rest = Some(block);
                break 'data;
            }
            let (region, inside) = locate(memory, layout, offset)?;
            let guest = |source| MemoryError::Guest { address: region.start_addr().0.saturating_add(inside), source };
            region.get_slice(MemoryRegionAddress(inside), PAGE_BYTES).map_err(guest)?.copy_to(&mut page);
            sums.page(offset, &page);
            read = read.saturating_add(PAGE);
        }
        at = end;
    }
    if sums.are_those_of(layout, rest) { Ok(rest) } else { Err(MemoryError::Damaged { path: path.to_owned() }) }
}

/// Where `offset` in the file is in guest RAM: the region, and the byte in it.
fn locate<'a>(memory: &'a GuestRam, layout: &MemoryLayout, offset: u64) -> Result<(&'a RamRegion, u64), MemoryError> {
    // Regions follow one another, so `offset` is in the first region that ends after it.
    let has = |(_, place): &(_, &RegionLayout)| offset < place.file_offset.saturating_add(place.bytes);
    let found = memory.iter().zip(&layout.regions).find(has);
    let located = found.map(|(region, place)| (region, offset.saturating_sub(place.file_offset)));
    located.ok_or_else(|| MemoryError::Layout { reason: format!("no region has what is at {offset} in the file") })
}

/// Writes the page that is at `offset` in the file into guest RAM.
///
/// # Errors
/// RAM has another layout.
pub fn write_page(memory: &GuestRam, layout: &MemoryLayout, offset: u64, page: &[u8]) -> Result<(), MemoryError> {
    let (region, inside) = locate(memory, layout, offset)?;
    let guest = |source| MemoryError::Guest { address: region.start_addr().0.saturating_add(inside), source };
    region.get_slice(MemoryRegionAddress(inside), page.len()).map_err(guest)?.copy_from(page);
    Ok(())
}

/// Reads the given `pages` of a block of `file` into `buffer`, in order, and checks the block. `pages` are page numbers
/// in the file, in rising order; all other pages of the block are known to be zero.
///
/// # Errors
/// The block's checksum differs, or the pages cannot be read.
pub fn read_block(
    file: &File,
    path: &Path,
    layout: &MemoryLayout,
    block: u64,
    pages: &[std::ops::Range<usize>],
    buffer: &mut Vec<u8>,
) -> Result<(), MemoryError> {
    let mut sums = Sums::of_blocks(layout.blocks.bytes);
    buffer.resize(pages.iter().map(std::ops::Range::len).sum::<usize>().saturating_mul(PAGE_BYTES), 0);
    let mut rest = buffer.as_mut_slice();
    for run in pages {
        let (chunk, behind) = rest.split_at_mut(run.len().saturating_mul(PAGE_BYTES).min(rest.len()));
        if let Err(source) = file.read_exact_at(chunk, bytes(run.start)) {
            // If the file became shorter, that is the better message.
            check_size(file, path, layout)?;
            return Err(MemoryError::Io { path: path.to_owned(), action: "read", source });
        }
        for (page, offset) in chunk.chunks(PAGE_BYTES).zip((bytes(run.start)..).step_by(PAGE_BYTES)) {
            sums.page(offset, page);
        }
        rest = behind;
    }
    let listed = &layout.blocks.sums;
    let place = listed.binary_search_by_key(&block, |(block, _)| *block);
    let expected = place.ok().and_then(|place| listed.get(place));
    // If blocks have no checksums, all of the file was checked before.
    if !layout.has_blocks() || sums.of_block().as_ref() == expected {
        Ok(())
    } else {
        Err(MemoryError::Damaged { path: path.to_owned() })
    }
}

/// Whether `file` is known to have no data in `range`.
pub fn is_hole(file: &File, range: std::ops::Range<u64>) -> bool {
    next_data(file, range.start, range.end).is_ok_and(|data| data.is_none_or(|(start, _)| start >= range.end))
}

/// The next range at or after `at` that may hold data, widened to whole pages; none when only zeros are left.
fn next_data(file: &File, at: u64, end: u64) -> io::Result<Option<(u64, u64)>> {
    if at >= end {
        return Ok(None);
    }
    let seek = |from: u64, whence| -> nix::Result<u64> {
        let from = off_t::try_from(from).map_err(|_| Errno::EOVERFLOW)?;
        u64::try_from(lseek(file, from, whence)?).map_err(|_| Errno::EOVERFLOW)
    };
    let start = match seek(at, Whence::SeekData) {
        Ok(start) => start,
        // lseek(2): "or there are no more data past offset".
        Err(Errno::ENXIO) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    };
    let stop = seek(start, Whence::SeekHole)?;
    // A file system may use smaller blocks than our pages. `at` is a page boundary, so rounding down does not go below
    // it.
    let stop = stop.checked_next_multiple_of(PAGE).unwrap_or(end).min(end);
    Ok(Some((start - start % PAGE, stop)))
}

/// Maps `file` as guest RAM; checks its size, but not its content. The guest's writes stay in this process. Pages that
/// it has not written are read from the file as long as the VM exists, so the file must not be changed in place.
/// (Another snapshot that is saved under the same name is another file, and changes nothing.)
///
/// # Errors
/// As [`check_size`], or the host cannot map the file.
pub fn map(file: &Arc<File>, path: &Path, layout: &MemoryLayout) -> Result<GuestRam, MemoryError> {
    check_size(file, path, layout)?;
    let map_region = |region: &RegionLayout| {
        let io = |source| MemoryError::Io { path: path.to_owned(), action: "map", source };
        let bytes = usize::try_from(region.bytes).map_err(|_| io(io::ErrorKind::OutOfMemory.into()))?;
        let place = FileOffset::from_arc(Arc::clone(file), region.file_offset);
        // NORESERVE as for RAM of a fresh VM: most of it is never written.
        let mapping = MmapRegion::build(Some(place), bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE)
            .map_err(|error| io(io::Error::other(error)))?;
        RamRegion::new(mapping, GuestAddress(region.guest_base))
            .ok_or_else(|| MemoryError::Layout { reason: "a region ends beyond the address space".to_owned() })
    };
    let regions = layout.regions.iter().map(map_region).collect::<Result<Vec<_>, _>>()?;
    Ok(GuestRam::from_regions(regions)?)
}

/// The front of `buffer`, at most `left` bytes of it.
fn take(buffer: &mut [u8], left: u64) -> &mut [u8] {
    let bytes = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
    buffer.split_at_mut(bytes).0
}

/// Where page number `page` begins in a file.
pub(super) fn bytes(page: usize) -> u64 {
    u64::try_from(page).unwrap_or(u64::MAX).saturating_mul(PAGE)
}

/// The number of the page that begins at or before `offset`.
fn page(offset: u64) -> usize {
    usize::try_from(offset / PAGE).unwrap_or(usize::MAX)
}

fn length(chunk: &[u8]) -> u64 {
    u64::try_from(chunk.len()).unwrap_or(u64::MAX)
}
