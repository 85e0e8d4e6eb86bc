//! Computes the tick audit's summaries.

use guest_abi::report::Header;

use super::{Summary, Tally, TickAudit, TimerSummary, TimerTally, WatchdogSummary};

impl TickAudit {
    /// The counts so far; none if the guest has made no ring that can be read.
    #[must_use]
    pub fn summary(&self) -> Option<Summary> {
        let Tally {
            ticks,
            missing,
            overrun,
            malformed,
            early_wakes,
            taken_early,
            early_by_host,
            armed_late,
            worst_armed_late_ns,
            clock_errors,
            worst_clock_error_ns,
            intervals,
        } = self.tally;
        let headers = || self.rings.iter().filter_map(|ring| ring.header.as_ref());
        headers().next()?;
        let sum = |of: fn(&Header) -> u64| headers().map(of).fold(0, u64::saturating_add);
        // The ticks in a ring that cannot be read cannot be counted.
        let read = || self.rings.iter().filter(|ring| !ring.broken);
        let expected = read().filter_map(|ring| ring.header.as_ref()).map(|header| header.expected);
        Some(Summary {
            ticks: ticks.saturating_add(overrun),
            expected: expected.fold(0, u64::saturating_add),
            next_seq: read().filter_map(|ring| ring.next_seq).fold(0, u64::saturating_add),
            missing: missing.saturating_sub(overrun),
            unread: overrun,
            malformed,
            early_wakes,
            taken_early,
            early_by_host,
            late_by_guest: self.late_by_guest.sum_up(),
            late_by_host: self.late_by_host.sum_up(),
            armed_late,
            worst_armed_late_ns,
            interval_ratio: (intervals.count != 0).then(|| ratio(intervals.lasted_ns, intervals.asked_ns)),
            clock_steps_back: sum(|header| header.clock_steps_back),
            worst_step_back_ns: headers().map(|header| header.worst_step_back_ns).max().unwrap_or(0),
            clock_errors,
            worst_clock_error_ns,
            guest_stopped_seen: sum(|header| header.guest_stopped_seen),
            ipis_sent: sum(|header| header.ipis_sent),
            ipis_received: sum(|header| header.ipis_received),
            vmclock_wrong: sum(|header| header.vmclock_wrong),
            watchdog: headers().find_map(|header| WatchdogSummary::of(&header.watchdog)),
        })
    }

    /// Counts of the timer interrupts of the VMM's own LAPICs.
    #[must_use]
    pub fn timer(&self) -> TimerSummary {
        let TimerTally { interrupts, early, late } = &self.timer;
        TimerSummary { interrupts: *interrupts, early: *early, late: late.sum_up() }
    }

    /// Whether the guest's image names the address of a tick ring, and no ring of another layout was found there. The
    /// guest may not have created it yet.
    #[must_use]
    pub fn announces_ring(&self) -> bool {
        self.ring.is_some() && self.other.is_none()
    }

    /// Why there is no ring to read, as text.
    #[must_use]
    pub fn why_no_ring(&self) -> String {
        match (self.ring, self.other) {
            (None, _) => "the guest has no tick ring".to_owned(),
            (Some(_), None) => "the guest has not made its tick ring".to_owned(),
            (Some(_), Some((cpu, other))) => format!("the tick ring of CPU {cpu} is not read: {other}"),
        }
    }
}

#[allow(clippy::cast_precision_loss, reason = "a ratio for people, to three digits")]
fn ratio(a: u128, b: u128) -> f64 {
    a as f64 / b as f64
}
