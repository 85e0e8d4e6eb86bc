//! How a vCPU's thread is called: out of KVM_RUN, or out of its sleep.
//!
//! Whoever has something for a vCPU (an IPI, a request to stop) puts it where that vCPU looks, then rings. A ring is
//! remembered until the vCPU looks, so that none is lost between looking and sleeping or entering the guest.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::{
    host::kick::{self, Kicker},
    machine::lock::Ranked,
};

/// One vCPU's bell.
#[derive(Default)]
pub struct Doorbell {
    rung: AtomicBool,
    runner: Ranked<Option<Kicker>, 12>,
}

impl Doorbell {
    /// Calls the vCPU's thread.
    pub fn ring(&self) {
        // A ring that was not looked at yet has kicked already. Kicks are queued signals: a guest that sends messages in a
        // loop must not fill the host's queue.
        if self.rung.swap(true, Ordering::SeqCst) {
            return;
        }
        if let Some(runner) = &*self.runner.lock() {
            runner.kick();
        }
    }

    /// The calling thread runs the vCPU from now on. It looks after that for what was rung for before.
    pub fn attach(&self) {
        *self.runner.lock() = Some(Kicker::for_this_thread());
    }

    /// No thread runs the vCPU.
    pub fn detach(&self) {
        *self.runner.lock() = None;
    }

    /// Forgets rings so far: call before looking at what they might be about.
    pub fn clear(&self) {
        self.rung.store(false, Ordering::SeqCst);
    }

    /// The attached thread sleeps until it is rung, or kicked otherwise. May wake early.
    pub fn sleep(&self) {
        // A ring that comes after this test kicks the thread, so that kick::wait returns at once.
        if !self.rung.load(Ordering::SeqCst) {
            kick::wait();
        }
    }
}
