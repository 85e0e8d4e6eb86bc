//! Answers that are given later, on any thread, and wake the event loop.

use std::{
    io,
    os::fd::{AsRawFd, RawFd},
    sync::mpsc::{Receiver, Sender, channel},
};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// The receiving end of all answers. The event loop polls its descriptor, which is readable when an answer has arrived.
#[derive(Debug)]
pub struct Answers<T> {
    receiver: Receiver<(u64, Option<T>)>,
    sender: Sender<(u64, Option<T>)>,
    event: EventFd,
}

impl<T> Answers<T> {
    /// A receiving end with no answers yet.
    ///
    /// # Errors
    /// If there is no descriptor left.
    pub fn new() -> io::Result<Self> {
        let (sender, receiver) = channel();
        Ok(Self { receiver, sender, event: EventFd::new(EFD_NONBLOCK)? })
    }

    /// Creates the [`Answer`] to question number `question`.
    ///
    /// # Errors
    /// If there is no descriptor left.
    pub fn expect(&self, question: u64) -> io::Result<Answer<T>> {
        let event = self.event.try_clone()?;
        Ok(Answer { sender: self.sender.clone(), event, question, sent: false })
    }

    /// The next answer that has arrived, with the number of its question. The answer is None if its [`Answer`] was
    /// dropped without one.
    pub fn take(&self) -> Option<(u64, Option<T>)> {
        // The event is cleared before the channel is read: an answer that arrives in between signals it again.
        let _ = self.event.read();
        self.receiver.try_recv().ok()
    }
}

impl<T> AsRawFd for Answers<T> {
    fn as_raw_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

/// The sending end for the answer to one question. Dropping it reports that there is no answer.
#[derive(Debug)]
pub struct Answer<T> {
    sender: Sender<(u64, Option<T>)>,
    event: EventFd,
    question: u64,
    sent: bool,
}

impl<T> Answer<T> {
    /// Sends the answer.
    pub fn send(mut self, answer: T) {
        self.deliver(Some(answer));
    }

    fn deliver(&mut self, answer: Option<T>) {
        self.sent = true;
        // Sending fails only if the event loop has ended. Then no client waits any more.
        let _ = self.sender.send((self.question, answer));
        let _ = self.event.write(1);
    }
}

impl<T> Drop for Answer<T> {
    fn drop(&mut self) {
        if !self.sent {
            self.deliver(None);
        }
    }
}
