//! How other threads reach a running machine.
//!
//! A request is posted and CPU 0's doorbell rings. Then [`Machine::run`](crate::machine::Machine::run) returns
//! [`StopReason::Requested`](crate::machine::stop::StopReason::Requested), and its caller takes the request out.

use std::{
    collections::VecDeque,
    sync::{Arc, Condvar, Mutex, PoisonError},
};

use crate::machine::{lock::lock, shared::doorbell::Doorbell};

/// Requests of type `T`, in order.
pub struct Mailbox<T> {
    inner: Mutex<Inner<T>>,
    arrived: Condvar,
    expected: bool,
}

struct Inner<T> {
    requests: VecDeque<T>,
    doorbell: Option<Arc<Doorbell>>,
    closed: bool,
}

impl<T> Mailbox<T> {
    /// A mailbox; `expected` says that requests may come which wake a guest that nothing else wakes. (A signal to stop
    /// may come to any.)
    #[must_use]
    pub fn new(expected: bool) -> Self {
        Self { expected, ..Self::default() }
    }
}

impl<T> Default for Mailbox<T> {
    fn default() -> Self {
        let inner = Inner { requests: VecDeque::new(), doorbell: None, closed: false };
        Self { inner: Mutex::new(inner), arrived: Condvar::new(), expected: false }
    }
}

impl<T> Mailbox<T> {
    /// Posts a request and makes the machine look; returns it if the mailbox is closed.
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
        if let Some(doorbell) = &inner.doorbell {
            doorbell.ring();
        }
        Ok(())
    }

    /// Closes the mailbox: drops the requests that wait, and refuses those that come.
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
            inner = self.arrived.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// What running a machine needs of a mailbox.
pub trait Interruptions: Sync {
    /// What to ring when a request comes; none = nothing.
    fn ring_at(&self, doorbell: Option<Arc<Doorbell>>);
    /// Whether a request waits.
    fn waiting(&self) -> bool;
    /// Whether a request may come that wakes a guest which nothing else wakes.
    fn can_come(&self) -> bool;
}

impl<T: Send> Interruptions for Mailbox<T> {
    fn ring_at(&self, doorbell: Option<Arc<Doorbell>>) {
        lock(&self.inner).doorbell = doorbell;
    }

    fn waiting(&self) -> bool {
        !lock(&self.inner).requests.is_empty()
    }

    fn can_come(&self) -> bool {
        self.expected
    }
}

/// No mailbox: no request comes.
pub struct Undisturbed;

impl Interruptions for Undisturbed {
    fn ring_at(&self, _: Option<Arc<Doorbell>>) {}

    fn waiting(&self) -> bool {
        false
    }

    fn can_come(&self) -> bool {
        false
    }
}
