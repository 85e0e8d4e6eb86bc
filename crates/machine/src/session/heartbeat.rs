//! A line at a fixed interval, which shows the reader of a log that a long run has not stopped.

use std::time::Duration;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vmm_sys_util::{errno, timerfd::TimerFd};
use vmtime::Length;

use super::request::{Inbox, Request};
use crate::{machine::Machine, say};

/// Asks the machine's thread for a line at a fixed interval of wall time.
pub(super) struct Heartbeat {
    timer: TimerFd,
    every: Duration,
    beats: u32,
    inbox: Inbox,
}

impl Heartbeat {
    /// Starts the timer.
    pub(super) fn new(every: Duration, inbox: Inbox) -> errno::Result<Self> {
        let mut timer = TimerFd::new()?;
        timer.reset(every, Some(every))?;
        Ok(Self { timer, every, beats: 0, inbox })
    }
}

impl MutEventSubscriber for Heartbeat {
    fn process(&mut self, _: Events, _: &mut EventOps) {
        if let Ok(expirations) = self.timer.wait() {
            self.beats = self.beats.saturating_add(u32::try_from(expirations).unwrap_or(u32::MAX));
            // Posting fails only if the machine has ended already.
            let _ = self.inbox.post(Request::Heartbeat(self.every.saturating_mul(self.beats)));
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new(&self.timer, EventSet::IN)) {
            log::error!("cannot wait for the heartbeat: {error}");
        }
    }
}

/// Says how far `machine` is after so much wall time.
pub(super) fn say(machine: &Machine, after: Duration) {
    let state = if machine.is_paused() { "paused" } else { "running" };
    let vm = Length(Duration::from_nanos(machine.vm_time().0 / 1000 * 1000));
    let ticks = machine.ticks_read().map(|ticks| format!(", {ticks} ticks")).unwrap_or_default();
    let (after, migrations) = (Length(after), machine.migrations());
    say!("vmm: {state} after {after}: VM time {vm}{ticks}, migrations {migrations}");
}
