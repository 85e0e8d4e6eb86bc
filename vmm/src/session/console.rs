//! Standard input as the serial console's.

use std::{fs::File, io::Read, os::fd::AsFd, sync::mpsc, thread, time::Duration};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use super::{Inbox, Request};

pub(super) struct Input {
    stdin: File,
    inbox: Inbox,
    /// Read and not yet taken.
    waiting: Vec<u8>,
}

/// How long to wait for a guest that does not read before it is asked again.
const FULL: Duration = Duration::from_millis(10);

impl Input {
    /// None if there is no standard input.
    pub(super) fn new(inbox: Inbox) -> Option<Self> {
        let stdin = std::io::stdin().as_fd().try_clone_to_owned().ok()?;
        Some(Self { stdin: File::from(stdin), inbox, waiting: Vec::new() })
    }

    /// Offers what waits; one request at a time, so that input cannot outrun the guest.
    fn offer(&mut self) {
        let (sender, taken) = mpsc::channel();
        if self.inbox.post(Request::Type(self.waiting.clone(), sender)).is_err() {
            return;
        }
        let taken = taken.recv().unwrap_or(0);
        self.waiting.drain(..taken.min(self.waiting.len()));
        if !self.waiting.is_empty() {
            thread::sleep(FULL);
        }
    }
}

impl MutEventSubscriber for Input {
    fn process(&mut self, _: Events, ops: &mut EventOps) {
        if self.waiting.is_empty() {
            // One read an event: level-triggered, so that the rest comes again.
            let mut buffer = [0; 64];
            match self.stdin.read(&mut buffer) {
                Ok(count) if count > 0 => self.waiting = buffer.get(..count).unwrap_or(&[]).to_vec(),
                // The end of input, or an error: nothing more will come.
                _ => {
                    drop(ops.remove(Events::empty(&self.stdin)));
                    return;
                }
            }
        }
        self.offer();
    }

    fn init(&mut self, ops: &mut EventOps) {
        // Files and /dev/null cannot be waited for: then there is no console input.
        if let Err(error) = ops.add(Events::new(&self.stdin, EventSet::IN)) {
            log::debug!("standard input is not used: {error}");
        }
    }
}
