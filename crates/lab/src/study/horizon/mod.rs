//! How far each formula for the same clock is from the others after a month of VM time.
//!
//! Hosts and guests turn ticks into nanoseconds by formulas of their own: kHz, multiplier and shift, a ratio. Each is
//! rounded once, and then runs on. What that comes to is not measured here but computed, exactly, so a month takes no
//! time.
//!
//! What it is not: the error of a TSC. A calibrated frequency is off by some ppm, far more than any of these; but that
//! error is the same for all that count ticks of the same TSC. These are differences between clocks that should agree.

pub mod formulas;
pub mod rates;

use serde::{Deserialize, Serialize};
use vmtime::Khz;

use self::formulas::{Case, FORMULAS, Formula};
use crate::sweep::SweepError;

/// Version of the layout of the result's JSON.
pub const SCHEMA: &str = "vmm-study-horizon/1";

/// Frequencies that are shown unless others are asked for, in kHz.
pub const FREQUENCIES_KHZ: [u32; 4] = [2_100_000, 2_500_000, 2_596_142, 2_600_000];
/// The host's frequency where a formula has two, unless another is asked for, in kHz.
pub const HOST_KHZ: u32 = 3_000_000;
/// VM time unless another is asked for.
pub const DAYS: u32 = 30;
/// The most: a hundred years.
pub const MOST_DAYS: u32 = 36_525;
/// All rows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Horizon {
    /// [`SCHEMA`].
    pub schema: String,
    /// VM time, in days.
    pub days: u32,
    /// The host's frequency, where a formula has two.
    pub host_khz: u32,
    /// The frequencies of the columns.
    pub tsc_khz: Vec<u32>,
    /// One for each formula.
    pub rows: Vec<Row>,
}

/// One formula.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Row {
    /// [`Formula::name`].
    pub formula: String,
    /// [`Formula::what`].
    pub what: String,
    /// [`Formula::source`].
    pub source: String,
    /// For each frequency: how far it is off after the time, in picoseconds, to the nearest; positive if it is ahead.
    pub drift_ps: Vec<i64>,
    /// The command that makes this row alone.
    pub command: String,
}

/// Computes the rows of `formulas`, or all of them if there are none, after `days` of VM time, for TSCs of `khz`, or of
/// [`FREQUENCIES_KHZ`] if it is empty, on a host of `host` or [`HOST_KHZ`].
///
/// # Errors
/// [`SweepError::Usage`] for a formula that does not exist, and for more than [`MOST_DAYS`].
pub fn study(formulas: &[String], khz: &[Khz], host: Option<Khz>, days: u32) -> Result<Horizon, SweepError> {
    let host = host.map_or_else(|| Khz::try_from(HOST_KHZ), Ok).map_err(|bad| SweepError::Usage(bad.to_string()))?;
    if days > MOST_DAYS {
        return Err(SweepError::Usage(format!("--days {days}: at most {MOST_DAYS}")));
    }
    let usual = || FREQUENCIES_KHZ.into_iter().filter_map(|khz| Khz::new(u64::from(khz)).ok()).collect();
    let frequencies: Vec<Khz> = if khz.is_empty() { usual() } else { khz.to_vec() };
    let over_ns = u64::from(days) * 86_400_000_000_000; // at most 3.2·10¹⁸
    let mut more = String::new();
    if !khz.is_empty() {
        let list: Vec<String> = khz.iter().map(|khz| khz.get().to_string()).collect();
        more += &format!(" --tsc-khz {}", list.join(","));
    }
    if host.get() != HOST_KHZ {
        more += &format!(" --host-khz {}", host.get());
    }
    if days != DAYS {
        more += &format!(" --days {days}");
    }
    let row = |formula: &Formula| {
        let drift = |khz: &Khz| (formula.drift)(&Case { over_ns, khz: *khz, host });
        let clamp = |ps: i128| i64::try_from(ps).unwrap_or(if ps < 0 { i64::MIN } else { i64::MAX });
        Row {
            formula: formula.name.to_owned(),
            what: formula.what.to_owned(),
            source: formula.source.to_owned(),
            drift_ps: frequencies.iter().map(|khz| clamp(drift(khz))).collect(),
            command: format!("vmm study horizon --formula {}{more}", formula.name),
        }
    };
    let named = |name: &String| {
        FORMULAS.iter().find(|formula| formula.name == name.as_str()).map(row).ok_or_else(|| {
            let names: Vec<&str> = FORMULAS.iter().map(|formula| formula.name).collect();
            SweepError::Usage(format!("--formula {name}: there are {}", names.join(", ")))
        })
    };
    let rows = if formulas.is_empty() {
        FORMULAS.iter().map(row).collect()
    } else {
        formulas.iter().map(named).collect::<Result<_, _>>()?
    };
    let tsc_khz = frequencies.iter().map(|khz| khz.get()).collect();
    Ok(Horizon { schema: SCHEMA.to_owned(), days, host_khz: host.get(), tsc_khz, rows })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn khz(khz: u64) -> Khz {
        Khz::new(khz).unwrap()
    }

    fn drifts(formula: &str, frequency: u64) -> i64 {
        let studied = study(&[formula.to_owned()], &[khz(frequency)], None, DAYS).unwrap();
        studied.rows[0].drift_ps[0]
    }

    // Catches: a formula that is evaluated otherwise than docs/study/horizon.md says.
    #[test]
    fn known_drifts() {
        // 1005.828 ns an hour, 720 times.
        assert_eq!(drifts("page", 2_600_000), -724_196_434);
        // 500 Hz of 2.6 GHz: half a second in a month.
        assert_eq!(drifts("khz", 2_600_000), -498_461_538_462);
        // 250 ppm of 2,592,000 s.
        assert_eq!(drifts("tolerance", 2_600_000), -648_000_000_000_000);
        // Cut to 2,499,999 kHz the page is fast by 400 ppb: 1.04 s.
        assert!((1_036_000_000_000..1_037_000_000_000).contains(&drifts("scaled-page", 2_500_000)));
        // Half of the host's frequency is an exact ratio.
        assert_eq!(drifts("scaled-page", 1_500_000), drifts("page", 1_500_000));
        assert_eq!(drifts("svm-ratio", 1_500_000), 0);
        assert_eq!(drifts("vmclock", 2_600_000), 0, "less than half a picosecond");
        assert_eq!(drifts("masterclock", 2_600_000), drifts("raw", 2_600_000) - drifts("page", 2_600_000));
    }

    // Catches: results that are not those on the page.
    #[test]
    fn the_committed_results_are_these() {
        let committed = include_str!("../../../../../docs/study/horizon.json");
        let made = serde_json::to_string(&study(&[], &[], None, DAYS).unwrap()).unwrap();
        assert!(committed.trim_end() == made, "make it again: vmm study horizon --json docs/study/horizon.json");
    }

    #[test]
    fn a_wrong_formula_and_too_long_a_time_are_refused() {
        let none = study(&["sundial".to_owned()], &[], None, 1).unwrap_err().to_string();
        assert!(none.starts_with("--formula sundial: there are page, khz-deadline,"), "{none}");
        study(&[], &[], None, MOST_DAYS + 1).unwrap_err();
        study(&[], &[Khz::MIN, Khz::MAX], None, MOST_DAYS).unwrap();
    }
}
