//! Allocation of guest memory while an image is loaded.
//!
//! The kernel's segments have fixed addresses. The rest (boot data, command line, modules) is placed where it overlaps
//! no segment. The upper part of the first megabyte counts as taken: PCs have firmware and video memory there, and no
//! memory map lists it as RAM.

use std::ops::Range;

use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::ImageError;
use crate::{mem::ram::GuestRam, x86::ENTRY_STACK};

/// The first megabyte's RAM ends where the PC's firmware has its extended data area, a KiB below the video memory.
pub(super) const LOW_RAM_END: u64 = 0x9_fc00;
/// The memory map's parts between the first megabyte's RAM and its end, as PCs have them: the extended BIOS data area,
/// and firmware with tables. Video memory, between the two, is in no map: Unikraft adds it, and then allows no overlap.
pub(super) const RESERVED: [Range<u64>; 2] = [LOW_RAM_END..0xa_0000, 0xc_0000..HIGH_RAM_START];
/// Where RAM continues above firmware and video memory.
pub(super) const HIGH_RAM_START: u64 = 0x10_0000;
/// The lowest address for boot data: above the real-mode vectors, the BIOS data, and what real-mode code and the entry
/// stack use.
const BOOT_DATA: u64 = ENTRY_STACK;
/// The longest command line, with its NUL.
pub(super) const CMDLINE_MAX: usize = 0x1_0000;
const PAGE: u64 = 4096;

/// Guest memory, and which parts of it are taken.
#[derive(Clone, Debug)]
pub(super) struct Places<'a> {
    memory: &'a GuestRam,
    taken: Vec<Range<u64>>,
}

impl<'a> Places<'a> {
    /// `memory` with nothing taken but the upper part of the first megabyte.
    pub(super) fn new(memory: &'a GuestRam) -> Self {
        Self { memory, taken: std::iter::once(LOW_RAM_END..HIGH_RAM_START).collect() }
    }

    /// The guest memory.
    pub(super) fn memory(&self) -> &'a GuestRam {
        self.memory
    }

    /// The size of RAM, in bytes.
    pub(super) fn available(&self) -> u64 {
        self.memory.iter().map(GuestMemoryRegion::len).fold(0, u64::saturating_add)
    }

    /// The end of RAM below the MMIO hole.
    pub(super) fn low_end(&self) -> u64 {
        self.memory.iter().next().map_or(0, |region| region.last_addr().raw_value().saturating_add(1))
    }

    /// Whether `size` bytes from `start` are RAM.
    pub(super) fn is_ram(&self, start: u64, size: u64) -> bool {
        start.checked_add(size).is_some()
            && usize::try_from(size).is_ok_and(|size| self.memory.check_range(GuestAddress(start), size))
    }

    /// Whether an image has taken part of `range`, which is in the upper part of the first megabyte.
    pub(super) fn image_is_in(&self, range: &Range<u64>) -> bool {
        self.taken.iter().skip(1).any(|taken| taken.start < range.end && range.start < taken.end)
    }

    /// Marks `size` bytes from `start` as taken.
    pub(super) fn take(&mut self, start: u64, size: u64) {
        if size > 0 {
            self.taken.push(start..start.saturating_add(size));
        }
    }

    /// The end of the highest part that is taken, at least 1 MiB.
    pub(super) fn end(&self) -> u64 {
        self.taken.iter().map(|range| range.end).fold(HIGH_RAM_START, u64::max)
    }

    /// Takes the lowest `size` free bytes of RAM in `within`, aligned to a page.
    pub(super) fn lowest(&mut self, size: u64, within: Range<u64>) -> Option<u64> {
        let mut start = within.start.checked_next_multiple_of(PAGE)?;
        // Each round moves `start` past one of the taken ranges, so that the loop ends.
        while let Some(end) = start.checked_add(size).filter(|end| *end <= within.end) {
            match self.taken.iter().find(|range| range.start < end && start < range.end) {
                Some(range) => start = range.end.checked_next_multiple_of(PAGE)?,
                None if !self.is_ram(start, size) => return None,
                None => {
                    self.take(start, size);
                    return Some(start);
                }
            }
        }
        None
    }

    /// Takes the highest `size` free bytes of RAM below `limit`, aligned to a page.
    pub(super) fn highest(&mut self, size: u64, limit: u64) -> Option<u64> {
        let mut end = limit.min(self.low_end());
        loop {
            let start = end.checked_sub(size)? / PAGE * PAGE;
            let end_of_it = start.saturating_add(size);
            match self.taken.iter().find(|range| range.start < end_of_it && start < range.end) {
                Some(range) => end = range.start.min(end.saturating_sub(1)),
                None => {
                    self.take(start, size);
                    return Some(start);
                }
            }
        }
    }

    /// Takes `size` bytes for boot data: in the first megabyte if they fit, else above everything that is taken.
    pub(super) fn boot_data(&mut self, size: u64) -> Option<u64> {
        self.lowest(size, BOOT_DATA..LOW_RAM_END).or_else(|| self.lowest(size, self.end()..self.low_end()))
    }

    /// The RAM ranges in the guest's memory map.
    pub(super) fn map(&self) -> Vec<Range<u64>> {
        let mut map: Vec<_> = std::iter::once(0..LOW_RAM_END).collect();
        for region in self.memory.iter() {
            let end = region.last_addr().raw_value().saturating_add(1);
            map.push(region.start_addr().raw_value().max(HIGH_RAM_START)..end);
        }
        map
    }
}

/// A command line with its NUL, at most `most` bytes without it.
pub(super) fn cmdline_bytes(cmdline: &str, most: usize) -> Result<Vec<u8>, ImageError> {
    let most = most.min(CMDLINE_MAX - 1);
    if cmdline.len() > most {
        return Err(ImageError::CmdlineTooLong { length: cmdline.len(), most });
    }
    if cmdline.contains('\0') {
        return Err(ImageError::CmdlineNul);
    }
    Ok([cmdline.as_bytes(), &[0]].concat())
}

/// Writes the initrd to the address that `place` returns, and returns (address, size).
pub(super) fn put_initrd(
    places: &mut Places<'_>,
    bytes: &[u8],
    place: impl FnOnce(&mut Places<'_>, u64) -> Option<u64>,
) -> Result<(u64, u64), ImageError> {
    let too_big = || ImageError::InitrdTooBig(bytes.len());
    let size = u64::try_from(bytes.len()).map_err(|_| too_big())?;
    let address = place(places, size).ok_or_else(too_big)?;
    places.memory().write_slice(bytes, GuestAddress(address)).map_err(|_| too_big())?;
    Ok((address, size))
}

/// Bytes that are collected and then written to one address. The offset of each part is known as it is added.
#[derive(Debug, Default)]
pub(super) struct Block {
    bytes: Vec<u8>,
}

impl Block {
    /// Adds `part`, aligned to 16 bytes, and returns its offset.
    pub(super) fn add(&mut self, part: &[u8]) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(16), 0);
        let offset = self.size();
        self.bytes.extend_from_slice(part);
        offset
    }

    /// Overwrites what is at `offset` with `part`.
    pub(super) fn replace(&mut self, offset: u64, part: &[u8]) {
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        for (to, from) in self.bytes.iter_mut().skip(offset).zip(part) {
            *to = *from;
        }
    }

    /// Its size so far.
    pub(super) fn size(&self) -> u64 {
        u64::try_from(self.bytes.len()).unwrap_or(u64::MAX)
    }

    /// Writes all of it at `address`.
    pub(super) fn write(&self, places: &Places<'_>, address: u64) -> Result<(), String> {
        places.memory().write_slice(&self.bytes, GuestAddress(address)).map_err(|e| e.to_string())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const RAM: usize = 4 << 20;

    fn memory() -> GuestRam {
        GuestRam::from_ranges(&[(GuestAddress(0), RAM)]).unwrap()
    }

    proptest! {
        // Whatever is placed overlaps nothing and lies in RAM, from both ends.
        #[test]
        fn places_are_disjoint(
            kernel in prop::collection::vec((0u64..0x50_0000, 0u64..0x10_0000), 0..4),
            sizes in prop::collection::vec((0u64..0x8_0000, any::<bool>()), 0..12),
        ) {
            let memory = memory();
            let mut places = Places::new(&memory);
            let mut all: Vec<_> = std::iter::once(LOW_RAM_END..HIGH_RAM_START).collect();
            for (start, size) in kernel {
                places.take(start, size);
                all.push(start..start + size);
            }
            for (size, high) in sizes {
                let end = places.low_end();
                let found = if high { places.highest(size, end) } else { places.lowest(size, BOOT_DATA..end) };
                let Some(at) = found else { continue };
                prop_assert_eq!(at % PAGE, 0);
                prop_assert!(at + size <= RAM as u64);
                prop_assert!(size == 0 || all.iter().all(|r| r.is_empty() || r.end <= at || at + size <= r.start), "{:?}", all);
                all.push(at..at + size);
            }
        }
    }

    #[test]
    fn boot_data_avoids_the_kernel() {
        let memory = memory();
        let mut places = Places::new(&memory);
        assert_eq!(places.clone().boot_data(0x100), Some(0x6000));
        places.take(0x5000, 0x2800);
        assert_eq!(places.clone().boot_data(0x100), Some(0x8000));
        places.take(0, LOW_RAM_END);
        places.take(0x20_0000, 0x100);
        assert_eq!(places.clone().boot_data(0x100), Some(0x20_1000));
        places.take(0x20_0000, RAM as u64);
        assert_eq!(places.boot_data(0x100), None);
    }

    // Catches: a memory map that lists video memory, a byte twice, or firmware's data and the tables as free.
    #[test]
    fn the_memory_map_has_a_pcs_first_megabyte() {
        let memory = memory();
        let map = [&Places::new(&memory).map()[..], &RESERVED].concat();
        let parts_with = |address: u64| map.iter().filter(|range| range.contains(&address)).count();
        for address in (0..0x20_0000).step_by(1024) {
            assert_eq!(parts_with(address), usize::from(!(0xa_0000..0xc_0000).contains(&address)), "{address:#x}");
        }
        assert!(
            RESERVED[0].contains(&0x9_fc00) && [0xd_0000, 0xe_0000, 0xf_0000].iter().all(|at| RESERVED[1].contains(at))
        );
    }
}
