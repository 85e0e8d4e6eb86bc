//! Measures all rows several times, and computes the verdict.

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::{
    host::{HostDescription, load},
    lab::Lab,
    row::{Check, Measured, Outcome, Row, Series},
};

/// Version of the JSON's layout.
pub const SCHEMA: &str = "vmm-bench/1";

/// The results of all runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Results {
    /// [`SCHEMA`].
    pub schema: String,
    /// Where.
    pub machine: HostDescription,
    /// The load averages before the first run and after the last.
    pub load: [String; 2],
    /// How often everything was measured.
    pub runs: u32,
    /// Made with `--quick`: the numbers mean nothing.
    pub quick: bool,
    /// The rows, in order.
    pub rows: Vec<RowResult>,
}

/// A row after all runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RowResult {
    /// Its name.
    pub id: String,
    /// What it measures.
    pub what: String,
    /// Why it was not measured.
    pub skipped: Option<Skipped>,
    /// The samples of all runs.
    pub series: Vec<Series>,
    /// The targets, with a number for each run.
    pub checks: Vec<Check>,
    /// Remarks of the last run.
    pub notes: Vec<String>,
}

/// Why a row was not measured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// The reason.
    pub why: String,
    /// Whether the row's targets count as missed.
    pub missed: bool,
}

/// Measures `rows`, `runs` times each: all of them, then all of them again, so that the runs of a row are spread over
/// time. `progress` is called before each with a line to print.
///
/// # Errors
/// If this machine cannot be described.
pub fn run(lab: &Lab, rows: &[Row], runs: u32, mut progress: impl FnMut(&str)) -> Result<Results> {
    let machine = HostDescription::describe(lab)?;
    let before = load();
    let mut results: Vec<RowResult> = rows.iter().map(RowResult::empty).collect();
    for run in 1..=runs {
        for (row, result) in rows.iter().zip(&mut results) {
            progress(&format!("run {run} of {runs}: {}", row.what));
            match (row.measure)(lab) {
                Ok(outcome) => result.add(outcome),
                // A row that fails counts as missed. The others are still measured.
                Err(error) => result.skip(format!("run {run} failed: {error:#}"), true),
            }
        }
    }
    let load = [before, load()];
    Ok(Results { schema: SCHEMA.to_owned(), machine, load, runs, quick: lab.quick, rows: results })
}

impl Results {
    /// Whether every required target was met in every run.
    #[must_use]
    pub fn met(&self) -> bool {
        self.rows.iter().all(RowResult::met)
    }
}

impl RowResult {
    fn empty(row: &Row) -> Self {
        let (id, what) = (row.id.to_owned(), row.what.to_owned());
        Self { id, what, skipped: None, series: Vec::new(), checks: Vec::new(), notes: Vec::new() }
    }

    /// Records why a run measured nothing. A miss remains one, whatever later runs give.
    fn skip(&mut self, why: String, missed: bool) {
        if !self.skipped.as_ref().is_some_and(|skipped| skipped.missed) {
            self.skipped = Some(Skipped { why, missed });
        }
    }

    /// Adds the outcome of one run.
    fn add(&mut self, outcome: Outcome) {
        let Measured { series, checks, notes } = match outcome {
            Outcome::Measured(measured) => measured,
            Outcome::NotThere(why) => return self.skip(why, true),
            Outcome::NoMeans(why) => return self.skip(why, false),
        };
        for new in series {
            match self.series.iter_mut().find(|old| old.who == new.who) {
                Some(old) => old.samples.extend(new.samples),
                None => self.series.push(new),
            }
        }
        for new in checks {
            // In one run of several, the others' numbers would hide it.
            if new.required && new.values.is_empty() {
                self.skip(format!("no number for {}", new.name), true);
            }
            match self.checks.iter_mut().find(|old| old.name == new.name) {
                Some(old) => old.values.extend(new.values),
                None => self.checks.push(new),
            }
        }
        self.notes = notes;
    }

    /// Whether its required targets were met in every run.
    #[must_use]
    pub fn met(&self) -> bool {
        !self.skipped.as_ref().is_some_and(|skipped| skipped.missed)
            && self.checks.iter().filter(|check| check.required).all(Check::holds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{row::Bound, unit::Unit};

    fn result() -> RowResult {
        let measure = |_: &Lab| Ok(Outcome::NoMeans(String::new()));
        RowResult::empty(&Row { id: "x", what: "x", measure })
    }

    fn outcome(value: f64) -> Outcome {
        let measured = Measured::default().with("a", Unit::Ns, vec![value, value]);
        Outcome::Measured(measured.check("c", Unit::Ns, Some(value), Bound::AtMost(2.0)).hope(
            "h",
            Unit::Ns,
            Some(value),
            Bound::AtMost(0.0),
        ))
    }

    #[test]
    fn one_run_that_misses_a_required_target_is_a_miss() {
        let mut row = result();
        row.add(outcome(1.0));
        row.add(outcome(2.0));
        assert!(row.met());
        assert_eq!(row.series.iter().map(|series| series.samples.len()).sum::<usize>(), 4);
        row.add(outcome(2.1));
        assert!(!row.met());
    }

    #[test]
    fn a_missing_feature_is_a_miss_and_a_host_without_the_means_is_none() {
        let mut row = result();
        row.add(Outcome::NoMeans("no strace".to_owned()));
        assert!(row.met());
        row.add(Outcome::NotThere("no such flag".to_owned()));
        assert!(!row.met());
        row.add(Outcome::NoMeans("no strace".to_owned()));
        assert!(!row.met(), "a later run made a miss good");
    }

    #[test]
    fn a_missing_number_is_within_no_bound() {
        let mut row = result();
        row.add(outcome(1.0));
        row.add(Outcome::Measured(Measured::default().check("c", Unit::Ns, None, Bound::AtMost(2.0))));
        assert!(!row.met());
    }
}
