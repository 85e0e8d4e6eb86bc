//! A requested end ends the process, even if the machine's thread is blocked.
//!
//! After a signal, `quit` or the timeout, that thread leaves the guest, cancels a snapshot that is being written, and
//! returns. All of that takes milliseconds. If it takes longer, the thread is blocked by something else (a disk that
//! does not answer, a file system that hangs). Then waiting longer would not help, and the process is ended without
//! results.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use crate::{blame::Blame, host::exit::exit_at_once, say};

/// How long a requested end may take.
const LIMIT: Duration = Duration::from_millis(1500);

/// The session is over: only a few writes are left to do.
static OVER: AtomicBool = AtomicBool::new(false);

/// Starts a thread that ends the process if the session is not over within [`LIMIT`].
pub(super) fn soon() {
    let watch = || {
        thread::sleep(LIMIT);
        if !OVER.load(Ordering::SeqCst) {
            say!("vmm: the machine's thread did not stop within {LIMIT:?}: the process ends at once, without results");
            at_once();
        }
    };
    if thread::Builder::new().name("ending".to_owned()).spawn(watch).is_err() {
        at_once();
    }
}

/// Ends the process. Nothing is cleaned up or waited for.
pub(super) fn at_once() -> ! {
    exit_at_once(Blame::Run.exit_code())
}

/// Notes that the session is over.
pub(super) fn over() {
    OVER.store(true, Ordering::SeqCst);
}
