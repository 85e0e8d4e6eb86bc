//! The VMClock page.

use core::mem::offset_of;
use core::ptr;
use core::sync::atomic::{Ordering, compiler_fence};

use guest::vmclock::Page;
use guest_abi::vmclock::{REGION_BYTES, VMCLOCK_BYTES, VmClock};

use super::cpu;

/// The page tables map so much.
const MAPPED: u64 = 1 << 32;

/// A VMClock page that can be read.
pub struct Vmclock {
    address: usize,
}

impl Vmclock {
    /// The page at guest physical address `address`; none if that is no address of a page that is mapped.
    pub fn at(address: u64) -> Option<Self> {
        let usable = address != 0 && address < MAPPED && address.is_multiple_of(u64::from(REGION_BYTES));
        usable.then(|| usize::try_from(address).ok().map(|address| Self { address })).flatten()
    }

    fn word(&self, offset: usize) -> *const u64 {
        ptr::with_exposed_provenance(self.address + offset)
    }
}

impl Page for Vmclock {
    fn seq_count(&mut self) -> u32 {
        compiler_fence(Ordering::SeqCst);
        let place: *const u32 = ptr::with_exposed_provenance(self.address + offset_of!(VmClock, seq_count));
        // SAFETY: aligned, in a mapped page that is no memory to the compiler; the host may write it, so volatile.
        let count = unsafe { place.read_volatile() };
        compiler_fence(Ordering::SeqCst);
        count
    }

    fn read(&mut self) -> VmClock {
        let mut bytes = [0; VMCLOCK_BYTES];
        for (n, bytes) in bytes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            // SAFETY: as above; `VMCLOCK_BYTES` are in one page.
            *bytes = unsafe { self.word(8 * n).read_volatile() }.to_le_bytes();
        }
        VmClock::from_bytes(&bytes)
    }

    fn pause(&mut self) {
        cpu::pause();
    }
}
