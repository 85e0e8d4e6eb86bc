//! How much sooner than its deadline the wake timer of a sleeping vCPU's thread expires, so that the thread polls the
//! TSC when the deadline comes.
//!
//! From a timer's expiry until the thread runs, a host takes tens of microseconds, and the number varies. So the timer
//! is set earlier by about the worst of these latencies, and the thread polls the TSC for the rest. That costs a little
//! CPU time, and the guest's timer is then as precise as the TSC and not as the scheduler. KVM also polls
//! (`halt_poll_ns`), but after a HLT and without knowing when a wake-up comes. Here the instant is known.

use std::time::Duration;

/// Polling takes at most this share of all time, in percent.
const SHARE_PERCENT: u64 = 8;
/// A window that was too wide shrinks by the excess divided by SHRINK. One that was too narrow grows by the lack
/// divided by GROW. So it converges to a width at which at most one wake-up in a hundred is late.
const SHRINK: u64 = 1024;
const GROW: u64 = 2;
/// The first window: the worst latency of most hosts, so that the first ticks are not late either.
const FIRST_NS: u64 = 100_000;

/// The window of one vCPU, learned from its wakes. Times are host nanoseconds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HaltPoll {
    max_ns: u64,
    window_ns: u64,
    /// How long the next poll may last. It grows as time passes, and polling uses it up.
    credit_ns: u64,
}

impl HaltPoll {
    /// A window of `max` or less; zero never polls.
    pub(crate) fn new(max: Duration) -> Self {
        let max_ns = u64::try_from(max.as_nanos()).unwrap_or(u64::MAX);
        Self { max_ns, window_ns: FIRST_NS.min(max_ns), credit_ns: max_ns }
    }

    /// How much sooner than the deadline the timer is to expire.
    pub(crate) fn window_ns(&self) -> u64 {
        self.window_ns.min(self.credit_ns)
    }

    /// Adds what may be polled after `passed_ns` of time.
    pub(crate) fn add_credit(&mut self, passed_ns: u64) {
        self.credit_ns = self.credit_ns.saturating_add(passed_ns.saturating_mul(SHARE_PERCENT) / 100).min(self.max_ns);
    }

    /// Adapts the window: the thread ran `late_ns` after the timer was to expire.
    pub(crate) fn learn(&mut self, late_ns: u64) {
        // One stall of the host is no reason to poll for a second.
        let late_ns = late_ns.min(self.window_ns.saturating_mul(2).max(FIRST_NS));
        let wider = late_ns.saturating_sub(self.window_ns) / GROW;
        let narrower = self.window_ns.saturating_sub(late_ns).div_ceil(SHRINK);
        self.window_ns = self.window_ns.saturating_add(wider).saturating_sub(narrower).min(self.max_ns);
    }

    /// Subtracts a poll that lasted `polled_ns`.
    pub(crate) fn spend(&mut self, polled_ns: u64) {
        self.credit_ns = self.credit_ns.saturating_sub(polled_ns);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// After many wake-ups with these latencies.
    fn after(latencies_ns: &[u64]) -> HaltPoll {
        let mut halt_poll = HaltPoll::new(Duration::from_micros(200));
        for _ in 0..4_000 {
            for ns in latencies_ns {
                halt_poll.learn(*ns);
                halt_poll.add_credit(1_000_000);
            }
        }
        halt_poll
    }

    #[test]
    fn the_window_covers_the_hosts_latency() {
        let steady = after(&[50_000]).window_ns();
        assert!((50_000..52_000).contains(&steady), "{steady}");
        // Nineteen of twenty wake-ups take 40 µs, one takes 120 µs: the window covers most of that one too.
        let mut usual = [40_000; 20];
        usual[0] = 120_000;
        let mixed = after(&usual).window_ns();
        assert!((80_000..120_000).contains(&mixed), "{mixed}");
    }

    #[test]
    fn one_stall_does_not_double_the_window() {
        let mut halt_poll = after(&[40_000]);
        let before = halt_poll.window_ns();
        halt_poll.learn(50_000_000);
        assert!(halt_poll.window_ns() < before * 2, "{before} {}", halt_poll.window_ns());
    }

    proptest! {
        #[test]
        fn no_more_is_polled_than_was_earned(
            most in 0_u64..1_000_000, wakes in prop::collection::vec((0_u64..300_000, 1_000_u64..20_000_000), 1..500)
        ) {
            let mut halt_poll = HaltPoll::new(Duration::from_nanos(most));
            let (mut polled, mut passed) = (0, 0);
            for (late, period) in wakes {
                halt_poll.add_credit(period);
                passed += period;
                let window = halt_poll.window_ns();
                prop_assert!(window <= most);
                let now = window.saturating_sub(late);
                halt_poll.learn(late);
                halt_poll.spend(now);
                polled += now;
                prop_assert!(polled <= most + passed * SHARE_PERCENT / 100);
            }
        }
    }
}
