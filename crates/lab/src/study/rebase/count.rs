//! Counts how many reads are how many nanoseconds low, over all residues: none is sampled.
//!
//! A delta of `d = R·m + r` ticks (`R = 2^−tsc_shift`, or 1 for a shift that is not negative) is read as `⌊m · mul /
//! 2³²⌋`, or `⌊d · mul · 2^shift / 2³²⌋`. Its product leaves one of `N` remainders, all equally often: the multiples of
//! `g = gcd(product of one step, 2³²)`. In units of `g`, one shifted tick is `A`, and one nanosecond is `N`. So a case
//! is a remainder `i` or `j` in `0..N` and a number of ticks `r` in `0..R` that the shift drops, for the base (counted
//! from the old base) and for the read (counted from the new one). `docs/study/rebase.md` has the proof.

use serde::{Deserialize, Serialize};

use super::format::Format;
use crate::study::exact::{ceil, gcd, nearest};

/// Femtoseconds in a nanosecond.
const NS_FS: i128 = 1_000_000;

/// Reads that differ by the same number of nanoseconds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Share {
    /// The difference, in nanoseconds: 0 or less.
    pub ns: i64,
    /// How many cases, in decimal; not 0.
    pub count: String,
    /// Of how many, in decimal.
    pub of: String,
    /// The same in millionths, to the nearest.
    pub ppm: u64,
}

/// The time that one re-base loses, against the exact line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Loss {
    /// On average over all base ticks, in femtoseconds.
    pub mean_fs: u64,
    /// At most, in femtoseconds.
    pub most_fs: u64,
}

/// The numbers of the module's comment.
#[derive(Clone, Copy, Debug)]
pub struct Residues {
    n: i128,
    a: i128,
    r: i128,
}

/// Where the new base may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Base {
    /// At any tick: "now", as KVM and most VMMs choose it.
    Any,
    /// A multiple of R ticks after the old one, so that the guest's shift drops nothing between the two.
    Aligned,
}

impl Residues {
    /// Those of a page's format.
    #[must_use]
    pub fn of(format: Format) -> Self {
        // With a negative shift a step is a shifted tick, else a tick: in both cases its product is `tick()`.
        let (step, word) = (format.tick() % (1 << 32), 1_u128 << 32);
        let g = gcd(step, word);
        let whole = |number: u128| i128::try_from(number).unwrap_or(i128::MAX); // below 2⁶⁴
        Self { n: whole(word / g), a: whole(step / g), r: 1 << format.right() }
    }

    /// After how many ticks from the old base a new one describes the same clock, bit for bit.
    #[must_use]
    pub fn same_page_every_ticks(self) -> u64 {
        u64::try_from(self.n * self.r).unwrap_or(u64::MAX)
    }

    /// Reads of the new page less reads of the old one, at the same TSC.
    #[must_use]
    pub fn against_old_page(self, base: Base) -> Vec<Share> {
        let Self { n, a, r } = self;
        let carry = if base == Base::Any { r * (r - 1) / 2 } else { 0 }; // pairs of dropped ticks that make a whole one
        let at_least = |ns: i128| carry * pairs(n, ns * n - a) + (r * r - carry) * pairs(n, ns * n);
        shares(n * n * r * r, at_least)
    }

    /// Reads of the old page, which was kept, less the exact line rounded down.
    #[must_use]
    pub fn kept_against_line(self) -> Vec<Share> {
        let Self { n, a, r } = self;
        shares(n * r, |ns| (0..r).map(|dropped| n - ceil(ns * n * r - a * dropped, r).clamp(0, n)).sum())
    }

    /// Reads of the new page less the exact line of the old one rounded down.
    #[must_use]
    pub fn against_line(self, base: Base) -> Vec<Share> {
        let Self { n, a, r } = self;
        let at_base = if base == Base::Any { r } else { 1 };
        let cases = (0..at_base).flat_map(|before| (0..r).map(move |after| before + after));
        let at_least = |ns: i128| cases.clone().map(|dropped| pairs(n, ceil(ns * n * r - a * dropped, r))).sum();
        shares(n * n * r * at_base, at_least)
    }

    /// What a base whose `system_time` is the old page's reading loses.
    #[must_use]
    pub fn loss(self, base: Base) -> Loss {
        let Self { n, a, r } = self;
        // In units of 1 / (N·R) ns: i·R for the remainder, A·r for the dropped ticks.
        let dropped = if base == Base::Any { a * (r - 1) } else { 0 };
        let most = (n - 1) * r + dropped;
        let fs = |value: i128, unit: i128| u64::try_from(nearest(value * NS_FS, unit)).unwrap_or(u64::MAX);
        Loss { mean_fs: fs(most, 2 * n * r), most_fs: fs(most, n * r) }
    }
}

/// Pairs `(i, j)` of remainders in `0..n` with `i + j ≥ sum`.
fn pairs(n: i128, sum: i128) -> i128 {
    match sum {
        ..=0 => n * n,
        // Below it lie 1 + 2 + … + sum pairs.
        _ if sum <= n => n * n - sum * (sum + 1) / 2,
        _ => {
            let rest = (2 * n - 1 - sum).max(0); // (n−1−i) + (n−1−j) ≤ 2n − 2 − sum
            rest * (rest + 1) / 2
        }
    }
}

/// Shares of all cases, from `at_least(ns)`, the number of those that are low by `ns` or more.
fn shares(of: i128, at_least: impl Fn(i128) -> i128) -> Vec<Share> {
    let mut all = Vec::new();
    let (mut low, mut left) = (0, of);
    while left > 0 {
        let lower = at_least(low + 1);
        let count = left - lower;
        if count > 0 {
            let ppm = u64::try_from(nearest(count * 1_000_000, of)).unwrap_or(u64::MAX);
            let ns = i64::try_from(-low).unwrap_or(i64::MIN);
            all.push(Share { ns, count: count.to_string(), of: of.to_string(), ppm });
        }
        (low, left) = (low + 1, lower);
    }
    all
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    /// The exact line, rounded down.
    fn line(format: Format, ticks: u64) -> u128 {
        (u128::from(ticks) * format.tick()) >> format.line_bits()
    }

    /// Counts reads by how low they are.
    fn tally(cases: impl Iterator<Item = (u128, u128)>) -> BTreeMap<i64, u128> {
        let mut counts = BTreeMap::new();
        for (read, right) in cases {
            *counts.entry(i64::try_from(read).unwrap() - i64::try_from(right).unwrap()).or_default() += 1;
        }
        counts
    }

    /// Whether `shares` are those of `counts`, as fractions.
    fn same(shares: &[Share], counts: &BTreeMap<i64, u128>) -> bool {
        let of: u128 = counts.values().sum();
        shares.len() == counts.len()
            && shares.iter().all(|share| {
                let [count, all] = [&share.count, &share.of].map(|text| text.parse::<u128>().unwrap());
                count * of == counts.get(&share.ns).copied().unwrap_or(0) * all
            })
    }

    /// Formats whose products leave few remainders: `mul` is a multiple of 2²⁷, so there are at most 32.
    fn coarse() -> impl Strategy<Value = Format> {
        (1_u32..32, -3_i8..3).prop_map(|(high, shift)| Format::of(high << 27, shift))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        // Catches: a formula of this file that is not the count. Every base and every read of a whole period is tried,
        // with the guest's own arithmetic.
        #[test]
        fn formulas_are_counts(format in coarse()) {
            let residues = Residues::of(format);
            let period = residues.same_page_every_ticks();
            let every = 1_u64 << format.right();
            for (base, step) in [(Base::Any, 1), (Base::Aligned, usize::try_from(every).unwrap())] {
                let bases = || (0..period).step_by(step);
                let new = |at: u64, after: u64| format.read_ns(at) + format.read_ns(after);
                let all = || bases().flat_map(|at| (0..period).map(move |after| (at, after)));
                let old_page = tally(all().map(|(at, after)| (new(at, after), format.read_ns(at + after))));
                prop_assert!(same(&residues.against_old_page(base), &old_page), "{old_page:?}");
                let truth = tally(all().map(|(at, after)| (new(at, after), line(format, at + after))));
                prop_assert!(same(&residues.against_line(base), &truth), "{truth:?}");

                // The loss of a base, in units of 2^−line_bits ns.
                let unit = 1_u128 << format.line_bits();
                let lost = |at: u64| u128::from(at) * format.tick() - format.read_ns(at) * unit;
                let count = u128::try_from(bases().count()).unwrap();
                let fs = |sum: u128, of: u128| u64::try_from((sum * 2_000_000 + of) / (of * 2)).unwrap();
                let loss = residues.loss(base);
                prop_assert_eq!(loss.mean_fs, fs(bases().map(lost).sum(), count * unit));
                prop_assert_eq!(loss.most_fs, fs(bases().map(lost).max().unwrap(), unit));
            }
            let kept = tally((0..period).map(|ticks| (format.read_ns(ticks), line(format, ticks))));
            prop_assert!(same(&residues.kept_against_line(), &kept), "{kept:?}");
        }

        // Catches: a period after which the page is not the same, or a shorter one.
        #[test]
        fn a_base_a_period_later_is_the_same_page(format in coarse(), after in any::<u32>()) {
            let period = Residues::of(format).same_page_every_ticks();
            let differs = |at: u64, after: u64| format.read_ns(at) + format.read_ns(after) != format.read_ns(at + after);
            prop_assert!(!differs(period, after.into()));
            for at in 1..period {
                prop_assert!((0..period).any(|after| differs(at, after)), "{at} of {period}");
            }
        }
    }
}
