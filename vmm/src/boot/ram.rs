//! Guest RAM: anonymous memory below and above the hole that devices live in.

use vm_memory::{GuestAddress, GuestMemoryMmap};

/// Where the hole for MMIO (the LAPIC's page among it) begins and ends.
const HOLE_START: u64 = 0xc000_0000;
const HOLE_END: u64 = 0x1_0000_0000;
/// RAM is mapped in pages.
const PAGE: u64 = 4096;

/// RAM that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// Too small, too large or not whole pages.
    #[error("a memory size of {0} bytes is not possible: use whole pages, from 2M to 1T")]
    Size(u64),
    /// The host gives no mapping.
    #[error("the host cannot provide {bytes} bytes of guest memory: {reason}; use a smaller --memory")]
    Mapping {
        /// Size asked for.
        bytes: u64,
        /// What mmap said.
        reason: String,
    },
}

/// `bytes` of zeroed RAM from address 0, continued at 4 GiB where it would reach the MMIO hole.
///
/// # Errors
/// [`RamError`].
pub fn allocate(bytes: u64) -> Result<GuestMemoryMmap, RamError> {
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
    GuestMemoryMmap::from_ranges(&ranges).map_err(|error| RamError::Mapping { bytes, reason: error.to_string() })
}
