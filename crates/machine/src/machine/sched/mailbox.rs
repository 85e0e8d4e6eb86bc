//! The mailbox in which other threads post requests for a running machine.
//!
//! Posting rings CPU 0's doorbell. Then [`Machine::run`](crate::machine::Machine::run) returns
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
    expects_requests: bool,
}

struct Inner<T> {
    requests: VecDeque<T>,
    doorbell: Option<Arc<Doorbell>>,
    closed: bool,
}

impl<T> Mailbox<T> {
    /// A mailbox. `expects_requests`: a client may post requests, so that a guest that no timer can wake is not ended.
    /// (A signal that stops the session may come in any case.)
    #[must_use]
    pub fn new(expects_requests: bool) -> Self {
        Self { expects_requests, ..Self::default() }
    }
}

impl<T> Default for Mailbox<T> {
    fn default() -> Self {
        let inner = Inner { requests: VecDeque::new(), doorbell: None, closed: false };
        Self { inner: Mutex::new(inner), arrived: Condvar::new(), expects_requests: false }
    }
}

impl<T> Mailbox<T> {
    /// Posts a request and rings the doorbell. Returns the request if the mailbox is closed.
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

    /// Closes the mailbox: drops the requests in it, and refuses later ones.
    pub fn close(&self) {
        let mut inner = lock(&self.inner);
        inner.closed = true;
        inner.requests.clear();
    }

    /// Takes the oldest request, if there is one.
    pub fn take(&self) -> Option<T> {
        lock(&self.inner).requests.pop_front()
    }

    /// Waits until there is a request, and takes the oldest.
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

/// A source of requests that end [`Machine::run`](crate::machine::Machine::run): a mailbox, or none.
pub trait RequestSource: Sync {
    /// Sets the doorbell to ring when a request is posted; none = rings none.
    fn set_doorbell(&self, doorbell: Option<Arc<Doorbell>>);
    /// Whether a request waits.
    fn has_request(&self) -> bool;
    /// Whether a request may come that wakes a guest which no timer can wake.
    fn expects_requests(&self) -> bool;
}

impl<T: Send> RequestSource for Mailbox<T> {
    fn set_doorbell(&self, doorbell: Option<Arc<Doorbell>>) {
        lock(&self.inner).doorbell = doorbell;
    }

    fn has_request(&self) -> bool {
        !lock(&self.inner).requests.is_empty()
    }

    fn expects_requests(&self) -> bool {
        self.expects_requests
    }
}

/// No mailbox: the machine runs until the guest ends or the VM time to stop at is reached.
pub struct NoRequests;

impl RequestSource for NoRequests {
    fn set_doorbell(&self, _: Option<Arc<Doorbell>>) {}

    fn has_request(&self) -> bool {
        false
    }

    fn expects_requests(&self) -> bool {
        false
    }
}
