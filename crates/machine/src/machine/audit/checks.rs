//! The checks that can fail a run, and their results.
//!
//! A check passes, fails, or has nothing to check. The last fails a run only if the user named that check: a guest
//! without a tick ring is no failure, but a test of its ticks that tested nothing is one.

mod judge;

use std::{fmt, str::FromStr, time::Duration};

use serde::{Serialize, Serializer};
use vmtime::Length;

use super::{GuestStopped, Summary, TimerSummary};

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
    /// The guest's time of day differs from the host's by no more than this, at the end.
    Wall(Duration),
    /// The same of real time by VMClock, which the guest never found wrong.
    Vmclock(Duration),
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
    #[error(
        "there is no check {0:?}: there are late=TIME, early, lost, clock, accounts, watchdog, stopped, wall=TIME, vmclock=TIME; or none"
    )]
    Unknown(String),
    /// A check that needs a limit was given none.
    #[error("write {0}=TIME, for example {0}=1ms")]
    NoTime(&'static str),
    /// Not a time.
    #[error("{name}={text}: {reason}")]
    Time {
        /// The check.
        name: &'static str,
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
    /// How far the guest's time of day is ahead of the host's, in nanoseconds, if that is known.
    pub wall_error_ns: Option<i64>,
    /// How far real time by VMClock is ahead of the host's, in nanoseconds, if that is known.
    pub vmclock_error_ns: Option<i64>,
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
            Self::Wall(_) => "wall",
            Self::Vmclock(_) => "vmclock",
        }
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Late(limit) | Self::Wall(limit) | Self::Vmclock(limit) => {
                write!(f, "{}={}", self.name(), Length(*limit).to_string().replace(' ', ""))
            }
            check => f.write_str(check.name()),
        }
    }
}

impl FromStr for Check {
    type Err = BadCheck;

    fn from_str(text: &str) -> Result<Self, BadCheck> {
        match text.split_once('=') {
            Some(("late", limit)) => duration("late", limit).map(Self::Late),
            Some(("wall", limit)) => duration("wall", limit).map(Self::Wall),
            Some(("vmclock", limit)) => duration("vmclock", limit).map(Self::Vmclock),
            None if text == "late" => Err(BadCheck::NoTime("late")),
            None if text == "wall" => Err(BadCheck::NoTime("wall")),
            None if text == "vmclock" => Err(BadCheck::NoTime("vmclock")),
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

fn duration(name: &'static str, text: &str) -> Result<Duration, BadCheck> {
    let bad =
        |error: humantime::DurationError| BadCheck::Time { name, text: text.to_owned(), reason: error.to_string() };
    humantime::parse_duration(text).map_err(bad)
}

#[cfg(test)]
mod tests;
