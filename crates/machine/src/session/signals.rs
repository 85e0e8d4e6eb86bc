//! SIGINT and SIGTERM end the session cleanly. A second one ends the process at once.

use std::io;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use nix::sys::{
    signal::{SigSet, Signal},
    signalfd::{SfdFlags, SignalFd},
};

use super::{
    ending,
    request::{Inbox, Request},
};
use crate::say;

fn set() -> SigSet {
    let mut set = SigSet::empty();
    set.add(Signal::SIGINT);
    set.add(Signal::SIGTERM);
    set
}

/// Blocks the signals in this thread and in those that it starts, so that only the event loop sees them.
///
/// # Errors
/// If the kernel refuses.
pub fn block() -> io::Result<()> {
    Ok(set().thread_block()?)
}

pub(super) struct Stop {
    signals: SignalFd,
    inbox: Inbox,
    stopping: bool,
}

impl Stop {
    pub(super) fn new(inbox: Inbox) -> io::Result<Self> {
        let signals = SignalFd::with_flags(&set(), SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
        Ok(Self { signals, inbox, stopping: false })
    }
}

impl MutEventSubscriber for Stop {
    fn process(&mut self, _: Events, _: &mut EventOps) {
        while let Ok(Some(_)) = self.signals.read_signal() {
            if std::mem::replace(&mut self.stopping, true) {
                say!("vmm: stopped at once, on a second signal");
                ending::at_once();
            }
            ending::soon();
            // Posting fails only if the machine has ended already.
            let _ = self.inbox.post(Request::Stop);
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new(&self.signals, EventSet::IN)) {
            log::error!("cannot wait for signals: {error}");
        }
    }
}
