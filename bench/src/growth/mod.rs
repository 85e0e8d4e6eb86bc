//! How costs grow with what a user can ask for more of: vCPUs, memory, ticks, snapshots in a chain, instructions in a
//! sweep. What must be flat is seen to be flat.

mod chain;
mod memory;
mod svg;
mod sweep;
mod ticks;
mod vcpus;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::{host::Machine, lab::Lab, spread::Spread, unit::Unit};
pub use svg::draw;

/// Version of the JSON's layout.
pub const SCHEMA: &str = "vmm-bench-growth/1";

/// A picture.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plot {
    /// Its file's name, without an ending.
    pub id: String,
    /// What it shows.
    pub title: String,
    /// What grows.
    pub x: String,
    /// What is measured.
    pub y: String,
    /// The unit of that.
    pub unit: Unit,
    /// What grows, in steps, as labels.
    pub steps: Vec<String>,
    /// One line each.
    pub curves: Vec<Curve>,
}

/// A line of a picture.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Curve {
    /// Of whom or what.
    pub who: String,
    /// One for each step; null where it could not be measured.
    pub points: Vec<Option<Spread>>,
}

/// All pictures.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Growth {
    /// [`SCHEMA`].
    pub schema: String,
    /// Where.
    pub machine: Machine,
    /// With `--quick`: not to be believed.
    pub quick: bool,
    /// The pictures.
    pub plots: Vec<Plot>,
    /// Pictures that could not be made, and why.
    pub missing: Vec<(String, String)>,
}

/// What a way of growing came to.
pub(crate) enum Grown {
    /// Pictures.
    Plots(Vec<Plot>),
    /// Nothing, because this `vmm` or its guest cannot do it.
    NotThere(String),
}

/// A way of growing: what grows, and how it is measured.
type Way = (&'static str, fn(&Lab) -> Result<Grown>);

const WAYS: [Way; 5] = [
    ("vCPUs", vcpus::measure),
    ("memory", memory::measure),
    ("tick rate", ticks::measure),
    ("snapshot chain", chain::measure),
    ("sweep size", sweep::measure),
];

/// Measures all of it. `tell` is called before each with something to print.
///
/// # Errors
/// If this machine cannot be described. What fails otherwise is told as missing.
pub fn run(lab: &Lab, mut tell: impl FnMut(&str)) -> Result<Growth> {
    let (mut plots, mut missing) = (Vec::new(), Vec::new());
    for (name, measure) in WAYS {
        tell(&format!("growth: {name}"));
        match measure(lab) {
            Ok(Grown::Plots(more)) => plots.extend(more),
            Ok(Grown::NotThere(why)) => missing.push((name.to_owned(), why)),
            Err(error) => missing.push((name.to_owned(), format!("failed: {error:#}"))),
        }
    }
    Ok(Growth { schema: SCHEMA.to_owned(), machine: Machine::describe(lab)?, quick: lab.quick, plots, missing })
}

impl Plot {
    /// One without lines.
    fn new(id: &str, title: &str, x: &str, y: &str, unit: Unit) -> Self {
        let [id, title, x, y] = [id, title, x, y].map(str::to_owned);
        Self { id, title, x, y, unit, steps: Vec::new(), curves: Vec::new() }
    }

    /// Adds a step, with the samples of each curve there; a curve that is new had nothing before.
    fn step(&mut self, label: impl Into<String>, samples: impl IntoIterator<Item = (String, Vec<f64>)>) {
        let before = self.steps.len();
        self.steps.push(label.into());
        for (who, samples) in samples {
            let point = Spread::of(&samples);
            match self.curves.iter_mut().find(|curve| curve.who == who) {
                Some(curve) => curve.points.push(point),
                None => {
                    self.curves.push(Curve { who, points: vec![None; before].into_iter().chain([point]).collect() })
                }
            }
        }
        let steps = self.steps.len();
        self.curves.iter_mut().for_each(|curve| curve.points.resize(steps, None));
    }

    /// The last point of each curve by its first: 1 is flat.
    #[must_use]
    pub fn growth(&self) -> Vec<(&str, f64)> {
        let ends = self.curves.iter().filter_map(|curve| {
            let mut points = curve.points.iter().flatten();
            let first = points.next()?;
            let last = points.next_back().unwrap_or(first);
            Some((curve.who.as_str(), last.median / first.median))
        });
        ends.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn curves_have_a_point_for_every_step() {
        let mut plot = Plot::new("p", "P", "x", "y", Unit::Ns);
        plot.step("1", [("a".to_owned(), vec![2.0])]);
        plot.step("2", [("a".to_owned(), vec![3.0]), ("b".to_owned(), vec![1.0])]);
        plot.step("3", [("b".to_owned(), vec![1.5])]);
        let lengths: Vec<usize> = plot.curves.iter().map(|curve| curve.points.len()).collect();
        assert_eq!(lengths, [3, 3]);
        assert_eq!(plot.growth(), [("a", 1.5), ("b", 1.5)]);
    }
}
