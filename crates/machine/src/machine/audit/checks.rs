//! The checks that can fail a run, and their results.
//!
//! A check passes, fails, or has nothing to check. The last fails a run only if the user named that check: a guest
//! without a tick ring is no failure, but a test of its ticks that tested nothing is one.

use std::{fmt, str::FromStr, time::Duration};

use serde::{Serialize, Serializer};
use vmtime::Length;

use super::{GuestStopped, Lateness, Summary, TimerSummary};

/// One check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Check {
    /// No tick fired later after its expiry than this, by the guest's clock or by the host's.
    Late(Duration),
    /// No interrupt was delivered before its tick's expiry.
    Early,
    /// No tick is missing.
    Lost,
    /// The guest's clock never went back.
    Clock,
    /// The guest's records of its ticks agree with the host's clocks.
    Accounts,
    /// The guest's clocksource watchdog marked none unstable.
    Watchdog,
    /// Each vCPU on which PVCLOCK_GUEST_STOPPED was set has cleared it.
    Stopped,
}

/// The checks of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checks {
    checks: Vec<Check>,
    /// The user named them.
    requested: bool,
}

/// A list of checks that cannot be parsed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadCheck {
    /// No such check.
    #[error("there is no check {0:?}: there are late=TIME, early, lost, clock, accounts, watchdog, stopped; or none")]
    Unknown(String),
    /// `late` without a time.
    #[error("write late=TIME, for example late=1ms")]
    NoTime,
    /// Not a time.
    #[error("late={text}: {reason}")]
    Time {
        /// The text.
        text: String,
        /// Why it is no time.
        reason: String,
    },
    /// `none`, and others.
    #[error("none stands alone")]
    NoneAndOthers,
    /// Twice the same.
    #[error("{0} is there twice")]
    Twice(&'static str),
}

/// The result of a check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CheckResult {
    /// It passed; what was checked.
    Pass(String),
    /// It failed, for this reason.
    Fail(String),
    /// There was nothing to check, for this reason.
    NotJudged(String),
}

/// The counts that the checks use.
#[derive(Clone, Copy, Debug)]
pub struct Evidence<'a> {
    /// The tick audit's counts; none if the guest has no ring that can be read.
    pub ticks: Option<&'a Summary>,
    /// Counts of the LAPICs' timer interrupts; none where the LAPICs are KVM's.
    pub timer: Option<&'a TimerSummary>,
    /// What became of PVCLOCK_GUEST_STOPPED.
    pub guest_stopped: GuestStopped,
    /// Why there is no ring to read, as text.
    pub no_ring: &'a str,
    /// The guest ended by itself, so that no more ticks will come.
    pub ended: bool,
    /// Why the run itself failed, if it did.
    pub failed: Option<&'a str>,
}

/// The results of all checks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// None of them failed.
    pub pass: bool,
    /// Why the run failed.
    pub reasons: Vec<String>,
    /// Each check's name and result; the run itself is the first.
    #[serde(serialize_with = "by_name")]
    pub checks: Vec<(String, CheckResult)>,
}

impl Check {
    /// Its name on the command line, without a time.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Late(_) => "late",
            Self::Early => "early",
            Self::Lost => "lost",
            Self::Clock => "clock",
            Self::Accounts => "accounts",
            Self::Watchdog => "watchdog",
            Self::Stopped => "stopped",
        }
    }

    fn check(self, evidence: &Evidence<'_>) -> CheckResult {
        match (evidence.ticks, evidence.timer) {
            _ if self == Self::Stopped => Self::check_guest_stopped(&evidence.guest_stopped),
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
            Self::Stopped => CheckResult::NotJudged("it needs no ticks".to_owned()),
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
            (Self::Late(_) | Self::Lost | Self::Clock | Self::Accounts | Self::Watchdog | Self::Stopped, _) => {
                CheckResult::NotJudged(no_ring.to_owned())
            }
        }
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Late(limit) => write!(f, "late={}", Length(*limit).to_string().replace(' ', "")),
            check => f.write_str(check.name()),
        }
    }
}

impl FromStr for Check {
    type Err = BadCheck;

    fn from_str(text: &str) -> Result<Self, BadCheck> {
        match text.split_once('=') {
            Some(("late", limit)) => match humantime::parse_duration(limit) {
                Ok(limit) => Ok(Self::Late(limit)),
                Err(error) => Err(BadCheck::Time { text: limit.to_owned(), reason: error.to_string() }),
            },
            None if text == "late" => Err(BadCheck::NoTime),
            None if text == "early" => Ok(Self::Early),
            None if text == "lost" => Ok(Self::Lost),
            None if text == "clock" => Ok(Self::Clock),
            None if text == "accounts" => Ok(Self::Accounts),
            None if text == "watchdog" => Ok(Self::Watchdog),
            None if text == "stopped" => Ok(Self::Stopped),
            _ => Err(BadCheck::Unknown(text.to_owned())),
        }
    }
}

/// The checks of a run for which the user names none: those that a slow host cannot make fail.
impl Default for Checks {
    fn default() -> Self {
        Self { checks: vec![Check::Lost, Check::Clock, Check::Accounts], requested: false }
    }
}

impl FromStr for Checks {
    type Err = BadCheck;

    /// A list with commas, or `none`.
    fn from_str(text: &str) -> Result<Self, BadCheck> {
        let words: Vec<&str> = text.split(',').collect();
        if words.contains(&"none") {
            return if words.len() == 1 {
                Ok(Self { checks: Vec::new(), requested: true })
            } else {
                Err(BadCheck::NoneAndOthers)
            };
        }
        let mut checks: Vec<Check> = Vec::new();
        for word in words {
            let check: Check = word.parse()?;
            if checks.iter().any(|other| other.name() == check.name()) {
                return Err(BadCheck::Twice(check.name()));
            }
            checks.push(check);
        }
        Ok(Self { checks, requested: true })
    }
}

impl Checks {
    /// Runs the checks.
    #[must_use]
    pub fn verdict(&self, evidence: &Evidence<'_>) -> Verdict {
        let run = evidence
            .failed
            .map_or_else(|| CheckResult::Pass("in good order".to_owned()), |why| CheckResult::Fail(why.to_owned()));
        let found = self.checks.iter().map(|check| {
            let found = match check.check(evidence) {
                CheckResult::NotJudged(why) if self.requested => {
                    CheckResult::Fail(format!("{check} cannot be judged: {why}"))
                }
                found => found,
            };
            (check.to_string(), found)
        });
        let checks: Vec<_> = std::iter::once(("run".to_owned(), run)).chain(found).collect();
        let reason = |(_, found): &(String, CheckResult)| match found {
            CheckResult::Fail(reason) => Some(reason.clone()),
            CheckResult::Pass(_) | CheckResult::NotJudged(_) => None,
        };
        let reasons: Vec<String> = checks.iter().filter_map(reason).collect();
        Verdict { pass: reasons.is_empty(), reasons, checks }
    }
}

/// As a JSON object: each check's name, and `pass`, `fail` or `not-judged`.
fn by_name<S: Serializer>(checks: &[(String, CheckResult)], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(checks.iter().map(|(name, found)| {
        let word = match found {
            CheckResult::Pass(_) => "pass",
            CheckResult::Fail(_) => "fail",
            CheckResult::NotJudged(_) => "not-judged",
        };
        (name.split('=').next().unwrap_or(name), word)
    }))
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

fn within(limit: Duration, worst_ns: u64, what: &str) -> CheckResult {
    let text = format!("{what} {} late, the limit is {}", time(worst_ns), Length(limit));
    if Duration::from_nanos(worst_ns) > limit { CheckResult::Fail(text) } else { CheckResult::Pass(text) }
}

fn time(ns: u64) -> String {
    Length(Duration::from_nanos(ns)).to_string()
}

#[cfg(test)]
mod tests;
