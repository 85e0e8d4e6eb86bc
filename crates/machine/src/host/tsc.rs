//! The host's time stamp counter.

/// The host TSC, now. Not ordered with surrounding loads; callers compare it with deadlines microseconds away.
#[must_use]
pub fn read_tsc() -> u64 {
    // SAFETY: RDTSC has no operands and no side effects; x86-64 always has it.
    unsafe { core::arch::x86_64::_rdtsc() }
}
