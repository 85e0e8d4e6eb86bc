//! Makes a vCPU's thread leave KVM_RUN, or its sleep.
//!
//! A thread that has an IPI or a request for a vCPU first stores it where the vCPU's loop reads it, then rings. The
//! ring stays set until the loop clears it, so that none is lost between the loop's check and its sleep or KVM_RUN.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::{
    host::kick::{self, Kicker},
    machine::lock::Ranked,
};

/// The doorbell of one vCPU.
#[derive(Default)]
pub struct Doorbell {
    rung: AtomicBool,
    runner: Ranked<Option<Kicker>, 12>,
}

impl Doorbell {
    /// Kicks the vCPU's thread.
    pub fn ring(&self) {
        // A ring that is still set has kicked already. Kicks are queued signals: a guest that sends messages in a
        // loop must not fill the host's queue.
        if self.rung.swap(true, Ordering::SeqCst) {
            return;
        }
        if let Some(runner) = &*self.runner.lock() {
            runner.kick();
        }
    }

    /// The calling thread runs the vCPU from now on. It must check for messages and requests after this call: earlier
    /// rings kicked no thread.
    pub fn attach(&self) {
        *self.runner.lock() = Some(Kicker::for_this_thread());
    }

    /// No thread runs the vCPU.
    pub fn detach(&self) {
        *self.runner.lock() = None;
    }

    /// Clears the ring. Call it before checking for messages and requests: one that comes after the check rings again.
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
