//! Formats quantities for people.

use serde::{Deserialize, Serialize};

/// The unit of a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Unit {
    /// Nanoseconds.
    Ns,
    /// Bytes.
    Bytes,
    /// One number divided by another of the same unit.
    Ratio,
    /// A count per tick.
    PerTick,
    /// A count per second.
    PerSecond,
    /// A share of one CPU's time: 1 is all of it.
    Share,
}

impl Unit {
    /// Formats `value` with three significant digits.
    #[must_use]
    pub fn show(self, value: f64) -> String {
        match self {
            Self::Ns if value.abs() < 1e3 => format!("{value:.0} ns"),
            Self::Ns if value.abs() < 1e6 => format!("{} µs", digits(value / 1e3)),
            Self::Ns if value.abs() < 1e9 => format!("{} ms", digits(value / 1e6)),
            Self::Ns => format!("{} s", digits(value / 1e9)),
            Self::Bytes if value.abs() < 1024.0 => format!("{value:.0} B"),
            Self::Bytes if value.abs() < 1024.0 * 1024.0 => format!("{} KiB", digits(value / 1024.0)),
            Self::Bytes => format!("{} MiB", digits(value / 1024.0 / 1024.0)),
            Self::Ratio => format!("×{value:.2}"),
            Self::PerTick => format!("{value:.2}"),
            Self::PerSecond => format!("{}/s", digits(value)),
            Self::Share => format!("{:.1} %", value * 100.0),
        }
    }
}

fn digits(value: f64) -> String {
    match value.abs() {
        size if size < 10.0 => format!("{value:.2}"),
        size if size < 100.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_those_that_fit() {
        let shown = [(Unit::Ns, 17_600.0), (Unit::Ns, 2.3e6), (Unit::Bytes, 4.2e6), (Unit::Share, 0.0719)];
        let shown = shown.map(|(unit, value)| unit.show(value));
        assert_eq!(shown, ["17.6 µs", "2.30 ms", "4.01 MiB", "7.2 %"]);
    }
}
