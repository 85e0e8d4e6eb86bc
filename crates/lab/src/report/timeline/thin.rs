//! Thins ticks out: keeps the worst of each group of neighbours.

use super::Tick;

/// Ticks kept at most. Once there were so many, at least half of it is kept.
const KEPT: usize = 2_000;

/// The ticks that are kept. Each stands for `stride` of them.
#[derive(Debug)]
pub(super) struct Thinned {
    kept: Vec<Tick>,
    stride: u64,
    /// The worst tick of the group that is not complete yet, and the group's size so far.
    open: Option<(Tick, u64)>,
}

impl Default for Thinned {
    fn default() -> Self {
        Self { kept: Vec::new(), stride: 1, open: None }
    }
}

impl Thinned {
    pub(super) fn push(&mut self, tick: Tick) {
        let (worst, count) = match self.open.take() {
            None => (tick, 1),
            Some((open, count)) => (worse(open, tick), count.saturating_add(1)),
        };
        if count < self.stride {
            self.open = Some((worst, count));
            return;
        }
        self.kept.push(worst);
        if self.kept.len() >= KEPT {
            self.halve();
        }
    }

    fn halve(&mut self) {
        let mut pairs = std::mem::take(&mut self.kept).into_iter();
        while let Some(first) = pairs.next() {
            self.kept.push(match pairs.next() {
                Some(second) => worse(first, second),
                None => first,
            });
        }
        self.stride = self.stride.saturating_mul(2);
    }

    /// How many ticks each kept one stands for.
    pub(super) fn stride(&self) -> u64 {
        self.stride
    }

    pub(super) fn ticks(&self) -> impl Iterator<Item = &Tick> {
        self.kept.iter().chain(self.open.as_ref().map(|(tick, _)| tick))
    }
}

fn worse(a: Tick, b: Tick) -> Tick {
    if b.worst_ns() > a.worst_ns() { b } else { a }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tick(number: u64, late_ns: u64) -> Tick {
        let expires_ns = number * 1_000_000;
        Tick { expires_ns, fired_ns: expires_ns + late_ns, host_ns: None, early_ns: Vec::new(), early_wakes: 0 }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn the_worst_is_always_kept_in_bounded_memory(count in 1u64..20_000, worst in any::<prop::sample::Index>()) {
            let worst = u64::try_from(worst.index(usize::try_from(count).unwrap())).unwrap();
            let mut thinned = Thinned::default();
            for number in 0..count {
                thinned.push(tick(number, if number == worst { 500_000 } else { number % 7 }));
                prop_assert!(thinned.kept.len() < KEPT);
            }
            let kept: Vec<&Tick> = thinned.ticks().collect();
            prop_assert!(kept.iter().any(|tick| tick.worst_ns() == 500_000));
            prop_assert!(kept.is_sorted_by_key(|tick| tick.expires_ns));
            prop_assert!(count < 2_000 || kept.len() >= KEPT / 2);
            if count < 2_000 {
                prop_assert_eq!((u64::try_from(kept.len()).unwrap(), thinned.stride()), (count, 1));
            }
        }
    }
}
