//! Standard input as the serial console's.

use std::{
    fs::File,
    io::Read,
    os::fd::{AsFd, AsRawFd},
    time::Duration,
};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vmm_sys_util::timerfd::TimerFd;

use super::{Inbox, Request};
use crate::control::Answers;

/// How long to wait for a guest that does not read before it is asked again.
const FULL: Duration = Duration::from_millis(10);

pub(super) struct Input {
    stdin: File,
    inbox: Inbox,
    /// Read and not yet taken. Nothing more is read meanwhile, so that input cannot outrun the guest.
    waiting: Vec<u8>,
    /// How many bytes the guest took.
    taken: Answers<usize>,
    /// Runs while a guest that does not read is let alone.
    full: TimerFd,
}

impl Input {
    /// None if there is no standard input, or no descriptor left.
    pub(super) fn new(inbox: Inbox) -> Option<Self> {
        let stdin = File::from(std::io::stdin().as_fd().try_clone_to_owned().ok()?);
        Some(Self { stdin, inbox, waiting: Vec::new(), taken: Answers::new().ok()?, full: TimerFd::new().ok()? })
    }

    fn read(&mut self, ops: &mut EventOps) {
        // One read an event: level-triggered, so that the rest comes again.
        let mut buffer = [0; 64];
        match self.stdin.read(&mut buffer) {
            Ok(count) if count > 0 => {
                self.waiting = buffer.get(..count).unwrap_or(&[]).to_vec();
                let _ = ops.remove(Events::empty(&self.stdin));
                self.offer();
            }
            // The end of input, or an error: nothing more will come.
            _ => drop(ops.remove(Events::empty(&self.stdin))),
        }
    }

    /// Offers what waits; one request at a time.
    fn offer(&mut self) {
        if let Ok(answer) = self.taken.expect(0) {
            // Refused only when the machine has ended: then nobody types.
            let _ = self.inbox.post(Request::Type(self.waiting.clone(), answer));
        }
    }

    fn took(&mut self, ops: &mut EventOps) {
        while let Some((_, taken)) = self.taken.take() {
            let taken = taken.unwrap_or(0).min(self.waiting.len());
            self.waiting.drain(..taken);
            if self.waiting.is_empty() {
                self.watch(ops);
            } else if self.full.reset(FULL, None).is_err() {
                self.offer();
            }
        }
    }

    fn watch(&self, ops: &mut EventOps) {
        // Files and /dev/null cannot be waited for: then there is no console input.
        if let Err(error) = ops.add(Events::new(&self.stdin, EventSet::IN)) {
            log::debug!("standard input is not used: {error}");
        }
    }
}

impl MutEventSubscriber for Input {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match events.fd() {
            fd if fd == self.stdin.as_raw_fd() => self.read(ops),
            fd if fd == self.taken.as_raw_fd() => self.took(ops),
            _ => {
                let _ = self.full.wait();
                self.offer();
            }
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        let answers = [ops.add(Events::new(&self.taken, EventSet::IN)), ops.add(Events::new(&self.full, EventSet::IN))];
        match answers.into_iter().find_map(Result::err) {
            None => self.watch(ops),
            Some(error) => log::error!("cannot wait for the console's input: {error}"),
        }
    }
}
