//! Measures how precise the conversions are, and what they cost.
//!
//! Each conversion of the guest's library is compared with the exact inverse of the page, which the VMM's own time
//! arithmetic computes in 128 bits, over random waits of several magnitudes and pages of realistic and extreme
//! frequencies. The cost is counted by stepping the guest through a tick.

use std::sync::atomic::AtomicBool;

use guest::pvclock::{cached_mult, exact, mult, split, system_ns};
use guest_abi::pvclock::TimeInfo;
use machine::HostEnvironment;
use oorandom::Rand64;
use serde::{Deserialize, Serialize};
use vmtime::{DeadlinePolicy, GuestTsc, Khz, PageClock, Scale, VmTime};

use crate::sweep::{self, SweepError, Tally};

/// Random waits for each page and magnitude.
const SAMPLES: u32 = 20_000;
/// Seed of the generator of the waits.
const SEED: u128 = 2016;

/// TSC frequencies of real machines, in kHz.
const REALISTIC: [u32; 10] =
    [1_000_000, 1_500_000, 1_995_379, 2_099_998, 2_400_000, 2_596_142, 2_600_000, 2_899_998, 3_000_000, 3_792_874];
/// The lowest and highest TSC frequencies that [`Khz`] accepts, and those where the multiplier is least and greatest.
const EXTREME: [u32; 8] = [10_000, 62_500, 100_001, 500_000, 4_000_001, 7_999_999, 12_000_000, 100_000_000];

/// Magnitudes of waits: name, from, to (ns).
const WAITS: [(&str, u64, u64); 5] = [
    ("1 µs to 1 ms", 1_000, 1_000_000),
    ("1 ms to 1 s", 1_000_000, 1_000_000_000),
    ("1 s to 275 s", 1_000_000_000, 274_877_906_943),
    ("275 s to 1 h", 274_877_906_944, 3_600_000_000_000),
    ("1 h to 30 days", 3_600_000_000_000, 2_592_000_000_000_000),
];

/// Precision and cost of all conversions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Arithmetic {
    /// Random waits for each page and magnitude.
    pub samples: u32,
    /// Precision, for each set of frequencies, magnitude of wait and conversion.
    pub precision: Vec<Precision>,
    /// Cost, for each conversion.
    pub cost: Vec<CostRow>,
}

/// How far a conversion's deadline is from the exact one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Precision {
    /// "realistic" or "extreme" frequencies.
    pub frequencies: String,
    /// The magnitude of the wait.
    pub wait: String,
    /// The conversion.
    pub conversion: String,
    /// Share of the deadlines that are early, in VM time, by 1 ns or more.
    pub early_share: f64,
    /// How early the earliest deadline is, in TSC ticks before the exact one.
    pub most_early_ticks: u64,
    /// The same in nanoseconds of VM time.
    pub most_early_ns: u64,
    /// Root mean square of the error, in TSC ticks.
    pub rms_ticks: f64,
    /// The same in nanoseconds of VM time.
    pub rms_ns: f64,
    /// Number of deadlines that are late, in VM time.
    pub late: u64,
    /// Share of the deadlines that are early by more than a microsecond.
    pub over_1us_share: f64,
}

/// What one tick with a conversion costs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CostRow {
    /// The clockevent.
    pub clockevent: String,
    /// From one handler's entry to the next.
    pub tick: Tally,
    /// The command that shows the instructions.
    pub command: String,
}

/// A conversion under test.
type Convert = fn(&TimeInfo, u64) -> Option<u64>;

const CONVERSIONS: [(&str, Convert); 3] = [
    ("split", |page, at| split(page, at).ok()),
    ("mult", |page, at| mult(page, cached_mult(page.tsc_to_system_mul)?, at).ok()),
    ("exact", |page, at| exact(page, at).ok()),
];

/// The page of a TSC of `khz` some 47 s after boot, as the VMM's clock and as the guest reads it.
fn page(khz: u32) -> Result<(PageClock, TimeInfo), SweepError> {
    let khz = Khz::new(u64::from(khz)).map_err(|bad| SweepError::Usage(bad.to_string()))?;
    let clock = PageClock {
        tsc_timestamp: GuestTsc(123_456_789_012),
        system_time: VmTime(47_483_380_389),
        scale: Scale::from_khz(khz),
    };
    let info = TimeInfo {
        version: 2,
        tsc_timestamp: clock.tsc_timestamp.0,
        system_time: clock.system_time.0,
        tsc_to_system_mul: clock.scale.mul(),
        tsc_shift: clock.scale.shift(),
        ..TimeInfo::default()
    };
    Ok((clock, info))
}

/// Sums of errors.
#[derive(Default)]
struct Errors {
    count: u64,
    early: u64,
    late: u64,
    over_1us: u64,
    most_early_ticks: u64,
    most_early_ns: u64,
    square_ticks: f64,
    square_ns: f64,
}

impl Errors {
    #[allow(clippy::cast_precision_loss, reason = "a mean to three digits")]
    fn add(&mut self, clock: &PageClock, info: &TimeInfo, wait_ns: u64, convert: Convert) {
        let at = clock.system_time.0.saturating_add(wait_ns);
        let Some(exact) = clock.least_tsc(VmTime(at)) else { return };
        let Some(deadline) = convert(info, at) else { return };
        self.count += 1;
        let ticks = exact.0.abs_diff(deadline);
        // The guest's clock when the deadline fires.
        let shown = system_ns(info, deadline);
        if deadline > exact.0 {
            self.late += 1;
        }
        let early_ns = at.saturating_sub(shown);
        self.early += u64::from(early_ns != 0);
        if early_ns > 1_000 {
            self.over_1us += 1;
        }
        self.most_early_ns = self.most_early_ns.max(early_ns);
        if deadline <= exact.0 {
            self.most_early_ticks = self.most_early_ticks.max(ticks);
        }
        self.square_ticks += (ticks as f64).powi(2);
        self.square_ns += (early_ns as f64).powi(2);
    }

    #[allow(clippy::cast_precision_loss, reason = "a mean to three digits")]
    fn sum_up(self, frequencies: &str, wait: &str, conversion: &str) -> Precision {
        let count = self.count.max(1) as f64;
        // Six digits are enough, and do not depend on the machine's rounding.
        let rounded = |value: f64| (value * 1e6).round() / 1e6;
        Precision {
            frequencies: frequencies.to_owned(),
            wait: wait.to_owned(),
            conversion: conversion.to_owned(),
            early_share: rounded(self.early as f64 / count),
            most_early_ticks: self.most_early_ticks,
            most_early_ns: self.most_early_ns,
            rms_ticks: rounded((self.square_ticks / count).sqrt()),
            rms_ns: rounded((self.square_ns / count).sqrt()),
            late: self.late,
            over_1us_share: rounded(self.over_1us as f64 / count),
        }
    }
}

/// A random wait between `from` and `to`; all powers of two in between are equally likely.
fn wait(random: &mut Rand64, from: u64, to: u64) -> u64 {
    let (low, high) = (from.max(1).ilog2(), to.max(1).ilog2());
    let bits = random.rand_range(u64::from(low)..u64::from(high) + 1);
    let floor = 1u64 << bits;
    random.rand_range(floor..floor.saturating_mul(2)).clamp(from, to)
}

/// Precision of all conversions.
///
/// # Errors
/// If a frequency of the study is not one of a TSC.
pub fn precision() -> Result<Vec<Precision>, SweepError> {
    let mut all = Vec::new();
    for (frequencies, khz) in [("realistic", REALISTIC.as_slice()), ("extreme", EXTREME.as_slice())] {
        for (name, from, to) in WAITS {
            for (conversion, convert) in CONVERSIONS {
                let mut random = Rand64::new(SEED);
                let mut errors = Errors::default();
                for khz in khz {
                    let (clock, info) = page(*khz)?;
                    for _ in 0..SAMPLES {
                        errors.add(&clock, &info, wait(&mut random, from, to), convert);
                    }
                }
                all.push(errors.sum_up(frequencies, name, conversion));
            }
        }
    }
    Ok(all)
}

/// Counts what a tick costs with each clockevent.
///
/// # Errors
/// [`SweepError`].
pub fn cost(env: &HostEnvironment, cancel: &AtomicBool) -> Result<Vec<CostRow>, SweepError> {
    let image = super::guest()?;
    let mut rows = Vec::new();
    for clockevent in super::CLOCKEVENTS {
        let options = super::options(clockevent, &["1"], DeadlinePolicy::Rescale, 1)?;
        let tick = sweep::tally(env, &image, &options, cancel)?;
        rows.push(CostRow {
            clockevent: clockevent.to_owned(),
            tick,
            command: super::command(clockevent, "--ratio 1 --json -"),
        });
    }
    Ok(rows)
}

/// Measures precision and cost.
///
/// # Errors
/// [`SweepError`].
pub fn study(env: &HostEnvironment, cancel: &AtomicBool) -> Result<Arithmetic, SweepError> {
    Ok(Arithmetic { samples: SAMPLES, precision: precision()?, cost: cost(env, cancel)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exact_conversion_is_the_inverse_and_the_others_are_never_late() {
        for row in precision().unwrap() {
            assert_eq!(row.late, 0, "{row:?}");
            if row.conversion == "exact" {
                assert_eq!((row.most_early_ticks, row.most_early_ns), (0, 0), "{row:?}");
            }
            // 2^26 is lost of 2^32, and the shift of a usual TSC loses one bit more: 128 ticks, no more, up to the cap.
            let below_cap = !row.wait.ends_with('h') && !row.wait.ends_with("days");
            if row.conversion == "split" && row.frequencies == "realistic" && below_cap {
                assert_eq!((row.most_early_ticks, row.over_1us_share), (128, 0.0), "{row:?}");
            }
            // The cap: nothing longer than 275 s.
            if row.conversion == "split" && !below_cap {
                assert!(row.over_1us_share > 0.99, "{row:?}");
            }
        }
    }

    // Catches: committed results that are not those of this arithmetic.
    #[test]
    fn the_committed_study_holds_these_results() {
        // Compared as text: a decimal fraction that is parsed and printed may come out different.
        let committed = include_str!("../../../../docs/study/results.json");
        assert!(committed.contains(crate::study::SCHEMA));
        assert!(committed.contains(&serde_json::to_string(&precision().unwrap()).unwrap()));
    }

    #[test]
    fn waits_are_in_range() {
        let mut random = Rand64::new(1);
        for (_, from, to) in WAITS {
            for _ in 0..1000 {
                assert!((from..=to).contains(&wait(&mut random, from, to)));
            }
        }
    }
}
