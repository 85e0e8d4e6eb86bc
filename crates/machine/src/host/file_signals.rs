//! Signals about files: SIGXFSZ when a file may not grow, SIGBUS when a page of a mapped file cannot be read.

use std::{
    io,
    mem::MaybeUninit,
    ops::Range,
    ptr,
    sync::{
        Once,
        atomic::{AtomicPtr, Ordering},
    },
};

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::mem::ram::GuestRam;

/// The exit code when guest memory is lost, which is the one for every unusable snapshot.
const EXIT_CODE: i32 = 2;

/// Ignores SIGXFSZ, which by default ends a process that writes beyond its RLIMIT_FSIZE: write(2) then fails with
/// EFBIG.
///
/// # Errors
/// If the system call fails.
pub fn ignore_file_size_signal() -> io::Result<()> {
    // SAFETY: ignoring a signal runs no code of ours.
    let before = unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    if before == libc::SIG_ERR { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The address ranges that are mapped from a file, and the message for their loss.
struct Guarded {
    ranges: Vec<Range<usize>>,
    line: Vec<u8>,
}

/// What the handler reads: null, or a value that is never freed.
static GUARDED: AtomicPtr<Guarded> = AtomicPtr::new(ptr::null_mut());

/// Installs a SIGBUS handler. When the process accesses a page of `memory` that cannot be read from the mapped file (it
/// was truncated, or its medium fails), the handler writes `line` to standard error and ends the process with exit code
/// 2. Only the `memory` of the latest call is guarded.
pub fn guard_mapped_file(memory: &GuestRam, line: &str) {
    let range = |start: usize, length: u64| start..start.saturating_add(usize::try_from(length).unwrap_or(usize::MAX));
    let ranges = memory.iter().map(|region| range(region.as_ptr().addr(), region.len())).collect();
    let mut line = line.replace('\n', " ").into_bytes();
    line.truncate(libc::PIPE_BUF - 1);
    line.push(b'\n');
    // Never freed: the handler may read it at any time, on any thread. A process loads one snapshot, so that little
    // leaks.
    GUARDED.store(Box::into_raw(Box::new(Guarded { ranges, line })), Ordering::Release);
    static HANDLER: Once = Once::new();
    HANDLER.call_once(|| {
        // If this fails, the signal ends the process, as by default.
        let _ = vmm_sys_util::signal::register_signal_handler(libc::SIGBUS, on_bus_error);
    });
}

/// The SIGBUS handler. It calls only functions that signal-safety(7) lists.
extern "C" fn on_bus_error(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a siginfo_t that lives as long as the call.
    let info = unsafe { info.as_ref() };
    // SAFETY: for SIGBUS `si_addr` is the union's live member.
    let address = info.map_or(0, |info| unsafe { info.si_addr() }.addr());
    // SAFETY: null, or a value that is never freed nor changed.
    let guarded = unsafe { GUARDED.load(Ordering::Acquire).as_ref() };
    if let Some(Guarded { line, .. }) =
        guarded.filter(|guarded| guarded.ranges.iter().any(|range| range.contains(&address)))
    {
        let mut stderr = libc::pollfd { fd: libc::STDERR_FILENO, events: libc::POLLOUT, revents: 0 };
        // Poll first, because a write to a full pipe without a reader would block forever. pipe(7), "PIPE_BUF": a pipe
        // that has room takes so many bytes without blocking.
        // SAFETY: one pollfd, which outlives the call.
        if unsafe { libc::poll(&raw mut stderr, 1, 0) } > 0 {
            // SAFETY: the bytes outlive the call. The process ends whether they were written or not.
            let _ = unsafe { libc::write(libc::STDERR_FILENO, line.as_ptr().cast(), line.len()) };
        }
        // SAFETY: it ends the process and runs no code of it.
        unsafe { libc::_exit(EXIT_CODE) };
    }
    // The address is not guarded. With the default action restored, the access is repeated, and the signal then ends
    // the process as it would have without a handler.
    // SAFETY: all zeros is a valid sigaction: the default action, no mask, no flags.
    let default = unsafe { MaybeUninit::<libc::sigaction>::zeroed().assume_init() };
    // SAFETY: it reads one sigaction, which outlives the call.
    unsafe { libc::sigaction(libc::SIGBUS, &raw const default, ptr::null_mut()) };
}
