//! All rows, several times, and the verdict.

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::{
    host::{Machine, load},
    lab::Lab,
    row::{Check, Measured, Outcome, Row, Series},
};

/// Version of the JSON's layout.
pub const SCHEMA: &str = "vmm-bench/1";

/// Everything that was measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Results {
    /// [`SCHEMA`].
    pub schema: String,
    /// Where.
    pub machine: Machine,
    /// The load averages before the first run and after the last.
    pub load: [String; 2],
    /// How often everything was measured.
    pub runs: u32,
    /// With `--quick`: not to be believed.
    pub quick: bool,
    /// The rows, in order.
    pub rows: Vec<RowResult>,
}

/// A row after all runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RowResult {
    /// Its name.
    pub id: String,
    /// What it is about.
    pub what: String,
    /// Why it was not measured.
    pub skipped: Option<Skipped>,
    /// The samples of all runs.
    pub series: Vec<Series>,
    /// What must hold, with a number of each run.
    pub checks: Vec<Check>,
    /// Remarks of the last run.
    pub notes: Vec<String>,
}

/// Why a row was not measured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// In words.
    pub why: String,
    /// The target counts as missed.
    pub missed: bool,
}

/// Measures `rows`, `runs` times each: all of them, then all of them again, so that the runs of one lie apart. `tell` is
/// called before and after each with something to print.
///
/// # Errors
/// The first row that fails, and this machine's description.
pub fn run(lab: &Lab, rows: &[Row], runs: u32, mut tell: impl FnMut(&str)) -> Result<Results> {
    let machine = Machine::describe(lab)?;
    let before = load();
    let mut results: Vec<RowResult> = rows.iter().map(RowResult::empty).collect();
    for run in 1..=runs {
        for (row, result) in rows.iter().zip(&mut results) {
            tell(&format!("run {run} of {runs}: {}", row.what));
            match (row.measure)(lab) {
                Ok(outcome) => result.add(outcome),
                // The others are still worth knowing; this one is missed.
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

    /// Notes why a run measured nothing. A miss stays one, whatever later runs say.
    fn skip(&mut self, why: String, missed: bool) {
        if !self.skipped.as_ref().is_some_and(|skipped| skipped.missed) {
            self.skipped = Some(Skipped { why, missed });
        }
    }

    /// Takes in the outcome of one run.
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
    fn one_run_that_misses_is_a_miss_and_a_hope_is_none() {
        let mut row = result();
        row.add(outcome(1.0));
        row.add(outcome(2.0));
        assert!(row.met());
        assert_eq!(row.series.iter().map(|series| series.samples.len()).sum::<usize>(), 4);
        row.add(outcome(2.1));
        assert!(!row.met());
    }

    #[test]
    fn what_is_not_there_is_missed_and_what_cannot_be_seen_is_not() {
        let mut row = result();
        row.add(Outcome::NoMeans("no strace".to_owned()));
        assert!(row.met());
        row.add(Outcome::NotThere("no such flag".to_owned()));
        assert!(!row.met());
        row.add(Outcome::NoMeans("no strace".to_owned()));
        assert!(!row.met(), "a later run made a miss good");
    }

    #[test]
    fn a_number_that_is_missing_keeps_no_bound() {
        let mut row = result();
        row.add(outcome(1.0));
        row.add(Outcome::Measured(Measured::default().check("c", Unit::Ns, None, Bound::AtMost(2.0))));
        assert!(!row.met());
    }
}
