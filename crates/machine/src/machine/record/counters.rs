//! Counters of what a run costs the host.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use crate::kvm::Calls;

/// Counts of one machine, over all vCPUs. They continue across a migration in process.
#[derive(Debug, Default)]
pub struct Counters {
    /// Times that a vCPU's timer was set.
    pub(crate) timers_set: AtomicU64,
    /// Times that a vCPU's thread slept.
    pub(crate) sleeps: AtomicU64,
    /// Host nanoseconds spent polling the TSC for a deadline.
    pub(crate) polled_ns: AtomicU64,
    entries: AtomicU64,
    exits: AtomicU64,
    vcpu_ioctls: AtomicU64,
}

/// The values of [`Counters`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Costs {
    /// Times that KVM_RUN was called.
    pub entries: u64,
    /// Times that KVM_RUN returned because of the guest, and not because of a signal.
    pub exits: u64,
    /// Other ioctls of the vCPUs while the machine ran.
    pub vcpu_ioctls: u64,
    /// Times that a vCPU's thread slept.
    pub sleeps: u64,
    /// Times that a vCPU's timer was set.
    pub timers_set: u64,
    /// Host time spent polling for a deadline, in nanoseconds.
    pub polled_ns: u64,
}

impl Counters {
    /// Adds the counts of a vCPU.
    pub(crate) fn add(&self, calls: Calls) {
        let Calls { entries, exits, others } = calls;
        for (counter, count) in [(&self.entries, entries), (&self.exits, exits), (&self.vcpu_ioctls, others)] {
            counter.fetch_add(count, Ordering::Relaxed);
        }
    }

    /// The counts so far. Those of a vCPU are added when its run ends.
    #[must_use]
    pub fn read(&self) -> Costs {
        let Self { timers_set, sleeps, polled_ns, entries, exits, vcpu_ioctls } = self;
        let [entries, exits, vcpu_ioctls, sleeps, timers_set, polled_ns] =
            [entries, exits, vcpu_ioctls, sleeps, timers_set, polled_ns].map(|counter| counter.load(Ordering::Relaxed));
        Costs { entries, exits, vcpu_ioctls, sleeps, timers_set, polled_ns }
    }
}
