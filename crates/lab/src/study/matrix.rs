//! Sweeps every clockevent under every deadline policy: migrations at every instruction of a tick, to every ratio.

use std::sync::atomic::AtomicBool;

use machine::HostEnvironment;
use serde::{Deserialize, Serialize};
use vmtime::DeadlinePolicy;

use crate::sweep::{
    self, SweepError,
    result::Findings,
    verdict::{Outcome, Verdict},
};

/// The frequencies to migrate to, as multiples of the present one.
pub const RATIOS: [&str; 8] = ["0.1", "0.5", "0.9", "0.9998", "1.0002", "1.1", "2", "10"];
/// The deadline policies.
pub const POLICIES: [DeadlinePolicy; 3] = [DeadlinePolicy::Keep, DeadlinePolicy::Rescale, DeadlinePolicy::Fire];

/// One clockevent under one policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Row {
    /// The clockevent.
    pub clockevent: String,
    /// The policy.
    pub deadline: DeadlinePolicy,
    /// Instruction boundaries of the tick.
    pub points: u64,
    /// For each ratio in turn.
    pub cells: Vec<Cell>,
    /// The command that repeats this row.
    pub command: String,
}

/// A row at one ratio.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cell {
    /// The ratio.
    pub ratio: String,
    /// The worst verdict of any point.
    pub worst: Verdict,
    /// Points that harmed the guest: the length of the race window, in instructions.
    pub bad_points: u64,
    /// Points at which the guest was woken early, and re-armed.
    pub rearmed_points: u64,
    /// Points after which a tick was lost.
    pub lost_points: u64,
    /// Lateness of the latest tick.
    pub worst_late_ns: u64,
    /// The most early wakes after one migration.
    pub most_early_wakes: u64,
}

impl Cell {
    fn of(ratio: &str, outcomes: &[&Outcome]) -> Self {
        let count = |which: fn(Verdict) -> bool| {
            u64::try_from(outcomes.iter().filter(|outcome| which(outcome.verdict)).count()).unwrap_or(u64::MAX)
        };
        Self {
            ratio: ratio.to_owned(),
            worst: outcomes.iter().map(|outcome| outcome.verdict).max().unwrap_or(Verdict::OnTime),
            bad_points: count(Verdict::is_bad),
            rearmed_points: count(|verdict| verdict == Verdict::Rearmed),
            lost_points: count(|verdict| verdict == Verdict::Lost),
            worst_late_ns: outcomes.iter().filter_map(|outcome| outcome.late_ns).max().unwrap_or(0),
            most_early_wakes: outcomes.iter().map(|outcome| outcome.early_wakes).max().unwrap_or(0),
        }
    }
}

/// The row of `findings`.
#[must_use]
pub fn row(clockevent: &str, deadline: DeadlinePolicy, findings: &Findings) -> Row {
    let cell = |(index, target): (usize, &sweep::result::Target)| {
        let outcomes: Vec<&Outcome> = findings.points.iter().filter_map(|point| point.outcomes.get(index)).collect();
        Cell::of(&target.ratio, &outcomes)
    };
    let more = format!("--deadline {} --ratio {}", deadline.as_str(), RATIOS.join(","));
    Row {
        clockevent: clockevent.to_owned(),
        deadline,
        points: u64::try_from(findings.points.len()).unwrap_or(u64::MAX),
        cells: findings.inputs.ratios.iter().enumerate().map(cell).collect(),
        command: super::command(clockevent, &more),
    }
}

/// Sweeps all rows; `before_row` is called with a row's name before its sweep.
///
/// # Errors
/// [`SweepError`].
pub fn sweep(
    env: &HostEnvironment,
    workers: u32,
    cancel: &AtomicBool,
    before_row: &mut dyn FnMut(&str),
) -> Result<Vec<(Row, Findings)>, SweepError> {
    let image = super::guest()?;
    let mut rows = Vec::new();
    for clockevent in super::CLOCKEVENTS {
        for deadline in POLICIES {
            before_row(&format!("{clockevent}, deadline {}", deadline.as_str()));
            let options = super::options(clockevent, &RATIOS, deadline, workers)?;
            let (findings, _) = sweep::sweep(env, &image, &options, cancel, &|_, _| {})?;
            if !findings.complete {
                return Err(SweepError::Interrupted);
            }
            rows.push((row(clockevent, deadline, &findings), findings));
        }
    }
    Ok(rows)
}
