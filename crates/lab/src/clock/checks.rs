//! What fails a measurement (`--fail-on`).

use std::{fmt, str::FromStr};

use super::{gaps::GapFindings, result::Findings, text::ns};

/// One check.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Check {
    /// The guest's reading was lower after a stop than before it, or its page's base is ahead of its TSC.
    Back,
    /// The VMM did not find a gap.
    Missed,
    /// A limit for a figure.
    Limit(Figure, f64),
}

/// A figure with a limit in nanoseconds, whatever its sign.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Figure {
    /// The mean error of a stop.
    Drift,
    /// The sum of all errors.
    Total,
    /// The largest error of a stop.
    Worst,
    /// The largest shift of a deadline.
    Deadline,
    /// What the pages gained or lost between the stops, in all, against ticks over the frequency.
    Rate,
}

const FIGURES: [(Figure, &str); 5] = [
    (Figure::Drift, "drift"),
    (Figure::Total, "total"),
    (Figure::Worst, "worst"),
    (Figure::Deadline, "deadline"),
    (Figure::Rate, "rate"),
];

/// The checks of a measurement.
#[derive(Clone, Debug, PartialEq)]
pub struct Checks(pub Vec<Check>);

impl Default for Checks {
    fn default() -> Self {
        Self(vec![Check::Back])
    }
}

/// A word that is no check.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no check; there are back, missed, drift=TIME, total=TIME, worst=TIME, deadline=TIME, rate=TIME (such as drift=0.05ns), \
     and none"
)]
pub struct BadCheck(String);

impl FromStr for Checks {
    type Err = BadCheck;

    fn from_str(text: &str) -> Result<Self, BadCheck> {
        if text == "none" {
            return Ok(Self(Vec::new()));
        }
        let check = |word: &str| {
            match word {
                "back" => return Some(Check::Back),
                "missed" => return Some(Check::Missed),
                _ => {}
            }
            let (name, limit) = word.split_once('=')?;
            let (figure, _) = FIGURES.into_iter().find(|(_, known)| *known == name)?;
            Some(Check::Limit(figure, nanoseconds(limit)?))
        };
        text.split(',')
            .map(|word| check(word).ok_or_else(|| BadCheck(word.to_owned())))
            .collect::<Result<_, _>>()
            .map(Self)
    }
}

/// A decimal number with a unit, such as `0.05ns`, in nanoseconds.
fn nanoseconds(text: &str) -> Option<f64> {
    let (number, factor) = [("ns", 1.0), ("us", 1e3), ("µs", 1e3), ("ms", 1e6), ("s", 1e9)]
        .into_iter()
        .find_map(|(unit, factor)| Some((text.strip_suffix(unit)?, factor)))?;
    // Neither `inf` nor an exponent is a length for people.
    let plain = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    plain.then(|| number.parse::<f64>().ok()).flatten().map(|number| number * factor)
}

impl Figure {
    fn of(self, findings: &Findings) -> Option<f64> {
        let error = findings.error.as_ref();
        match self {
            Self::Drift => error.map(|error| error.mean_ns),
            Self::Total => error.map(|error| error.total_ns),
            Self::Worst => error.map(|error| error.worst_ns),
            Self::Rate => Some(findings.rate_ns),
            Self::Deadline => findings.deadlines.as_ref().map(|deadlines| deadlines.worst_ns),
        }
    }
}

impl fmt::Display for Figure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(FIGURES.iter().find(|(figure, _)| figure == self).map_or("", |(_, name)| name))
    }
}

impl Checks {
    /// Why the measurement fails; empty if it does not.
    #[must_use]
    pub fn failed(&self, findings: &Findings) -> Vec<String> {
        let failed = |check: &Check| match check {
            Check::Back if findings.went_back + findings.bases_ahead > 0 => Some(format!(
                "the guest's clock went back at {} stops, and at {} its page's base was ahead of its TSC",
                findings.went_back, findings.bases_ahead
            )),
            Check::Back => None,
            Check::Missed => {
                let GapFindings { made, found, .. } = findings.gaps.as_ref()?;
                (found < made).then(|| format!("the VMM found {found} of {made} gaps"))
            }
            Check::Limit(figure, limit) => {
                let found = figure.of(findings)?;
                (found.abs() > *limit).then(|| format!("{figure} is {} ns, the limit is {} ns", ns(found), ns(*limit)))
            }
        };
        self.0.iter().filter_map(failed).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checks_are_names_and_lengths() {
        let parsed: Checks = "back,missed,drift=0.05ns,worst=1us,total=2ms,deadline=1s".parse().unwrap();
        let limit = Check::Limit;
        assert_eq!(
            parsed.0,
            [
                Check::Back,
                Check::Missed,
                limit(Figure::Drift, 0.05),
                limit(Figure::Worst, 1e3),
                limit(Figure::Total, 2e6),
                limit(Figure::Deadline, 1e9)
            ]
        );
        assert_eq!("none".parse(), Ok(Checks(Vec::new())));
        for bad in [
            "",
            "drift",
            "drift=",
            "drift=5",
            "drift=-1ns",
            "drift=infns",
            "drift=1e3ns",
            "late=1ns",
            "back,,",
            "drift=..ns",
        ] {
            assert!(bad.parse::<Checks>().is_err(), "{bad}");
        }
    }
}
