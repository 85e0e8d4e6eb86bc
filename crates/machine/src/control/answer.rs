//! An answer that comes later, on another thread, and wakes the event loop.

use std::{
    io,
    os::fd::{AsRawFd, RawFd},
    sync::mpsc::{Receiver, Sender, channel},
};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Where answers arrive: on the event loop, which waits for it to be readable.
#[derive(Debug)]
pub struct Answers<T> {
    receiver: Receiver<(u64, Option<T>)>,
    sender: Sender<(u64, Option<T>)>,
    event: EventFd,
}

impl<T> Answers<T> {
    /// None yet.
    ///
    /// # Errors
    /// If there is no descriptor left.
    pub fn new() -> io::Result<Self> {
        let (sender, receiver) = channel();
        Ok(Self { receiver, sender, event: EventFd::new(EFD_NONBLOCK)? })
    }

    /// Where the answer to question number `question` is to be given.
    ///
    /// # Errors
    /// If there is no descriptor left.
    pub fn expect(&self, question: u64) -> io::Result<Answer<T>> {
        let event = self.event.try_clone()?;
        Ok(Answer { sender: self.sender.clone(), event, question, given: false })
    }

    /// The next answer that has come, and the number of its question; nothing in it if none will come any more.
    pub fn take(&self) -> Option<(u64, Option<T>)> {
        // Before the look: what comes after it is another event.
        let _ = self.event.read();
        self.receiver.try_recv().ok()
    }
}

impl<T> AsRawFd for Answers<T> {
    fn as_raw_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

/// To be given once. Dropped without that, it says that there is none.
#[derive(Debug)]
pub struct Answer<T> {
    sender: Sender<(u64, Option<T>)>,
    event: EventFd,
    question: u64,
    given: bool,
}

impl<T> Answer<T> {
    /// Gives it.
    pub fn give(mut self, answer: T) {
        self.send(Some(answer));
    }

    fn send(&mut self, answer: Option<T>) {
        self.given = true;
        // Nobody waits any more if the event loop is gone.
        let _ = self.sender.send((self.question, answer));
        let _ = self.event.write(1);
    }
}

impl<T> Drop for Answer<T> {
    fn drop(&mut self) {
        if !self.given {
            self.send(None);
        }
    }
}
