//! The guest's results: the tick ring's records and counters, and the trait that stores them.
//!
//! The layout is `guest_abi::report`. The kernel stores it, behind [`Sink`].

use core::hint::cold_path;

use guest_abi::report::Record;

/// Stores results.
pub trait Sink {
    /// Stores record number `record.seq` in its slot, then the count of records written.
    fn push(&mut self, record: &Record);
    /// Stores how often the clock stepped back, and the worst step in nanoseconds.
    fn set_clock_steps_back(&mut self, count: u64, worst_ns: u64);
    /// Stores how often PVCLOCK_GUEST_STOPPED was seen.
    fn set_guest_stopped_seen(&mut self, count: u64);
}

/// Totals of a run, for the last message.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Ticks handled.
    pub ticks: u64,
    /// Interrupts that came before their expiry.
    pub early_wakes: u64,
    /// Largest `fired_ns - expires_ns`, counting from the arming for a tick that was armed when already due.
    pub worst_late_ns: u64,
}

impl Totals {
    /// No tick yet.
    pub const NONE: Self = Self { ticks: 0, early_wakes: 0, worst_late_ns: 0 };

    /// Adds one tick, which did not fire before its expiry. Its early wakes are added when there are any.
    #[inline(always)]
    pub fn add(&mut self, record: &Record) {
        self.ticks += 1;
        if record.fired_ns.wrapping_sub(record.expires_ns) > self.worst_late_ns {
            cold_path();
            // A tick whose expiry lay in the past when it was armed could not have fired then.
            let due = record.expires_ns.max(record.armed_ns);
            self.worst_late_ns = self.worst_late_ns.max(record.fired_ns.saturating_sub(due));
        }
    }
}
