//! The end of a session that takes too long.

use std::time::Duration;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vmm_sys_util::{errno, timerfd::TimerFd};

use super::{
    ending,
    request::{Inbox, Request},
};

/// Ends the session when the time is over.
pub(super) struct Timeout {
    timer: TimerFd,
    after: Duration,
    inbox: Inbox,
}

impl Timeout {
    /// Starts the timer.
    pub(super) fn new(after: Duration, inbox: Inbox) -> errno::Result<Self> {
        let mut timer = TimerFd::new()?;
        timer.reset(after, None)?;
        Ok(Self { timer, after, inbox })
    }
}

impl MutEventSubscriber for Timeout {
    fn process(&mut self, _: Events, _: &mut EventOps) {
        if self.timer.wait().is_ok() {
            ending::soon();
            // Posting fails only if the machine has ended already.
            let _ = self.inbox.post(Request::TimedOut(self.after));
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new(&self.timer, EventSet::IN)) {
            log::error!("cannot wait for the timeout: {error}");
        }
    }
}
