//! Median and quartiles of samples.

use serde::{Deserialize, Serialize};

/// Median and quartiles.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// The median: half of the samples are no larger.
    pub median: f64,
    /// The lower quartile.
    pub low: f64,
    /// The upper quartile.
    pub high: f64,
}

impl Spread {
    /// The spread of `samples`; `None` if there are none, or one of them is NaN.
    #[must_use]
    pub fn of(samples: &[f64]) -> Option<Self> {
        let mut sorted = samples.to_vec();
        if sorted.iter().any(|sample| sample.is_nan()) {
            return None;
        }
        sorted.sort_by(f64::total_cmp);
        Some(Self { median: at(&sorted, 1, 2)?, low: at(&sorted, 1, 4)?, high: at(&sorted, 3, 4)? })
    }
}

/// The median; `None` as in [`Spread::of`].
#[must_use]
pub fn median(samples: &[f64]) -> Option<f64> {
    Spread::of(samples).map(|spread| spread.median)
}

/// The quantile `part / parts` of the sorted samples, interpolated between neighbours.
fn at(sorted: &[f64], part: usize, parts: usize) -> Option<f64> {
    let steps = sorted.len().checked_sub(1)? * part;
    let below = sorted.get(steps / parts)?;
    let above = sorted.get((steps / parts).saturating_add(1)).unwrap_or(below);
    let weight = u32::try_from(steps % parts).map_or(0.0, f64::from) / u32::try_from(parts).map_or(1.0, f64::from);
    Some(below + (above - below) * weight)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quartiles_lie_between_neighbours() {
        let spread = Spread::of(&[4.0, 1.0, 3.0, 2.0]).unwrap();
        assert_eq!(spread, Spread { median: 2.5, low: 1.75, high: 3.25 });
        assert_eq!(Spread::of(&[7.0]).unwrap(), Spread { median: 7.0, low: 7.0, high: 7.0 });
    }

    #[test]
    fn no_samples_have_no_spread() {
        assert_eq!(Spread::of(&[]), None);
        assert_eq!(median(&[1.0, f64::NAN]), None);
    }
}
