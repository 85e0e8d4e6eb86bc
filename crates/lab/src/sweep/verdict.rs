//! What a migration did to the ticks after it.

use machine::audit::Handled;
use serde::{Deserialize, Serialize};
use vmtime::{GuestTsc, ReferenceClock, TscAdjust};

/// The worst thing that happened; from harmless to fatal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Every tick came in time.
    OnTime,
    /// An interrupt came too early, and the guest armed its timer again. This costs time and does no harm.
    Rearmed,
    /// The restore did not set PVCLOCK_GUEST_STOPPED, the flag that reports the stop to the guest.
    Untold,
    /// A tick came late.
    Late,
    /// The guest's clocksource watchdog marked a clocksource unstable.
    Unstable,
    /// The guest was woken early again and again, without end in sight: its clock and its timer disagree.
    Storm,
    /// The guest's clock stepped, or runs at the wrong rate: kvmclock, or real time by VMClock.
    ClockStepped,
    /// A tick did not come before the run's patience was over.
    Lost,
    /// The guest crashed, or ended too soon.
    Ended,
}

impl Verdict {
    /// All, from harmless to fatal.
    pub const ALL: [Self; 9] = [
        Self::OnTime,
        Self::Rearmed,
        Self::Untold,
        Self::Late,
        Self::Unstable,
        Self::Storm,
        Self::ClockStepped,
        Self::Lost,
        Self::Ended,
    ];

    /// The name in result files.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::OnTime => "on-time",
            Self::Rearmed => "rearmed",
            Self::Untold => "untold",
            Self::Late => "late",
            Self::Unstable => "unstable",
            Self::Storm => "storm",
            Self::ClockStepped => "clock-stepped",
            Self::Lost => "lost",
            Self::Ended => "ended",
        }
    }

    /// Whether it harms the guest.
    #[must_use]
    pub fn is_bad(self) -> bool {
        self > Self::Rearmed
    }
}

/// What a migration did to the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Outcome {
    /// The worst thing that happened.
    pub verdict: Verdict,
    /// Interrupts that came before their tick's expiry.
    pub early_wakes: u64,
    /// How late the latest tick was, by the guest's clock or the host's, whichever shows more; none if no tick came.
    pub late_ns: Option<u64>,
    /// The largest difference between the guest's clock and the reference clock; positive = the guest's is ahead.
    pub clock_error_ns: i64,
    /// With a recipe: how far each vCPU's kvmclock page was ahead of its TSC, right after the restore; none for a vCPU
    /// without a page.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub page_errors_ns: Vec<Option<i64>>,
    /// The guest's clocksource watchdog marked a clocksource unstable, whatever else happened.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unstable: bool,
    /// VMClock told the guest a wrong real time and of no disruption, whatever else happened.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub wrong_time: bool,
    /// Why the guest ended, if it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<String>,
}

/// What the ticks after a migration are compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Measure {
    /// Lateness that ticks have without a migration.
    pub usual_late_ns: u64,
    /// Early wakes that they have without a migration.
    pub usual_early_wakes: u64,
    /// By how much lateness may exceed the usual.
    pub tolerance_ns: u64,
}

/// How far a reading of the guest's clock may be from the reference clock: the page rounds each reading down by up to
/// 2 ns and drifts by up to 1 ppb, which in the seconds of a sweep is a few nanoseconds more.
const CLOCKS_AGREE_NS: u64 = 100;

/// The reference clock of VM time, before and after migrations: each migration replaces it.
#[derive(Clone, Debug)]
pub(super) struct ClockHistory {
    /// Former clocks, each with the last guest TSC that it is valid for.
    pub before: Vec<(ReferenceClock, GuestTsc)>,
    /// The present clock.
    pub now: ReferenceClock,
    /// How far the restore set each CPU's TSC ahead of the one that the present clock is of; empty: not at all.
    pub ahead: Vec<TscAdjust>,
}

impl ClockHistory {
    /// VM time when the TSC of CPU `cpu` was `tsc`.
    fn at(&self, cpu: usize, tsc: GuestTsc) -> u64 {
        match self.before.iter().find(|(_, last)| tsc <= *last) {
            Some((clock, _)) => clock.at(tsc).0,
            None => self.now.at(self.ahead.get(cpu).map_or(tsc, |ahead| ahead.to_base(tsc))).0,
        }
    }
}

/// How the guest's own counters changed after the migration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counted {
    /// Readings of its clock that were smaller than the one before.
    pub steps_back: u64,
    /// The worst of them, since boot.
    pub worst_step_back_ns: u64,
    /// Some ticking CPU never saw GUEST_STOPPED.
    pub untold: bool,
    /// Its watchdog marked a clocksource unstable.
    pub unstable: bool,
    /// VMClock went another way than kvmclock, without a disruption.
    pub wrong_time: bool,
}

/// Why the run after the migration stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Finish {
    /// All ticks that were waited for came.
    Handled,
    /// Some did not come.
    Missing,
    /// Timer interrupts came without end.
    Storm,
    /// The guest ended, for this reason.
    Ended(String),
}

impl Measure {
    /// Returns the verdict on the ticks after a migration, and the numbers it rests on.
    pub(super) fn verdict(
        &self,
        ticks: &[Handled],
        clocks: &ClockHistory,
        counted: Counted,
        finish: Finish,
    ) -> Outcome {
        let mut early_wakes = 0u64;
        let mut late_ns = None;
        let mut clock_error_ns = 0i64;
        for Handled { cpu, record, host } in ticks {
            early_wakes = early_wakes.saturating_add(u64::from(record.early_wakes));
            // A tick armed after its expiry could not have come sooner.
            let due_ns = record.expires_ns.max(record.armed_ns);
            let at = host.map_or(record.fired_ns, |host| host.0.max(record.fired_ns));
            late_ns = late_ns.max(Some(at.saturating_sub(due_ns)));
            let error = difference(record.fired_ns, clocks.at(*cpu, GuestTsc(record.fired_tsc)));
            if error.unsigned_abs() > clock_error_ns.unsigned_abs() {
                clock_error_ns = error;
            }
        }
        if counted.steps_back != 0 {
            let back = i64::try_from(counted.worst_step_back_ns).unwrap_or(i64::MAX).saturating_neg();
            if back.unsigned_abs() > clock_error_ns.unsigned_abs() {
                clock_error_ns = back;
            }
        }
        let late = late_ns.unwrap_or(0) > self.usual_late_ns.saturating_add(self.tolerance_ns);
        // From fatal to harmless: the first arm that applies is the worst thing that happened.
        let verdict = match &finish {
            Finish::Ended(_) => Verdict::Ended,
            Finish::Missing => Verdict::Lost,
            Finish::Handled | Finish::Storm
                if counted.steps_back != 0 || counted.wrong_time || clock_error_ns.unsigned_abs() > CLOCKS_AGREE_NS =>
            {
                Verdict::ClockStepped
            }
            Finish::Storm => Verdict::Storm,
            Finish::Handled if counted.unstable => Verdict::Unstable,
            Finish::Handled if late => Verdict::Late,
            Finish::Handled if counted.untold => Verdict::Untold,
            Finish::Handled if early_wakes > self.usual_early_wakes => Verdict::Rearmed,
            Finish::Handled => Verdict::OnTime,
        };
        let ended = match finish {
            Finish::Ended(reason) => Some(reason),
            Finish::Handled | Finish::Missing | Finish::Storm => None,
        };
        let page_errors_ns = Vec::new();
        let Counted { unstable, wrong_time, .. } = counted;
        Outcome { verdict, early_wakes, late_ns, clock_error_ns, page_errors_ns, unstable, wrong_time, ended }
    }
}

/// `a - b`, saturating.
fn difference(a: u64, b: u64) -> i64 {
    let distance = i64::try_from(a.abs_diff(b)).unwrap_or(i64::MAX);
    if a >= b { distance } else { distance.saturating_neg() }
}

#[cfg(test)]
mod tests {
    use guest_abi::report::Record;
    use vmtime::{Khz, VmTime};

    use super::*;

    const MEASURE: Measure = Measure { usual_late_ns: 2_000, usual_early_wakes: 0, tolerance_ns: 10_000 };

    /// One nanosecond a tick up to TSC 1000, then half a nanosecond.
    fn clocks() -> ClockHistory {
        let slow = ReferenceClock::start(VmTime(0), GuestTsc(0), Khz::new(1_000_000).unwrap());
        let mut now = slow;
        now.rebase(GuestTsc(1_000), 0, GuestTsc(1_000), Khz::new(2_000_000).unwrap());
        ClockHistory { before: vec![(slow, GuestTsc(1_000))], now, ahead: Vec::new() }
    }

    fn tick(expires_ns: u64, fired_ns: u64, fired_tsc: u64) -> Handled {
        let record = Record { expires_ns, fired_ns, fired_tsc, ..Record::default() };
        Handled { cpu: 0, record, host: Some(VmTime(expires_ns)) }
    }

    fn verdict(ticks: &[Handled], counted: Counted, finish: Finish) -> Verdict {
        MEASURE.verdict(ticks, &clocks(), counted, finish).verdict
    }

    #[test]
    fn each_reading_is_compared_with_the_clock_valid_at_its_tsc() {
        // 900 is before the migration, 3000 after: 1000 ns + 2000 ticks at 2 GHz.
        let good = [tick(900, 900, 900), tick(1_900, 2_000, 3_000)];
        assert_eq!(verdict(&good, Counted::default(), Finish::Handled), Verdict::OnTime);
        // The old rate after the migration.
        let outcome = MEASURE.verdict(&[tick(1_900, 3_000, 3_000)], &clocks(), Counted::default(), Finish::Handled);
        assert_eq!((outcome.verdict, outcome.clock_error_ns), (Verdict::ClockStepped, 1_000));
    }

    // Catches: a TSC that a restore moved, taken for time that passed.
    #[test]
    fn a_reading_of_a_tsc_that_was_moved_is_compared_with_the_clock_of_the_others() {
        let clocks = ClockHistory { ahead: vec![TscAdjust(0), TscAdjust(400)], ..clocks() };
        let error = |cpu| {
            let tick = Handled { cpu, ..tick(1_900, 2_000, 3_000) };
            MEASURE.verdict(&[tick], &clocks, Counted::default(), Finish::Handled).clock_error_ns
        };
        // 400 ticks at 2 GHz.
        assert_eq!((error(0), error(1)), (0, 200));
    }

    #[test]
    fn the_worst_wins() {
        let late = tick(1_900, 14_000, 27_000);
        let early = Handled { record: Record { early_wakes: 1, ..tick(1_900, 2_000, 3_000).record }, ..late };
        let untold = Counted { untold: true, ..Counted::default() };
        let back = Counted { steps_back: 1, worst_step_back_ns: 7, ..Counted::default() };
        assert_eq!(verdict(&[early], Counted::default(), Finish::Handled), Verdict::Rearmed);
        assert_eq!(verdict(&[early], untold, Finish::Handled), Verdict::Untold);
        assert_eq!(verdict(&[late, early], untold, Finish::Handled), Verdict::Late);
        let unstable = Counted { unstable: true, ..untold };
        assert_eq!(verdict(&[late, early], unstable, Finish::Handled), Verdict::Unstable);
        assert_eq!(verdict(&[late], unstable, Finish::Storm), Verdict::Storm);
        assert_eq!(verdict(&[late], back, Finish::Storm), Verdict::ClockStepped);
        let wrong_time = Counted { wrong_time: true, ..unstable };
        assert_eq!(verdict(&[late], wrong_time, Finish::Handled), Verdict::ClockStepped);
        assert_eq!(verdict(&[late], back, Finish::Handled), Verdict::ClockStepped);
        assert_eq!(verdict(&[late], back, Finish::Missing), Verdict::Lost);
        assert_eq!(verdict(&[], back, Finish::Ended("crash".to_owned())), Verdict::Ended);
    }

    #[test]
    fn late_by_the_guests_or_the_hosts_clock_is_late() {
        let by_host = Handled { host: Some(VmTime(14_000)), ..tick(1_900, 2_000, 3_000) };
        let outcome = MEASURE.verdict(&[by_host], &clocks(), Counted::default(), Finish::Handled);
        assert_eq!((outcome.verdict, outcome.late_ns), (Verdict::Late, Some(12_100)));
    }

    #[test]
    fn verdicts_are_in_order_and_named_as_serialized() {
        assert!(Verdict::ALL.is_sorted());
        for verdict in Verdict::ALL {
            assert_eq!(serde_json::to_value(verdict).unwrap(), verdict.as_str());
        }
    }
}
