//! What the publisher needs of guest memory, and how a guest's address can be wrong.

use core::sync::atomic::{Ordering, fence};

/// Guest memory, by guest physical address.
pub trait GuestWrite {
    /// Stores `bytes` at `addr`.
    ///
    /// Four bytes at a multiple of four must be one store: another vCPU may be reading them as a `u32`.
    ///
    /// # Errors
    /// [`OutsideRam`] if not all of it is RAM; then nothing is stored.
    fn write(&self, addr: u64, bytes: &[u8]) -> Result<(), OutsideRam>;

    /// Fills `bytes` from `addr`.
    ///
    /// # Errors
    /// [`OutsideRam`] if not all of it is RAM.
    fn read(&self, addr: u64, bytes: &mut [u8]) -> Result<(), OutsideRam>;
}

/// An access that RAM does not hold, or not all of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{bytes} bytes at {addr:#x} are not in RAM")]
pub struct OutsideRam {
    /// Guest physical address of the first byte.
    pub addr: u64,
    /// Size of the access.
    pub bytes: usize,
}

/// An address that a guest must not register. The VMM answers with #GP and a log line; KVM ignores it silently, which
/// leaves a guest with a clock that stands still.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RegistrationFault {
    /// `Documentation/virt/kvm/x86/msr.rst` asks for four-byte alignment, without which the version tears.
    #[error("the address {0:#x} is not a multiple of 4")]
    Misaligned(u64),
    /// The structure is not, or not wholly, in RAM.
    #[error("the address is unusable: {0}")]
    OutsideRam(#[from] OutsideRam),
}

/// The `N` bytes at `addr`, a legal place for a structure of that size.
pub(super) fn place<const N: usize>(addr: u64, mem: &impl GuestWrite) -> Result<[u8; N], RegistrationFault> {
    if !addr.is_multiple_of(4) {
        return Err(RegistrationFault::Misaligned(addr));
    }
    let mut bytes = [0; N];
    // Not every memory checks that the end does not wrap.
    let size = u64::try_from(N).unwrap_or(u64::MAX);
    addr.checked_add(size).ok_or(OutsideRam { addr, bytes: N })?;
    mem.read(addr, &mut bytes)?;
    Ok(bytes)
}

/// Replaces a structure whose first four bytes are its version, so that a reader that saw the same even version before
/// and after has read one of the two and no mixture: odd version, `rest`, even version, with a fence between each two.
///
/// `last` is the highest version that readers may have seen; returns the new one. A release fence orders what is
/// before it before the stores after it, which is the kernel's `smp_wmb`; x86 needs no instruction for it, the compiler
/// needs to be told.
pub(super) fn replace(last: &mut u32, addr: u64, rest: &[u8], mem: &impl GuestWrite) -> Result<u32, OutsideRam> {
    // The next odd number: +1 from an even version, +2 from an odd one, which an interrupted writer leaves.
    let odd = last.wrapping_add(1) | 1;
    *last = odd;
    mem.write(addr, &odd.to_le_bytes())?;
    fence(Ordering::Release);
    mem.write(addr.wrapping_add(4), rest)?;
    fence(Ordering::Release);
    let even = odd.wrapping_add(1);
    mem.write(addr, &even.to_le_bytes())?;
    *last = even;
    Ok(even)
}
