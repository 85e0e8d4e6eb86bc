//! An end that somebody asked for comes, whatever the machine's thread is held by.
//!
//! Asked to end, that thread comes back from the guest, gives up a snapshot that it is writing, and leaves. All of that takes
//! milliseconds. If it takes longer, something holds the thread that should not (a disk that does not answer, a file system
//! that hangs), and nobody who waits for the process is served by waiting.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use crate::{blame::Blame, host::exit::exit_at_once, say};

/// How long an end may take.
const PATIENCE: Duration = Duration::from_millis(1500);

/// The session is over: what follows is no more than a few writes.
static OVER: AtomicBool = AtomicBool::new(false);

/// Ends the process if the session is not over soon.
pub(super) fn soon() {
    let watch = || {
        thread::sleep(PATIENCE);
        if !OVER.load(Ordering::SeqCst) {
            say!(
                "vmm: the machine's thread did not stop within {PATIENCE:?}: the process ends at once, without results"
            );
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

/// The session is over.
pub(super) fn over() {
    OVER.store(true, Ordering::SeqCst);
}
