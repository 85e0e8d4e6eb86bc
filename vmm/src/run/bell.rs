//! How a vCPU's thread is called: out of KVM_RUN, or out of its sleep.
//!
//! Whoever has something for a vCPU (an IPI, a request to stop) puts it where that vCPU looks, then rings. A ring is
//! remembered until the vCPU looks, so that none is lost between looking and sleeping or entering the guest.

use std::{
    sync::{Condvar, Mutex, PoisonError},
    time::Duration,
};

use super::platform::lock;
use crate::kvm::kick::Kicker;

/// One vCPU's bell.
#[derive(Default)]
pub struct Bell {
    state: Mutex<State>,
    heard: Condvar,
}

#[derive(Default)]
struct State {
    rung: bool,
    runner: Option<Kicker>,
}

impl Bell {
    /// Calls the vCPU's thread.
    pub fn ring(&self) {
        let mut state = lock(&self.state);
        // A ring that was not looked at yet has kicked already. Kicks are queued signals: a guest that sends messages in a
        // loop must not fill the host's queue.
        if std::mem::replace(&mut state.rung, true) {
            return;
        }
        self.heard.notify_all();
        if let Some(runner) = &state.runner {
            runner.kick();
        }
    }

    /// The calling thread runs the vCPU from now on.
    pub fn attach(&self) {
        lock(&self.state).runner = Some(Kicker::for_this_thread());
    }

    /// No thread runs the vCPU.
    pub fn detach(&self) {
        lock(&self.state).runner = None;
    }

    /// Forgets rings so far: call before looking at what they might be about.
    pub fn hush(&self) {
        lock(&self.state).rung = false;
    }

    /// Sleeps until it is rung or `limit` is over; no limit = until it is rung. May wake early.
    pub fn sleep(&self, limit: Option<Duration>) {
        let state = lock(&self.state);
        if state.rung {
            return;
        }
        match limit {
            Some(limit) => drop(self.heard.wait_timeout(state, limit).unwrap_or_else(PoisonError::into_inner)),
            None => drop(self.heard.wait(state).unwrap_or_else(PoisonError::into_inner)),
        }
    }
}
