//! Signals that are blocked and wait.

use std::mem::MaybeUninit;

/// Whether SIGINT or SIGTERM, which are blocked, wait for someone to take them.
#[must_use]
pub fn end_is_pending() -> bool {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigpending writes the set that it is given, or fails.
    if unsafe { libc::sigpending(set.as_mut_ptr()) } != 0 {
        return false;
    }
    // SAFETY: sigismember reads the set, which is written.
    let waits = |signal| unsafe { libc::sigismember(set.as_ptr(), signal) } == 1;
    waits(libc::SIGINT) || waits(libc::SIGTERM)
}
