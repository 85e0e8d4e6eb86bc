//! A base that is chosen: of the last ticks before a restore, the one at which the exact relation is closest above a
//! whole nanosecond.
//!
//! What is left over, at most the widest gap below, stands in the VMM's own exact account of VM time. So it is not lost
//! again at the next re-base, and the sum over any number of re-bases stays below one gap.

use serde::{Deserialize, Serialize};

use super::format::Format;
use crate::study::exact::{gcd, nearest};

/// What a chosen base is off by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LookBack {
    /// Ticks that are looked at, the latest included.
    pub ticks: u32,
    /// Mean of what is left over, if the exact relation is anywhere, in femtoseconds.
    pub mean_fs: u64,
    /// Always less than this, in femtoseconds.
    pub below_fs: u64,
    /// No look-back is better than this, in femtoseconds: fractions of a nanosecond that the page's line takes at ticks
    /// are so far apart.
    pub grid_fs: u64,
}

/// What a look-back of `ticks` ticks, at least one, leaves over on pages of `format`.
///
/// `j` ticks before the restore the exact relation is lower by `j · tick`. Modulo a nanosecond these steps are points
/// on a circle. The relation at the restore is a point on it too, and what is left over is the way from the next step's
/// point below it. So it is less than the widest gap between neighbouring points; for a uniformly distributed relation
/// its mean is the sum of the squares of all gaps over twice the circle.
#[must_use]
pub fn look_back(format: Format, ticks: u32) -> LookBack {
    const FS: u128 = 1_000_000;
    let circle = 1_u128 << format.line_bits();
    let mut points: Vec<u128> = (0..u128::from(ticks)).map(|back| back * format.tick() % circle).collect();
    points.sort_unstable();
    points.dedup();
    let next = points.iter().copied().skip(1).chain([circle]); // The first point is 0.
    let gaps = points.iter().zip(next).map(|(at, next)| next - at);
    let (widest, squares) = gaps.fold((0, 0_u128), |(widest, sum), gap| (gap.max(widest), sum + gap * gap));
    let fs = |num: u128, den: u128| {
        let [num, den] = [num, den].map(|number| i128::try_from(number).unwrap_or(i128::MAX));
        u64::try_from(nearest(num, den)).unwrap_or(u64::MAX)
    };
    LookBack {
        ticks,
        // squares / circle is at most the circle, 2⁶³.
        mean_fs: fs(squares / circle * FS, 2 * circle),
        below_fs: fs(widest * FS, circle),
        grid_fs: fs(gcd(format.tick(), circle) * FS, circle),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vmtime::Khz;

    use super::*;

    /// What is left over with the best base, by trying them all; in units of the line.
    fn best(format: Format, ticks: u32, relation: u128) -> u128 {
        let circle = 1_u128 << format.line_bits();
        (0..u128::from(ticks)).map(|back| (relation + circle - back * format.tick() % circle) % circle).min().unwrap()
    }

    proptest! {
        // Catches: a bound that a relation exceeds, or one that none comes near.
        #[test]
        fn no_relation_leaves_more_over(
            khz in 1_000_000_u64..6_000_000, ticks in 1_u32..200, relation in any::<u64>(),
        ) {
            let format = Format::of_kvm(Khz::new(khz).unwrap());
            let bound = look_back(format, ticks);
            let circle = 1_u128 << format.line_bits();
            let over = best(format, ticks, u128::from(relation) % circle);
            prop_assert!(over * 1_000_000 <= (u128::from(bound.below_fs) + 1) * circle);
            // Just below a point the way from the next one is longest; one of the points has the widest gap below it.
            let widest = (0..u128::from(ticks)).map(|back| {
                best(format, ticks, (back * format.tick() + circle - 1) % circle) + 1
            });
            let widest = widest.max().unwrap();
            prop_assert_eq!((widest * 2_000_000 + circle) / (2 * circle), u128::from(bound.below_fs));
        }
    }

    // Catches: a mean that is not that of all relations.
    #[test]
    fn the_mean_is_that_of_all_relations() {
        // 5 · 2²⁹: an eighth of a nanosecond is the grid. With 3 ticks the points are 0, 5 and 2 eighths: gaps 2, 3, 3.
        let bound = look_back(Format::of(5 << 29, 0), 3);
        assert_eq!(bound, LookBack { ticks: 3, mean_fs: 171_875, below_fs: 375_000, grid_fs: 125_000 }); // 22/8 / 2 / 8
        // Looking back at all eight, every gap is the grid.
        let bound = look_back(Format::of(5 << 29, 0), 8);
        assert_eq!((bound.mean_fs, bound.below_fs), (62_500, 125_000));
    }
}
