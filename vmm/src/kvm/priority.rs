//! How urgent the calling thread is.

use std::io;

/// Makes the calling thread one that runs when nobody else wants the CPU (SCHED_IDLE), or an ordinary one again.
///
/// sched(7): since Linux 2.6.39 "an unprivileged thread can switch from SCHED_IDLE to SCHED_OTHER so long as its nice value
/// falls in the range permitted by its RLIMIT_NICE".
///
/// # Errors
/// What the kernel says. The thread is then as urgent as before.
pub fn set_idle_priority(idle: bool) -> io::Result<()> {
    let policy = if idle { libc::SCHED_IDLE } else { libc::SCHED_OTHER };
    let parameter = libc::sched_param { sched_priority: 0 };
    // SAFETY: 0 is the calling thread, and the kernel only reads `parameter`.
    match unsafe { libc::sched_setscheduler(0, policy, &raw const parameter) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
