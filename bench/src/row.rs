//! A row of the table: what is measured, and what it must come to.

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::{lab::Lab, spread::median, unit::Unit};

/// A row.
#[derive(Clone, Copy)]
pub struct Row {
    /// Its name for `--only`.
    pub id: &'static str,
    /// What it is about.
    pub what: &'static str,
    /// Measures once.
    pub measure: fn(&Lab) -> Result<Outcome>,
}

/// What a measurement came to.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// Numbers.
    Measured(Measured),
    /// This `vmm` or its guest cannot do it: a target that is missed.
    NotThere(String),
    /// This host lacks what it takes to look: nobody is to blame.
    NoMeans(String),
}

/// What was measured and what follows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Measured {
    /// The samples, by who or what they are of.
    pub series: Vec<Series>,
    /// What they must come to.
    pub checks: Vec<Check>,
    /// What a reader should know of this measurement.
    pub notes: Vec<String>,
}

/// Samples of one thing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Series {
    /// Of whom.
    pub who: String,
    /// In which unit.
    pub unit: Unit,
    /// In the order in which they were taken.
    pub samples: Vec<f64>,
}

/// A number and its bound.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Check {
    /// What the number is.
    pub name: String,
    /// Its unit.
    pub unit: Unit,
    /// What it must be.
    pub bound: Bound,
    /// Whether the verdict depends on it; if not, it is told only.
    pub required: bool,
    /// One number for each run.
    pub values: Vec<f64>,
}

/// What a number must be.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Bound {
    /// No more.
    AtMost(f64),
    /// No less.
    AtLeast(f64),
}

impl Bound {
    /// Whether `value` keeps it.
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
    /// Whether every run kept it.
    #[must_use]
    pub fn holds(&self) -> bool {
        !self.values.is_empty() && self.values.iter().all(|value| self.bound.holds(*value))
    }
}

impl Measured {
    /// Adds samples; a series of that name goes on.
    #[must_use]
    pub fn with(mut self, who: impl Into<String>, unit: Unit, samples: Vec<f64>) -> Self {
        self.series.push(Series { who: who.into(), unit, samples });
        self
    }

    /// Adds what must hold, if there is a number.
    #[must_use]
    pub fn check(self, name: impl Into<String>, unit: Unit, value: Option<f64>, bound: Bound) -> Self {
        self.bounded(name.into(), unit, value, bound, true)
    }

    /// Adds what is hoped for, or of interest.
    #[must_use]
    pub fn hope(self, name: impl Into<String>, unit: Unit, value: Option<f64>, bound: Bound) -> Self {
        self.bounded(name.into(), unit, value, bound, false)
    }

    fn bounded(mut self, name: String, unit: Unit, value: Option<f64>, bound: Bound, required: bool) -> Self {
        // A number that is missing cannot keep a bound.
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

    /// The median of one by that of the other.
    #[must_use]
    pub fn ratio(&self, a: &str, b: &str) -> Option<f64> {
        Some(self.median_of(a)? / self.median_of(b)?)
    }
}
