//! What each check makes of the counts.

use std::time::Duration;

use vmtime::Length;

use super::{
    super::{GuestStopped, Lateness, Summary, TimerSummary},
    Check, CheckResult, Evidence,
};

impl Check {
    pub(super) fn check(self, evidence: &Evidence<'_>) -> CheckResult {
        match self {
            Self::Stopped => return Self::check_guest_stopped(&evidence.guest_stopped),
            Self::Wall(limit) => return Self::check_wall(limit, evidence.wall_error_ns),
            Self::Vmclock(limit) => return Self::check_vmclock(limit, evidence),
            _ => {}
        }
        match (evidence.ticks, evidence.timer) {
            (Some(ticks), _) => self.check_ticks(ticks, evidence.ended),
            (None, Some(timer)) if timer.interrupts != 0 => self.check_timer(timer, evidence.no_ring),
            _ => CheckResult::NotJudged(evidence.no_ring.to_owned()),
        }
    }

    fn check_ticks(self, ticks: &Summary, ended: bool) -> CheckResult {
        match self {
            Self::Late(limit) => {
                let accounts = [("guest", ticks.late_by_guest), ("host", ticks.late_by_host)];
                let worst = accounts.into_iter().filter_map(|(who, late)| Some((late?.worst_ns, who)));
                match worst.max_by_key(|(ns, _)| *ns) {
                    Some((worst, who)) => {
                        let found = within(limit, worst, &format!("the latest tick, by the {who}'s clock, was"));
                        match found {
                            CheckResult::Pass(_) if ticks.unread != 0 => CheckResult::NotJudged(format!(
                                "{} ticks were overwritten in the tick ring before they were read",
                                ticks.unread
                            )),
                            found => found,
                        }
                    }
                    None => CheckResult::NotJudged("there was no tick".to_owned()),
                }
            }
            Self::Early => none_of(&[
                (ticks.early_wakes, "interrupts before their tick's expiry"),
                (ticks.taken_early, "ticks taken before their expiry"),
                (ticks.early_by_host, "ticks injected before their expiry by the host's account"),
            ]),
            Self::Lost => none_of(&[(ticks.lost(ended), "ticks that did not come")]),
            Self::Clock => {
                let found = none_of(&[(ticks.clock_steps_back, "readings of the guest's clock below the one before")]);
                found.because(|| format!("at worst by {}", time(ticks.worst_step_back_ns)))
            }
            Self::Accounts => {
                let found = none_of(&[
                    (ticks.clock_errors, "ticks at an instant that cannot be by the host's account"),
                    (ticks.malformed, "records in the tick ring that are none"),
                ]);
                let worst = time(ticks.worst_clock_error_ns.unsigned_abs());
                let side = if ticks.worst_clock_error_ns < 0 { "behind" } else { "ahead" };
                if ticks.clock_errors == 0 {
                    found
                } else {
                    found.because(|| format!("the guest's clock at worst {worst} {side}"))
                }
            }
            Self::Watchdog => Self::check_watchdog(ticks),
            Self::Stopped | Self::Wall(_) | Self::Vmclock(_) => CheckResult::NotJudged("it needs no ticks".to_owned()),
        }
    }

    fn check_guest_stopped(found: &GuestStopped) -> CheckResult {
        let GuestStopped { set, cleared, never_cleared, in_resumes } = *found;
        if set == 0 {
            CheckResult::NotJudged("PVCLOCK_GUEST_STOPPED was not set: no resume, or no kvmclock page".to_owned())
        } else if never_cleared == 0 {
            CheckResult::Pass(format!("PVCLOCK_GUEST_STOPPED was set {set} times, and found cleared {cleared} times"))
        } else {
            CheckResult::Fail(format!(
                "PVCLOCK_GUEST_STOPPED was never cleared: vCPUs {never_cleared}, resumes {in_resumes}"
            ))
        }
    }

    fn check_wall(limit: Duration, error_ns: Option<i64>) -> CheckResult {
        let Some(error_ns) = error_ns else {
            return CheckResult::NotJudged(
                "the guest has not asked for the wall clock, or its VM time does not run in real time, or its wall clock \
                 is KVM's"
                    .to_owned(),
            );
        };
        beside_host("the guest's time of day", error_ns, limit)
    }

    fn check_vmclock(limit: Duration, evidence: &Evidence<'_>) -> CheckResult {
        let wrong = evidence.ticks.map_or(0, |ticks| ticks.vmclock_wrong);
        let wrong = none_of(&[(
            wrong,
            "intervals that VMClock and kvmclock measured differently, without a new disruption marker",
        )]);
        match (wrong, evidence.vmclock_error_ns) {
            (wrong @ CheckResult::Fail(_), _) => wrong,
            (_, Some(error_ns)) => beside_host("UTC by VMClock", error_ns, limit),
            (_, None) => CheckResult::NotJudged(
                "the guest has no VMClock page (--vmclock on), or its VM time does not run in real time".to_owned(),
            ),
        }
    }

    fn check_watchdog(ticks: &Summary) -> CheckResult {
        let Some(found) = &ticks.watchdog else {
            return CheckResult::NotJudged(
                "the guest has no clocksource watchdog (scenario=watchdog), or it made no check".to_owned(),
            );
        };
        let skew = format!(
            "at worst {} ns in {} of {} checks",
            found.worst_skew_ns,
            time(found.worst_interval_ns),
            found.checks
        );
        if found.unstable.is_empty() {
            CheckResult::Pass(format!("clocksources that the guest's watchdog marked unstable: 0, {skew}"))
        } else {
            let names = found.unstable.join(", ");
            CheckResult::Fail(format!("the guest's watchdog marked clocksources unstable: {names}, {skew}"))
        }
    }

    /// Checks timer interrupts, where there are no ticks: they can be late or early, and nothing else.
    fn check_timer(self, timer: &TimerSummary, no_ring: &str) -> CheckResult {
        match (self, timer.late) {
            (Self::Late(limit), Some(Lateness { worst_ns, .. })) => {
                within(limit, worst_ns, "the latest timer interrupt, by the host's account, was")
            }
            (Self::Early, _) => none_of(&[(timer.early, "timer interrupts before their time")]),
            (
                Self::Late(_)
                | Self::Lost
                | Self::Clock
                | Self::Accounts
                | Self::Watchdog
                | Self::Stopped
                | Self::Wall(_)
                | Self::Vmclock(_),
                _,
            ) => CheckResult::NotJudged(no_ring.to_owned()),
        }
    }
}

impl CheckResult {
    /// Adds `why` to the reason of a failure.
    fn because(self, why: impl FnOnce() -> String) -> Self {
        match self {
            Self::Fail(reason) => Self::Fail(format!("{reason}, {}", why())),
            found => found,
        }
    }
}

fn none_of(counts: &[(u64, &str)]) -> CheckResult {
    let text = |(count, what): &(u64, &str)| format!("{what}: {count}");
    let some: Vec<String> = counts.iter().filter(|(count, _)| *count != 0).map(text).collect();
    if some.is_empty() {
        CheckResult::Pass(counts.iter().map(text).collect::<Vec<_>>().join(", "))
    } else {
        CheckResult::Fail(some.join(", "))
    }
}

fn beside_host(what: &str, error_ns: i64, limit: Duration) -> CheckResult {
    let side = if error_ns < 0 { "behind" } else { "ahead of" };
    let off = time(error_ns.unsigned_abs());
    let text = format!("{what} is {off} {side} the host's, the limit is {}", Length(limit));
    if Duration::from_nanos(error_ns.unsigned_abs()) > limit {
        CheckResult::Fail(text)
    } else {
        CheckResult::Pass(text)
    }
}

fn within(limit: Duration, worst_ns: u64, what: &str) -> CheckResult {
    let text = format!("{what} {} late, the limit is {}", time(worst_ns), Length(limit));
    if Duration::from_nanos(worst_ns) > limit { CheckResult::Fail(text) } else { CheckResult::Pass(text) }
}

fn time(ns: u64) -> String {
    Length(Duration::from_nanos(ns)).to_string()
}
