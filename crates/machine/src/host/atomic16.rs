//! Compare and exchange of 16 bytes of guest RAM, in one atomic access.
//!
//! The standard library has no 16-byte atomics. Two accesses of 8 bytes would not do: another vCPU could see half.

use std::arch::asm;

use vm_memory::{GuestAddress, GuestMemoryBackend, bitmap::Bitmap};

use crate::mem::ram::GuestRam;

/// What [`compare_exchange`] accesses at a time, in bytes; the address must be a multiple of it.
pub const BYTES: usize = 16;

/// Writes `new` to the 16 bytes at `address` if they hold `expected`, as CMPXCHG16B with a LOCK prefix does. Returns
/// what they held; none if they are not all RAM, if the address is no multiple of 16, or if the host's CPU has no
/// CMPXCHG16B.
#[must_use]
pub fn compare_exchange(memory: &GuestRam, address: u64, expected: u128, new: u128) -> Option<u128> {
    if !std::arch::is_x86_feature_detected!("cmpxchg16b") {
        return None;
    }
    let slice = memory.get_slice(GuestAddress(address), BYTES).ok()?;
    let guard = slice.ptr_guard_mut();
    let bytes = guard.as_ptr().cast::<u128>();
    if slice.len() != BYTES || !bytes.is_aligned() {
        return None;
    }
    // SAFETY: the CPU has the instruction; the pointer is aligned, to 16 bytes of a mapping that is readable, writable
    // and as long-lived as `slice`. Guest RAM has no Rust references to it, and other threads and vCPUs access it as
    // atomics or volatile.
    let held = unsafe { exchange(bytes, expected, new) };
    if held == expected {
        slice.bitmap().mark_dirty(0, BYTES);
    }
    Some(held)
}

/// CMPXCHG16B with a LOCK prefix; returns what was held. `core::arch` has a function for it, which the compiler turns
/// into a call of a library that is not linked.
///
/// # Safety
/// The CPU must have the instruction, and `bytes` must be valid for reads and writes, and a multiple of 16.
unsafe fn exchange(bytes: *mut u128, expected: u128, new: u128) -> u128 {
    let [mut rax, mut rdx] = halves(expected);
    let [low, high] = halves(new);
    // SAFETY: the memory is as this function asks. RBX, which the compiler keeps for itself, is put back.
    unsafe {
        asm!(
            "xchg rbx, {low}",
            "lock cmpxchg16b xmmword ptr [{bytes}]",
            "mov rbx, {low}",
            low = inout(reg) low => _,
            bytes = in(reg) bytes,
            inout("rax") rax,
            inout("rdx") rdx,
            in("rcx") high,
            options(nostack),
        );
    }
    u128::from(rdx) << 64 | u128::from(rax)
}

fn halves(value: u128) -> [u64; 2] {
    [value, value >> 64].map(|half| u64::try_from(half & u128::from(u64::MAX)).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;
    use crate::mem::ram;

    // Catches: halves in the wrong order, a write although the comparison failed, a write that the log of dirty pages
    // misses.
    #[test]
    fn it_exchanges_only_what_is_equal() {
        let memory = ram::allocate(2 << 20).unwrap();
        let region = memory.iter().next().unwrap();
        ram::write_log(region).begin();
        let [old, new]: [u128; 2] = [1 << 127 | 2, 3 << 64 | 4];
        memory.write_obj(old, GuestAddress(0x5010)).unwrap();
        assert_eq!(ram::write_log(region).take()[0], 1 << 5);
        assert_eq!(compare_exchange(&memory, 0x5010, new, 0), Some(old));
        assert_eq!(memory.read_obj::<u128>(GuestAddress(0x5010)).unwrap(), old);
        assert_eq!(compare_exchange(&memory, 0x5010, old, new), Some(old));
        assert_eq!(memory.read_obj::<u128>(GuestAddress(0x5010)).unwrap(), new);
        assert_eq!(ram::write_log(region).take()[0], 1 << 5);
    }

    // Catches: an access beyond RAM, and an unaligned one, which is a fault of the process.
    #[test]
    fn it_accesses_aligned_ram_only() {
        let memory = ram::allocate(2 << 20).unwrap();
        for address in [8, 0x1001, (2 << 20) - 8, 2 << 20, u64::MAX, u64::MAX - 15] {
            assert_eq!(compare_exchange(&memory, address, 0, 1), None, "{address:#x}");
        }
    }

    // Catches: an exchange in two halves. Each thread adds to both halves at once: a torn one makes them differ.
    #[test]
    fn threads_never_see_half() {
        let memory = ram::allocate(2 << 20).unwrap();
        let both = (1 << 64) + 1;
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    let mut held = 0;
                    for _ in 0..10_000 {
                        while let before = compare_exchange(&memory, 0, held, held + both).unwrap()
                            && before != held
                        {
                            assert_eq!(before >> 64, before & u128::from(u64::MAX));
                            held = before;
                        }
                        held += both;
                    }
                });
            }
        });
        assert_eq!(memory.read_obj::<u128>(GuestAddress(0)).unwrap(), 20_000 * both);
    }
}
