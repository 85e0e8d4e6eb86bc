//! Reproducible random waits: from a second in the past to beyond 275 s, where the conversion of the first patch caps.

/// Default of `max_ms=`: the longest wait, in milliseconds.
pub const DEFAULT_MAX_DELTA_MS: u64 = 400_000;

const US: u64 = 1_000;
const MS: u64 = 1_000 * US;
const S: u64 = 1_000 * MS;

/// Kinds of wait: weight, then least and greatest length in nanoseconds. Past ones are drawn as lengths and negated.
/// Long ones are rare, since they take most of a run in real time.
const CLASSES: [(u64, u64, u64); 8] = [
    (4, 0, S),
    (2, 0, 0),
    (5, 1, US),
    (8, US, MS),
    (8, MS, 100 * MS),
    (3, 100 * MS, 3 * S),
    (1, 3 * S, 270 * S),
    (1, 270 * S, 400 * S),
];
/// The class whose waits lie in the past.
const PAST: usize = 0;

/// A generator of waits: the same `seed` gives the same waits on every machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deltas {
    state: u64,
    drawn: usize,
    max_ns: u64,
}

impl Deltas {
    /// A generator whose waits are at most `max_ms` milliseconds long.
    #[must_use]
    pub fn new(seed: u64, max_ms: u64) -> Self {
        Self { state: seed, drawn: 0, max_ns: max_ms.saturating_mul(MS) }
    }

    /// The next wait in nanoseconds, negative for an expiry in the past.
    ///
    /// The first eight take each class in turn, so that a short run covers them all.
    pub fn next_ns(&mut self) -> i64 {
        let mut ticket = self.random() % CLASSES.iter().map(|(weight, ..)| weight).sum::<u64>();
        let drawn = CLASSES.iter().position(|(weight, ..)| {
            let hit = ticket < *weight;
            ticket = ticket.wrapping_sub(*weight);
            hit
        });
        let class = if self.drawn < CLASSES.len() { self.drawn } else { drawn.unwrap_or(PAST) };
        self.drawn = self.drawn.saturating_add(1);
        let (_, least, greatest) = CLASSES.get(class).copied().unwrap_or((0, 0, 0));
        let length = (least + self.random() % (greatest - least + 1)).min(self.max_ns);
        let length = i64::try_from(length).unwrap_or(i64::MAX);
        if class == PAST { -length } else { length }
    }

    /// SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014).
    fn random(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::*;

    fn draw(seed: u64, max_ms: u64, n: usize) -> Vec<i64> {
        let mut deltas = Deltas::new(seed, max_ms);
        (0..n).map(|_| deltas.next_ns()).collect()
    }

    #[test]
    fn splitmix_is_the_published_one() {
        // First output for seed 0 of the reference implementation.
        assert_eq!(Deltas::new(0, 0).random(), 0xe220_a839_7b1d_cdaf);
    }

    #[test]
    fn waits_depend_on_the_seed_only() {
        assert_eq!(draw(7, DEFAULT_MAX_DELTA_MS, 500), draw(7, DEFAULT_MAX_DELTA_MS, 500));
        assert_ne!(draw(7, DEFAULT_MAX_DELTA_MS, 500), draw(8, DEFAULT_MAX_DELTA_MS, 500));
    }

    #[test]
    fn a_short_run_covers_every_class() {
        for seed in 0..50 {
            let waits = draw(seed, DEFAULT_MAX_DELTA_MS, 8);
            assert!(waits[0] <= 0 && waits[0] >= -1_000_000_000);
            assert_eq!(waits[1], 0);
            assert!(waits[7] >= 270_000_000_000 && waits[7] <= 400_000_000_000);
        }
    }

    #[test]
    fn long_waits_are_rare_and_capped_on_request() {
        let waits = draw(1, DEFAULT_MAX_DELTA_MS, 10_000);
        let long = waits.iter().filter(|w| **w > 3_000_000_000).count();
        assert!((400..900).contains(&long), "{long} of 10000");
        assert!(waits.iter().any(|w| *w > 275_000_000_000));
        assert!(draw(1, 20, 10_000).iter().all(|w| (-20_000_000..=20_000_000).contains(w)));
    }
}
