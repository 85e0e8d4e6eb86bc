//! Injects every fault of a host's restore, under every clockevent that is safe without one.

use std::sync::{Arc, atomic::AtomicBool};

use machine::HostEnvironment;
use serde::{Deserialize, Serialize};
use vmtime::DeadlinePolicy;

use crate::{
    recipe::{Recipe, VMCLOCK_KEPT, fault_names},
    sweep::{self, SweepError, result::Totals},
};

/// The clockevents that no migration harms, if the restore has no fault.
pub const CLOCKEVENTS: [&str; 3] = ["kvm-tsc-deadline conversion=exact recheck=on", "kvm-ns-deadline", "lapic-oneshot"];
/// The migration is to a TSC of half the frequency.
const RATIO: &str = "0.5";

/// One fault under one clockevent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Row {
    /// The fault.
    pub fault: String,
    /// The bug that it reproduces.
    pub story: String,
    /// The clockevent.
    pub clockevent: String,
    /// Number of points of the tick.
    pub points: u64,
    /// How many points had which verdict.
    pub totals: Totals,
    /// The command that repeats this row.
    pub command: String,
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
) -> Result<Vec<Row>, SweepError> {
    let image = super::guest()?;
    let mut rows = Vec::new();
    // The study's guests have no VMClock.
    for name in fault_names().filter(|name| *name != VMCLOCK_KEPT) {
        let Some(fault) = Recipe::fault(name).map(Arc::new) else { continue };
        for clockevent in CLOCKEVENTS {
            before_row(&format!("{name}, {clockevent}"));
            let mut options = super::options(clockevent, &[RATIO], DeadlinePolicy::Rescale, workers)?;
            (options.recipe, options.inject) = (Some(Arc::clone(&fault)), Some(name.to_owned()));
            let (findings, _) = sweep::sweep(env, &image, &options, cancel, &|_, _| {})?;
            if !findings.complete {
                return Err(SweepError::Interrupted);
            }
            let totals = findings.totals.into_iter().next();
            rows.push(Row {
                fault: name.to_owned(),
                story: fault.about.clone(),
                clockevent: clockevent.to_owned(),
                points: u64::try_from(findings.points.len()).unwrap_or(u64::MAX),
                totals: totals.ok_or_else(|| SweepError::Usage("a sweep without a ratio".to_owned()))?,
                command: super::command(clockevent, &format!("--ratio {RATIO} --inject {name}")),
            });
        }
    }
    Ok(rows)
}
