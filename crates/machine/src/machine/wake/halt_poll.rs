//! How much sooner than its deadline a sleeping vCPU's thread is called, so that it looks at the TSC when the time comes.
//!
//! A host takes tens of microseconds from a timer's expiry to the thread that it wakes, and never the same number of them.
//! Called sooner by about what the host takes at worst, the thread waits for the rest by looking at the TSC: it costs a
//! little of a CPU, and what the guest sees is then the TSC's precision and not the scheduler's. KVM does likewise
//! (`halt_poll_ns`), but polls after a halt and in the hope of a wake; here the instant is known.

use std::time::Duration;

/// What is polled at most, as a share of all time, in percent.
const SHARE_PERCENT: u64 = 8;
/// The window shrinks by this part of what it was too wide, and grows by half of what it was too narrow: it settles where
/// one wake in a hundred or fewer comes late.
const SHRINK: u64 = 1024;
const GROW: u64 = 2;
/// Where it begins: what hosts take at worst, so that the first ticks are not late either.
const FIRST_NS: u64 = 100_000;

/// The window of one vCPU, learned from its wakes. Times are host nanoseconds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HaltPoll {
    most: u64,
    window: u64,
    /// What may be polled at once, earned as time passes.
    credit: u64,
}

impl HaltPoll {
    /// A window of `most` or less; zero never polls.
    pub(crate) fn new(most: Duration) -> Self {
        let most = u64::try_from(most.as_nanos()).unwrap_or(u64::MAX);
        Self { most, window: FIRST_NS.min(most), credit: most }
    }

    /// How much sooner than the deadline to be called.
    pub(crate) fn window(&self) -> u64 {
        self.window.min(self.credit)
    }

    /// So much time passed.
    pub(crate) fn earn(&mut self, passed: u64) {
        self.credit = self.credit.saturating_add(passed.saturating_mul(SHARE_PERCENT) / 100).min(self.most);
    }

    /// A call came so late.
    pub(crate) fn woke(&mut self, late: u64) {
        // One stall of the host is no reason to poll for a second.
        let late = late.min(self.window.saturating_mul(2).max(FIRST_NS));
        let wider = late.saturating_sub(self.window) / GROW;
        let narrower = self.window.saturating_sub(late).div_ceil(SHRINK);
        self.window = self.window.saturating_add(wider).saturating_sub(narrower).min(self.most);
    }

    /// So much was polled.
    pub(crate) fn spend(&mut self, polled: u64) {
        self.credit = self.credit.saturating_sub(polled);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn late(ns: &[u64]) -> HaltPoll {
        let mut early = HaltPoll::new(Duration::from_micros(200));
        for _ in 0..4_000 {
            for ns in ns {
                early.woke(*ns);
                early.earn(1_000_000);
            }
        }
        early
    }

    #[test]
    fn the_window_covers_what_the_host_takes() {
        let steady = late(&[50_000]).window();
        assert!((50_000..52_000).contains(&steady), "{steady}");
        // Nineteen in twenty at 40 µs, one at 120: the window is for that one too, or for most of it.
        let mut usual = [40_000; 20];
        usual[0] = 120_000;
        let mixed = late(&usual).window();
        assert!((80_000..120_000).contains(&mixed), "{mixed}");
    }

    #[test]
    fn one_stall_does_not_open_it() {
        let mut early = late(&[40_000]);
        let before = early.window();
        early.woke(50_000_000);
        assert!(early.window() < before * 2, "{before} {}", early.window());
    }

    proptest! {
        #[test]
        fn no_more_is_polled_than_was_earned(
            most in 0_u64..1_000_000, wakes in prop::collection::vec((0_u64..300_000, 1_000_u64..20_000_000), 1..500)
        ) {
            let mut early = HaltPoll::new(Duration::from_nanos(most));
            let (mut polled, mut passed) = (0, 0);
            for (late, period) in wakes {
                early.earn(period);
                passed += period;
                let window = early.window();
                prop_assert!(window <= most);
                let now = window.saturating_sub(late);
                early.woke(late);
                early.spend(now);
                polled += now;
                prop_assert!(polled <= most + passed * SHARE_PERCENT / 100);
            }
        }
    }
}
