//! Measures how costs grow with vCPUs, memory, ticks, snapshots in a chain and instructions in a sweep. A curve that
//! must be flat is shown to be flat.

mod chain;
mod memory;
mod svg;
mod sweep;
mod ticks;
mod vcpus;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::{host::HostDescription, lab::Lab, spread::Spread, unit::Unit};
pub use svg::draw;

/// Version of the JSON's layout.
pub const SCHEMA: &str = "vmm-bench-growth/1";

/// A plot.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plot {
    /// Its file's name, without an ending.
    pub id: String,
    /// Its title.
    pub title: String,
    /// Label of the x axis: the quantity that grows.
    pub x: String,
    /// Label of the y axis: the quantity that is measured.
    pub y: String,
    /// Unit of the y axis.
    pub unit: Unit,
    /// Labels of the steps along the x axis.
    pub steps: Vec<String>,
    /// One line each.
    pub curves: Vec<Curve>,
}

/// A line of a plot.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Curve {
    /// The program or variant.
    pub who: String,
    /// One for each step; null where it could not be measured.
    pub points: Vec<Option<Spread>>,
}

/// All plots.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Growth {
    /// [`SCHEMA`].
    pub schema: String,
    /// Where.
    pub machine: HostDescription,
    /// Made with `--quick`: the numbers mean nothing.
    pub quick: bool,
    /// The plots.
    pub plots: Vec<Plot>,
    /// Plots that could not be made, and why.
    pub missing: Vec<(String, String)>,
}

/// The result of one measurement of growth.
pub(crate) enum Grown {
    /// Plots.
    Plots(Vec<Plot>),
    /// This `vmm` or its guest cannot do it.
    NotThere(String),
}

/// A measurement of growth: the quantity that grows, and the function that measures.
type Way = (&'static str, fn(&Lab) -> Result<Grown>);

const WAYS: [Way; 5] = [
    ("vCPUs", vcpus::measure),
    ("memory", memory::measure),
    ("tick rate", ticks::measure),
    ("snapshot chain", chain::measure),
    ("sweep size", sweep::measure),
];

/// Makes all measurements. `progress` is called before each with a line to print.
///
/// # Errors
/// If this machine cannot be described. A measurement that fails is listed as missing.
pub fn run(lab: &Lab, mut progress: impl FnMut(&str)) -> Result<Growth> {
    let (mut plots, mut missing) = (Vec::new(), Vec::new());
    for (name, measure) in WAYS {
        progress(&format!("growth: {name}"));
        match measure(lab) {
            Ok(Grown::Plots(more)) => plots.extend(more),
            Ok(Grown::NotThere(why)) => missing.push((name.to_owned(), why)),
            Err(error) => missing.push((name.to_owned(), format!("failed: {error:#}"))),
        }
    }
    Ok(Growth { schema: SCHEMA.to_owned(), machine: HostDescription::describe(lab)?, quick: lab.quick, plots, missing })
}

impl Plot {
    /// A plot without lines.
    fn new(id: &str, title: &str, x: &str, y: &str, unit: Unit) -> Self {
        let [id, title, x, y] = [id, title, x, y].map(str::to_owned);
        Self { id, title, x, y, unit, steps: Vec::new(), curves: Vec::new() }
    }

    /// Adds a step, with the samples of each curve. A new curve has no value at the earlier steps.
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

    /// The last point of each curve divided by its first: 1 is flat.
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
