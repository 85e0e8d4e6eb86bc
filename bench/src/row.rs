//! A row of the table: a measurement and its targets.

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::{lab::Lab, spread::median, unit::Unit};

/// A row.
#[derive(Clone, Copy)]
pub struct Row {
    /// Its name for `--only`.
    pub id: &'static str,
    /// What it measures.
    pub what: &'static str,
    /// Measures once.
    pub measure: fn(&Lab) -> Result<Outcome>,
}

/// The outcome of a measurement.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// Numbers.
    Measured(Measured),
    /// This `vmm` or its guest cannot do it: its targets count as missed.
    NotThere(String),
    /// This host lacks something that the measurement needs: no target is missed.
    NoMeans(String),
}

/// The samples of a measurement, and the targets computed from them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Measured {
    /// The samples, by program or variant.
    pub series: Vec<Series>,
    /// The targets.
    pub checks: Vec<Check>,
    /// Remarks for the reader.
    pub notes: Vec<String>,
}

/// The samples of one program or variant.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Series {
    /// The program or variant.
    pub who: String,
    /// The samples' unit.
    pub unit: Unit,
    /// The samples, in the order in which they were taken.
    pub samples: Vec<f64>,
}

/// A number and its bound.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Check {
    /// What the number is.
    pub name: String,
    /// Its unit.
    pub unit: Unit,
    /// The bound.
    pub bound: Bound,
    /// Whether the verdict depends on it; if not, it is only shown.
    pub required: bool,
    /// One number for each run.
    pub values: Vec<f64>,
}

/// A bound for a number.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Bound {
    /// At most this.
    AtMost(f64),
    /// At least this.
    AtLeast(f64),
}

impl Bound {
    /// Whether `value` is within the bound.
    #[must_use]
    pub fn holds(self, value: f64) -> bool {
        match self {
            Self::AtMost(most) => value <= most,
            Self::AtLeast(least) => value >= least,
        }
    }

    /// As in the table.
    #[must_use]
    pub fn show(self, unit: Unit) -> String {
        match self {
            Self::AtMost(most) => format!("≤ {}", unit.show(most)),
            Self::AtLeast(least) => format!("≥ {}", unit.show(least)),
        }
    }
}

impl Check {
    /// Whether every run was within the bound.
    #[must_use]
    pub fn holds(&self) -> bool {
        !self.values.is_empty() && self.values.iter().all(|value| self.bound.holds(*value))
    }
}

impl Measured {
    /// Adds samples. If there is a series of that name, they are appended to it.
    #[must_use]
    pub fn with(mut self, who: impl Into<String>, unit: Unit, samples: Vec<f64>) -> Self {
        self.series.push(Series { who: who.into(), unit, samples });
        self
    }

    /// Adds a required target.
    #[must_use]
    pub fn check(self, name: impl Into<String>, unit: Unit, value: Option<f64>, bound: Bound) -> Self {
        self.bounded(name.into(), unit, value, bound, true)
    }

    /// Adds a target that is not required.
    #[must_use]
    pub fn hope(self, name: impl Into<String>, unit: Unit, value: Option<f64>, bound: Bound) -> Self {
        self.bounded(name.into(), unit, value, bound, false)
    }

    fn bounded(mut self, name: String, unit: Unit, value: Option<f64>, bound: Bound, required: bool) -> Self {
        // A missing number is within no bound.
        self.checks.push(Check { name, unit, bound, required, values: vec![value.unwrap_or(f64::NAN)] });
        self
    }

    /// Adds a remark.
    #[must_use]
    pub fn note(mut self, text: impl Into<String>) -> Self {
        self.notes.push(text.into());
        self
    }

    /// The median of the samples of `who`.
    #[must_use]
    pub fn median_of(&self, who: &str) -> Option<f64> {
        self.series.iter().find(|series| series.who == who).and_then(|series| median(&series.samples))
    }

    /// The median of `a` divided by that of `b`.
    #[must_use]
    pub fn ratio(&self, a: &str, b: &str) -> Option<f64> {
        Some(self.median_of(a)? / self.median_of(b)?)
    }
}
