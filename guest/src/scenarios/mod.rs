//! Scenarios: each determines the sequence of expiries that the guest's timer is armed for.

mod deltas;

use core::hint::cold_path;

pub use deltas::{DEFAULT_MAX_DELTA_MS, Deltas};

/// Lowest tick rate, in Hz.
pub const HZ_MIN: u32 = 1;
/// Highest tick rate, in Hz.
pub const HZ_MAX: u32 = 10_000;

/// Count of a scenario without end. At the highest rate, so many ticks take 58 million years.
const ENDLESS: u64 = u64::MAX;

/// A scenario in progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scenario {
    /// Ticks at a fixed period, each expiry absolute: a late tick does not move the next.
    Periodic {
        /// Nanoseconds between expiries.
        period_ns: u64,
        /// Ticks still to make; `u64::MAX` = until the VMM ends the machine.
        left: u64,
    },
    /// Random waits, each from the moment the tick before it was handled.
    Deltas {
        /// The generator.
        deltas: Deltas,
        /// Ticks still to make.
        left: u64,
    },
}

impl Scenario {
    /// No tick at all.
    pub const NONE: Self = Self::Periodic { period_ns: 0, left: 0 };

    /// `hz` ticks a second, `count` of them or without end.
    #[must_use]
    pub fn periodic(hz: u32, count: Option<u64>) -> Self {
        Self::Periodic { period_ns: 1_000_000_000 / u64::from(hz.max(HZ_MIN)), left: count.unwrap_or(ENDLESS) }
    }

    /// How many ticks it will make; 0 = without end (as in the ring's header).
    #[must_use]
    pub fn expected(&self) -> u64 {
        match *self {
            Self::Periodic { left: ENDLESS, .. } => 0,
            Self::Periodic { left, .. } => left,
            Self::Deltas { left, .. } => left,
        }
    }

    /// The next expiry in VM time; `None` when the scenario is over.
    ///
    /// `last_expires_ns` is the expiry before it (for the first tick: now), `now_ns` the time when that was handled.
    // The tick is compiled twice, for one CPU and for several: the compiler would not inline it on its own, and a call
    // costs as much as half of this function.
    #[inline(always)]
    pub fn next(&mut self, last_expires_ns: u64, now_ns: u64) -> Option<u64> {
        match self {
            Self::Periodic { period_ns, left } => {
                *left = left.checked_sub(1)?;
                Some(last_expires_ns.checked_add(*period_ns).unwrap_or_else(|| {
                    cold_path();
                    u64::MAX
                }))
            }
            Self::Deltas { deltas, left } => {
                *left = left.checked_sub(1)?;
                Some(now_ns.saturating_add_signed(deltas.next_ns()))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn periodic_expiries_are_absolute_and_end() {
        let mut s = Scenario::periodic(250, Some(2));
        assert_eq!(s.expected(), 2);
        assert_eq!(s.next(1_000, 1_000), Some(4_001_000));
        assert_eq!(s.next(4_001_000, 9_999_999_999), Some(8_001_000));
        assert_eq!(s.next(8_001_000, 0), None);
    }

    #[test]
    fn idle_has_no_end() {
        let mut s = Scenario::periodic(100, None);
        assert_eq!(s.expected(), 0);
        assert_eq!(s.next(u64::MAX - 1, 0), Some(u64::MAX));
    }

    #[test]
    fn deltas_never_go_below_zero() {
        let mut s = Scenario::Deltas { deltas: Deltas::new(1, DEFAULT_MAX_DELTA_MS), left: 1_000 };
        let mut n = 0;
        while s.next(0, 0).is_some() {
            n += 1;
        }
        assert_eq!(n, 1_000);
    }
}
