//! Standard input as the input of the serial console.

use std::{
    fs::File,
    io::Read,
    os::fd::{AsFd, AsRawFd},
    time::Duration,
};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vmm_sys_util::timerfd::TimerFd;

use super::request::{Inbox, Request};
use crate::control::Answers;

/// How long the event loop waits, after the UART took only a part of the input, before it offers the rest again.
const RETRY: Duration = Duration::from_millis(10);

pub(super) struct Input {
    stdin: File,
    inbox: Inbox,
    /// Bytes read and not yet taken by the UART. While there are any, standard input is not read.
    waiting: Vec<u8>,
    /// The answers: how many bytes the UART took.
    taken: Answers<usize>,
    /// Expires when the rest is to be offered again.
    retry: TimerFd,
}

impl Input {
    /// None if there is no standard input, or no descriptor left.
    pub(super) fn new(inbox: Inbox) -> Option<Self> {
        let stdin = File::from(std::io::stdin().as_fd().try_clone_to_owned().ok()?);
        Some(Self { stdin, inbox, waiting: Vec::new(), taken: Answers::new().ok()?, retry: TimerFd::new().ok()? })
    }

    fn read(&mut self, ops: &mut EventOps) {
        // One read per event is enough: the event is level-triggered, so what is left causes another.
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

    /// Offers the waiting bytes to the machine. There is at most one such request at a time.
    fn offer(&mut self) {
        if let Ok(answer) = self.taken.expect(0) {
            // An error means that the machine has ended. The input is then not needed.
            let _ = self.inbox.post(Request::Type(self.waiting.clone(), answer));
        }
    }

    fn remove_taken(&mut self, ops: &mut EventOps) {
        while let Some((_, taken)) = self.taken.take() {
            let taken = taken.unwrap_or(0).min(self.waiting.len());
            self.waiting.drain(..taken);
            if self.waiting.is_empty() {
                self.watch(ops);
            } else if self.retry.reset(RETRY, None).is_err() {
                self.offer();
            }
        }
    }

    fn watch(&self, ops: &mut EventOps) {
        // epoll refuses files and /dev/null. Then there is no console input.
        if let Err(error) = ops.add(Events::new(&self.stdin, EventSet::IN)) {
            log::debug!("standard input is not used: {error}");
        }
    }
}

impl MutEventSubscriber for Input {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match events.fd() {
            fd if fd == self.stdin.as_raw_fd() => self.read(ops),
            fd if fd == self.taken.as_raw_fd() => self.remove_taken(ops),
            _ => {
                let _ = self.retry.wait();
                self.offer();
            }
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        let added = [ops.add(Events::new(&self.taken, EventSet::IN)), ops.add(Events::new(&self.retry, EventSet::IN))];
        match added.into_iter().find_map(Result::err) {
            None => self.watch(ops),
            Some(error) => log::error!("cannot wait for the console's input: {error}"),
        }
    }
}
