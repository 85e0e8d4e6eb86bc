//! The threads beside the machine's own, and when they start.
//!
//! Starting a thread costs a tenth of the time that a restored guest needs to its first exit: for its creation, and
//! because two CPUs then share an address space. So the machine's thread is the only one for [`HEAD_START`].

use std::{
    thread::{self, Scope, ScopedJoinHandle},
    time::Duration,
};

use event_manager::{EventManager, SubscriberOps};
use vmm_sys_util::eventfd::EventFd;

use super::{
    Subscriber,
    error::{SessionError, events},
    request::Request,
};
use crate::machine::sched::mailbox::Mailbox;

/// VM time that the guest may run before signals are handled and its console's input is read.
pub(super) const HEAD_START: Duration = Duration::from_millis(2);

/// What the event loop's thread needs.
pub(super) struct Duties<'env> {
    /// The handlers of events.
    pub subscribers: Vec<Subscriber>,
    /// Readable when the machine is done.
    pub done: &'env EventFd,
    /// Where requests go.
    pub inbox: &'env Mailbox<Request>,
}

/// The threads.
pub(super) struct HelperThreads<'scope, 'env: 'scope> {
    scope: &'scope Scope<'scope, 'env>,
    threads: Threads<'scope, 'env>,
}

enum Threads<'scope, 'env> {
    NotYet(Duties<'env>),
    Running(ScopedJoinHandle<'scope, Result<(), SessionError>>),
    /// Why they could not be started.
    None(String),
}

impl<'scope, 'env> HelperThreads<'scope, 'env> {
    pub(super) fn new(scope: &'scope Scope<'scope, 'env>, duties: Duties<'env>) -> Self {
        Self { scope, threads: Threads::NotYet(duties) }
    }

    /// Starts the threads if they do not run yet.
    ///
    /// # Errors
    /// If they cannot be started. Every later call then fails too.
    pub(super) fn start(&mut self) -> Result<(), SessionError> {
        let unknown = Threads::None("it was interrupted".to_owned());
        self.threads = match std::mem::replace(&mut self.threads, unknown) {
            Threads::NotYet(duties) => {
                let scope = self.scope;
                let thread = thread::Builder::new().name("events".to_owned());
                match thread.spawn_scoped(scope, move || run_event_loop(duties)) {
                    Ok(thread) => Threads::Running(thread),
                    Err(error) => Threads::None(error.to_string()),
                }
            }
            started => started,
        };
        match &self.threads {
            Threads::None(why) => Err(events(why)),
            Threads::NotYet(_) | Threads::Running(_) => Ok(()),
        }
    }

    /// Starts a thread beside those.
    ///
    /// # Errors
    /// If it cannot be started.
    pub(super) fn spawn<T: Send + 'scope>(
        &self,
        name: &str,
        work: impl FnOnce() -> T + Send + 'scope,
    ) -> std::io::Result<ScopedJoinHandle<'scope, T>> {
        thread::Builder::new().name(name.to_owned()).spawn_scoped(self.scope, work)
    }

    /// Waits for the event loop's thread to end. The caller has signalled [`Duties::done`].
    ///
    /// # Errors
    /// Those of the event loop.
    pub(super) fn join(self) -> Result<(), SessionError> {
        match self.threads {
            Threads::Running(thread) => thread.join().map_err(|_| SessionError::Lost)?,
            Threads::NotYet(_) | Threads::None(_) => Ok(()),
        }
    }
}

fn run_event_loop(duties: Duties<'_>) -> Result<(), SessionError> {
    let Duties { subscribers, done, inbox } = duties;
    let result = wait(subscribers, done);
    if result.is_err() {
        // Without the event loop signals are no longer handled, so the session ends. Posting fails only if the machine
        // has ended already.
        let _ = inbox.post(Request::Stop);
    }
    result
}

/// Runs the event loop until the machine is done.
fn wait(subscribers: Vec<Subscriber>, done: &EventFd) -> Result<(), SessionError> {
    let mut manager = EventManager::<Subscriber>::new().map_err(events)?;
    for subscriber in subscribers {
        manager.add_subscriber(subscriber);
    }
    // Reading resets the counter, so only one read succeeds.
    while done.read().is_err() {
        manager.run().map_err(events)?;
    }
    // The last answers may not have been sent yet.
    manager.run_with_timeout(0).map(drop).map_err(events)
}
