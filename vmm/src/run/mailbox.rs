//! How other threads reach a running machine.
//!
//! A request is posted, the machine's thread is kicked out of KVM_RUN or woken from its idle wait, [`super::Machine::run`]
//! comes back with [`super::Outcome::Requested`], and whoever runs the machine takes the request out.

use std::{
    collections::VecDeque,
    sync::{Condvar, Mutex},
    time::Duration,
};

use super::platform::lock;
use crate::kvm::kick::Kicker;

/// Requests of type `T`, in order.
pub struct Mailbox<T> {
    inner: Mutex<Inner<T>>,
    arrived: Condvar,
}

struct Inner<T> {
    requests: VecDeque<T>,
    runner: Option<Kicker>,
    closed: bool,
}

impl<T> Default for Mailbox<T> {
    fn default() -> Self {
        Self {
            inner: Mutex::new(Inner { requests: VecDeque::new(), runner: None, closed: false }),
            arrived: Condvar::new(),
        }
    }
}

impl<T> Mailbox<T> {
    /// Posts a request and makes the machine look; gives it back if nobody will look any more.
    ///
    /// # Errors
    /// The request itself, after [`Self::close`].
    pub fn post(&self, request: T) -> Result<(), T> {
        let mut inner = lock(&self.inner);
        if inner.closed {
            return Err(request);
        }
        inner.requests.push_back(request);
        self.arrived.notify_all();
        if let Some(runner) = &inner.runner {
            runner.kick();
        }
        Ok(())
    }

    /// Nobody looks any more: drops what waits and refuses what comes.
    pub fn close(&self) {
        let mut inner = lock(&self.inner);
        inner.closed = true;
        inner.requests.clear();
    }

    /// The oldest request.
    pub fn take(&self) -> Option<T> {
        lock(&self.inner).requests.pop_front()
    }

    /// Waits for the oldest request.
    pub fn wait_and_take(&self) -> T {
        let mut inner = lock(&self.inner);
        loop {
            if let Some(request) = inner.requests.pop_front() {
                return request;
            }
            inner = self.arrived.wait(inner).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
    }
}

/// What the run loop needs of a mailbox.
pub trait Interruptions {
    /// Kicks go to the calling thread from now on.
    fn attach(&self);
    /// Kicks go nowhere.
    fn detach(&self);
    /// Whether somebody waits.
    fn waiting(&self) -> bool;
    /// Sleeps until somebody waits or `limit` is over; no limit = until somebody waits. May wake early.
    fn sleep(&self, limit: Option<Duration>);
    /// Whether anybody could ever post.
    fn can_come(&self) -> bool;
}

impl<T> Interruptions for Mailbox<T> {
    fn attach(&self) {
        lock(&self.inner).runner = Some(Kicker::for_this_thread());
    }

    fn detach(&self) {
        lock(&self.inner).runner = None;
    }

    fn waiting(&self) -> bool {
        !lock(&self.inner).requests.is_empty()
    }

    fn sleep(&self, limit: Option<Duration>) {
        let inner = lock(&self.inner);
        if inner.requests.is_empty() {
            match limit {
                Some(limit) => drop(self.arrived.wait_timeout(inner, limit)),
                None => drop(self.arrived.wait(inner)),
            }
        }
    }

    fn can_come(&self) -> bool {
        true
    }
}

/// No mailbox: nobody interrupts.
pub struct Undisturbed;

impl Interruptions for Undisturbed {
    fn attach(&self) {}

    fn detach(&self) {}

    fn waiting(&self) -> bool {
        false
    }

    fn sleep(&self, limit: Option<Duration>) {
        if let Some(limit) = limit {
            std::thread::sleep(limit);
        }
    }

    fn can_come(&self) -> bool {
        false
    }
}
