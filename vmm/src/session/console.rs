//! Standard input as the serial console's.

use std::{fs::File, io::Read, os::fd::AsFd};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use super::{Inbox, Request};

pub(super) struct Input {
    stdin: File,
    inbox: Inbox,
}

impl Input {
    /// None if there is no standard input.
    pub(super) fn new(inbox: Inbox) -> Option<Self> {
        let stdin = std::io::stdin().as_fd().try_clone_to_owned().ok()?;
        Some(Self { stdin: File::from(stdin), inbox })
    }
}

impl MutEventSubscriber for Input {
    fn process(&mut self, _: Events, ops: &mut EventOps) {
        // One read an event: level-triggered, so that the rest comes again.
        let mut buffer = [0; 64];
        match self.stdin.read(&mut buffer) {
            Ok(count) if count > 0 => {
                let bytes = buffer.get(..count).unwrap_or(&[]).to_vec();
                let _ = self.inbox.post(Request::Type(bytes));
            }
            // The end of input, or an error: nothing more will come.
            _ => drop(ops.remove(Events::empty(&self.stdin))),
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        // Files and /dev/null cannot be waited for: then there is no console input.
        if let Err(error) = ops.add(Events::new(&self.stdin, EventSet::IN)) {
            log::debug!("standard input is not used: {error}");
        }
    }
}
