//! Statistics of one figure over all stops.
//!
//! The sum is exact, in 2⁻⁶³ ns: a million errors of a millionth of a nanosecond are not lost in it. Mean, spread and
//! quantiles are floating-point numbers of nanoseconds.

use serde::Serialize;
use vmtime::ExactSpan;

/// The values so far.
#[derive(Clone, Debug, Default)]
pub struct Series {
    sum: ExactSpan,
    values_ns: Vec<f64>,
    worst: Option<(ExactSpan, u64)>,
}

/// What a series comes to. All in nanoseconds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Statistics {
    /// How many values.
    pub count: u64,
    /// Their sum.
    pub total_ns: f64,
    /// Whether the sum is exactly 0.
    pub total_is_zero: bool,
    /// Their mean: the drift per stop.
    pub mean_ns: f64,
    /// The mean's standard error: the sample's standard deviation over the square root of the count. It is what chance
    /// makes of the mean if the stops are independent.
    pub standard_error_ns: f64,
    /// The median.
    pub median_ns: f64,
    /// The 99th percentile of the values without their signs.
    pub p99_abs_ns: f64,
    /// The value farthest from 0.
    pub worst_ns: f64,
    /// The number of the stop that had it.
    pub worst_at: u64,
    /// How many values were not exactly 0.
    pub nonzero: u64,
    /// How many lie in which range.
    pub histogram: Vec<Bucket>,
}

/// A part of a histogram. Only those with values are there.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Bucket {
    /// Its end nearer to 0, with its sign; belongs to it.
    pub from_ns: f64,
    /// Its end farther from 0, with its sign; belongs to the next.
    pub to_ns: f64,
    /// Values in it.
    pub count: u64,
}

/// The decades of a histogram: values below the first are one bucket, those from the last on another.
const LEAST_DECADE: i32 = -4;
const MOST_DECADE: i32 = 9;

impl Series {
    /// Adds the value of stop `number`.
    pub fn add(&mut self, value: ExactSpan, number: u64) {
        self.sum = self.sum + value;
        self.values_ns.push(value.as_ns());
        if self.worst.is_none_or(|(worst, _)| value.abs() > worst.abs()) {
            self.worst = Some((value, number));
        }
    }

    /// What the values come to; none if there are none.
    #[must_use]
    #[allow(clippy::cast_precision_loss, reason = "a count of stops is far below 2^53")]
    pub fn statistics(&self) -> Option<Statistics> {
        let (worst, worst_at) = self.worst?;
        let count = self.values_ns.len() as f64;
        let mean_ns = self.sum.as_ns() / count;
        let squares: f64 = self.values_ns.iter().map(|value| (value - mean_ns).powi(2)).sum();
        let standard_error_ns = if count > 1.0 { (squares / (count - 1.0) / count).sqrt() } else { 0.0 };
        let mut sorted = self.values_ns.clone();
        sorted.sort_unstable_by(f64::total_cmp);
        let median_ns = quantile(&sorted, 1, 2);
        let mut sizes: Vec<f64> = self.values_ns.iter().map(|value| value.abs()).collect();
        sizes.sort_unstable_by(f64::total_cmp);
        Some(Statistics {
            count: number(self.values_ns.len()),
            total_ns: self.sum.as_ns(),
            total_is_zero: self.sum == ExactSpan::ZERO,
            mean_ns,
            standard_error_ns,
            median_ns,
            p99_abs_ns: quantile(&sizes, 99, 100),
            worst_ns: worst.as_ns(),
            worst_at,
            nonzero: number(self.values_ns.iter().filter(|value| **value != 0.0).count()),
            histogram: histogram(&sorted),
        })
    }
}

fn number(count: usize) -> u64 {
    u64::try_from(count).unwrap_or(u64::MAX)
}

/// The least of the sorted values that at least `part` of `whole` of them do not exceed.
fn quantile(sorted: &[f64], part: usize, whole: usize) -> f64 {
    let rank = sorted.len().saturating_mul(part).div_ceil(whole).saturating_sub(1);
    sorted.get(rank).copied().unwrap_or(0.0)
}

/// The bucket of a value: its end nearer to 0 and the one farther away.
fn bucket_of(value: f64) -> (f64, f64) {
    let size = value.abs();
    if size == 0.0 {
        return (0.0, 0.0);
    }
    let mut decade = LEAST_DECADE;
    while decade < MOST_DECADE && size >= 10_f64.powi(decade) {
        decade += 1;
    }
    let from = if decade == LEAST_DECADE { 0.0 } else { 10_f64.powi(decade - 1) };
    let (from, to) = if size >= 10_f64.powi(MOST_DECADE) {
        (10_f64.powi(MOST_DECADE), f64::MAX)
    } else {
        (from, 10_f64.powi(decade))
    };
    if value < 0.0 { (-from, -to) } else { (from, to) }
}

fn histogram(sorted: &[f64]) -> Vec<Bucket> {
    let mut buckets: Vec<Bucket> = Vec::new();
    for value in sorted {
        let (from_ns, to_ns) = bucket_of(*value);
        match buckets.last_mut() {
            Some(last) if (last.from_ns, last.to_ns) == (from_ns, to_ns) => last.count = last.count.saturating_add(1),
            _ => buckets.push(Bucket { from_ns, to_ns, count: 1 }),
        }
    }
    buckets
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vmtime::{GuestTsc, PageClock, Scale, VmTime};

    use super::*;

    fn of(values: &[i64]) -> Statistics {
        let mut series = Series::default();
        for (number, value) in (1..).zip(values) {
            series.add(ExactSpan::of_ns(*value), number);
        }
        series.statistics().unwrap()
    }

    #[test]
    fn the_figures_of_five_values() {
        let found = of(&[1, 2, 3, 4, -90]);
        assert_eq!((found.count, found.total_ns, found.mean_ns), (5, -80.0, -16.0));
        // Deviations 17, 18, 19, 20, −74: squares sum to 6850; 6850 / 4 / 5 = 342.5.
        assert!((found.standard_error_ns - 342.5_f64.sqrt()).abs() < 1e-9);
        assert_eq!((found.median_ns, found.p99_abs_ns), (2.0, 90.0));
        assert_eq!((found.worst_ns, found.worst_at, found.nonzero), (-90.0, 5, 5));
        let buckets: Vec<(f64, f64, u64)> = found.histogram.iter().map(|b| (b.from_ns, b.to_ns, b.count)).collect();
        assert_eq!(buckets, [(-10.0, -100.0, 1), (1.0, 10.0, 4)]);
    }

    #[test]
    fn one_value_has_no_spread_and_none_has_no_figures() {
        assert_eq!(of(&[7]).standard_error_ns, 0.0);
        assert_eq!(Series::default().statistics(), None);
        assert!(of(&[5, -5]).total_is_zero && !of(&[5, -4]).total_is_zero);
    }

    // Catches: a sum in floating point, in which 10⁵ errors of 2⁻³² ns vanish beside one of a second.
    #[test]
    fn small_errors_are_not_lost_beside_a_large_one() {
        let page =
            PageClock { tsc_timestamp: GuestTsc(0), system_time: VmTime(0), scale: Scale::new(1 << 31, -31).unwrap() };
        // 2³¹ · 2⁻⁶³ ns.
        let tiny = page.line(GuestTsc(1));
        let mut series = Series::default();
        series.add(ExactSpan::of_ns(1_000_000_000), 1);
        (0..100_000).for_each(|n| series.add(tiny, n + 2));
        series.add(ExactSpan::of_ns(-1_000_000_000), 0);
        assert_eq!(series.sum, page.line(GuestTsc(100_000)));
    }

    proptest! {
        #[test]
        fn every_value_is_in_the_bucket_that_holds_it(value in prop::num::f64::NORMAL) {
            let (from, to) = bucket_of(value);
            prop_assert!(from.abs() <= value.abs() && (value.abs() < to.abs() || to.abs() == f64::MAX));
            prop_assert!(to.is_sign_negative() == value.is_sign_negative());
        }
    }
}
