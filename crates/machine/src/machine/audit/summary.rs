//! The summaries of a guest's ticks and timer interrupts, as results show them.

use guest_abi::report::{UNSTABLE_KVMCLOCK, UNSTABLE_TSC, Watchdog};
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

/// Counts of ticks, and their lateness. Times are nanoseconds of VM time.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Summary {
    /// Ticks handled.
    pub ticks: u64,
    /// Ticks that the scenario is to make in all, on all CPUs; 0 = without end.
    pub expected: u64,
    /// Ticks since boot, by the sequence numbers in the guest's records.
    pub next_seq: u64,
    /// Gaps in the ticks' numbers.
    pub missing: u64,
    /// Records overwritten before they were read; they count as ticks of unknown lateness.
    pub unread: u64,
    /// Records whose bytes cannot be a record.
    pub malformed: u64,
    /// Interrupts that were delivered before their tick's expiry.
    pub early_wakes: u64,
    /// Ticks that the guest took before their expiry, by its own clock.
    pub taken_early: u64,
    /// Ticks that the host injected before their expiry by its reference clock, although the guest took them as due.
    pub early_by_host: u64,
    /// Lateness as the guest saw it, after the expiry; none without a tick.
    pub late_by_guest: Option<Lateness>,
    /// Lateness of the injection as the host saw it; none if the host injected nothing. Where the LAPIC is KVM's,
    /// lateness of the handler's TSC by the page that KVM wrote; none if there was no page.
    pub late_by_host: Option<Lateness>,
    /// Ticks that were late before the guest armed them.
    pub armed_late: u64,
    /// By how much the worst of them was.
    pub worst_armed_late_ns: u64,
    /// How long armed intervals lasted as a fraction of what was asked, since the last restore; none if none was armed.
    pub interval_ratio: Option<f64>,
    /// kvmclock readings smaller than the one before.
    pub clock_steps_back: u64,
    /// The worst of them.
    pub worst_step_back_ns: u64,
    /// Ticks whose instant by the guest contradicts the host's reference clock.
    pub clock_errors: u64,
    /// The worst of them; positive = the guest's clock is ahead.
    pub worst_clock_error_ns: i64,
    /// How often the guest found GUEST_STOPPED.
    pub guest_stopped_seen: u64,
    /// Interrupts that the guest's CPUs sent each other.
    pub ipis_sent: u64,
    /// Those that arrived.
    pub ipis_received: u64,
    /// Intervals between two ticks that were longer or shorter by VMClock than by kvmclock, although its disruption
    /// marker had not changed.
    pub vmclock_wrong: u64,
    /// What the guest's clocksource watchdog found; none if it made no check.
    pub watchdog: Option<WatchdogSummary>,
}

/// What a guest's clocksource watchdog found since boot, by the guest's own account.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WatchdogSummary {
    /// Comparisons of a clocksource with the watchdog.
    pub checks: u64,
    /// Checks in which the watchdog could not be read fast enough.
    pub timed_out: u64,
    /// Names of the clocksources that it marked unstable.
    pub unstable: Vec<String>,
    /// The largest distance of an interval by a clocksource from the same by the watchdog.
    pub worst_skew_ns: i64,
    /// That interval, by the watchdog.
    pub worst_interval_ns: u64,
}

impl WatchdogSummary {
    pub(super) fn of(found: &Watchdog) -> Option<Self> {
        let Watchdog { checks, timed_out, unstable, worst_skew_ns, worst_interval_ns } = *found;
        let names = [(UNSTABLE_TSC, "tsc"), (UNSTABLE_KVMCLOCK, "kvmclock")];
        let marked = names.into_iter().filter(|(bit, _)| unstable & bit != 0);
        (checks != 0 || timed_out != 0).then(|| Self {
            checks,
            timed_out,
            unstable: marked.map(|(_, name)| name.to_owned()).collect(),
            worst_skew_ns,
            worst_interval_ns,
        })
    }
}

impl Summary {
    /// Ticks that never came: gaps, and those still missing when the scenario ended.
    #[must_use]
    pub fn lost(&self, ended: bool) -> u64 {
        let not_made = if ended && self.expected != 0 { self.expected.saturating_sub(self.next_seq) } else { 0 };
        self.missing.saturating_add(not_made)
    }
}

/// The timer interrupts of the VMM's own LAPICs, by the host's reference clock alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct TimerSummary {
    /// How many entered the guest.
    pub interrupts: u64,
    /// Those that entered before the instant that the timer was armed for.
    pub early: u64,
    /// How long after that instant the others entered; none if no interrupt waited for an instant.
    pub late: Option<Lateness>,
}

/// A distribution of lateness, in nanoseconds of VM time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lateness {
    /// Half of the ticks were at most this late.
    pub p50_ns: u64,
    /// 99 of 100 were.
    pub p99_ns: u64,
    /// The worst.
    pub worst_ns: u64,
}

/// The distribution of the latenesses so far. Three significant digits, but the worst is exact. Its memory grows with
/// the logarithm of the largest value only.
#[derive(Debug)]
pub(crate) struct Latenesses {
    histogram: Histogram<u64>,
    worst_ns: u64,
}

impl Latenesses {
    #[allow(clippy::expect_used, reason = "3 is a constant within the crate's documented range of 0 to 5")]
    pub(crate) fn new() -> Self {
        Self { histogram: Histogram::new(3).expect("three significant digits"), worst_ns: 0 }
    }

    pub(crate) fn add(&mut self, ns: u64) {
        // The histogram grows as needed, to some hundred kilobytes for the largest u64. It accepts every value.
        let _ = self.histogram.record(ns);
        self.worst_ns = self.worst_ns.max(ns);
    }

    /// None without any.
    pub(crate) fn sum_up(&self) -> Option<Lateness> {
        let quantile = |quantile| self.histogram.value_at_quantile(quantile).min(self.worst_ns);
        (!self.histogram.is_empty()).then(|| Lateness {
            p50_ns: quantile(0.5),
            p99_ns: quantile(0.99),
            worst_ns: self.worst_ns,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // The histogram's own maximum is that of a bucket: a limit of 10ms was passed by a tick 9.9999 ms late.
    #[test]
    fn the_worst_is_exact_and_no_quantile_above_it() {
        let mut late = Latenesses::new();
        assert_eq!(late.sum_up(), None);
        late.add(9_999_900);
        assert_eq!(late.sum_up(), Some(Lateness { p50_ns: 9_999_900, p99_ns: 9_999_900, worst_ns: 9_999_900 }));
    }
}
