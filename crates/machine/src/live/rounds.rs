//! When the guest is stopped: the rule of convergence.
//!
//! A round sends the pages that changed during the one before it, and measures how fast. If what has changed since then
//! can be sent within the downtime that is allowed, the guest is stopped. If that does not come about in
//! [`ROUNDS_MAX`] rounds, the migration is given up, and the guest goes on at the source: it writes too fast.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The most rounds before the guest is stopped or the migration given up.
pub(super) const ROUNDS_MAX: u32 = 30;

/// What a migration came to, at the source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Figures {
    /// Rounds of pages while the guest ran.
    pub rounds: u32,
    /// Bytes sent, all in all.
    pub bytes: u64,
    /// Pages sent, counted each time; not those that were zero.
    pub pages: u64,
    /// Of these, pages that were sent while the guest was stopped.
    pub last_pages: u64,
    /// From the first byte to the destination's confirmation, in nanoseconds.
    pub total_ns: u64,
    /// From the guest's stop here to the confirmation that it runs there, in nanoseconds.
    pub downtime_ns: u64,
}

/// What to do after a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Send another round.
    Round,
    /// Stop the guest.
    Stop,
    /// Give up: sending the rest takes this long.
    GiveUp(Duration),
}

/// How long `bytes` take if `sent` bytes took `took`.
fn expected(bytes: u64, sent: u64, took: Duration) -> Duration {
    let ns = u128::from(bytes).saturating_mul(took.as_nanos()) / u128::from(sent.max(1));
    Duration::from_nanos(u64::try_from(ns).unwrap_or(u64::MAX))
}

/// After round number `rounds` (from 1), which sent `sent` bytes in `took`: what to do with the `left` bytes that have
/// changed since it began, if the guest may be stopped for `most`.
pub(super) fn next(rounds: u32, sent: u64, took: Duration, left: u64, most: Duration) -> Next {
    // A round of few bytes says little about how fast many are: it counts the exchange of two messages.
    let takes = if left <= sent { took.min(expected(left, sent, took)) } else { expected(left, sent, took) };
    if takes <= most {
        Next::Stop
    } else if rounds >= ROUNDS_MAX {
        Next::GiveUp(takes)
    } else {
        Next::Round
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    // Catches: a guest that is stopped for longer than is allowed, or a migration that never ends.
    #[test]
    fn the_guest_stops_once_the_rest_is_small_enough() {
        // 100 MiB took 100 ms: 10 ms are enough for 10 MiB.
        let after = |rounds, left| next(rounds, 100 << 20, 100 * MS, left, 10 * MS);
        assert_eq!(after(1, 10 << 20), Next::Stop);
        assert_eq!(after(1, 0), Next::Stop);
        assert_eq!(after(1, 11 << 20), Next::Round);
        assert_eq!(after(ROUNDS_MAX - 1, 11 << 20), Next::Round);
        assert_eq!(after(ROUNDS_MAX, 11 << 20), Next::GiveUp(11 * MS));
        assert_eq!(after(ROUNDS_MAX, 10 << 20), Next::Stop);
    }

    // Catches: a division by nothing.
    #[test]
    fn a_round_may_be_empty() {
        assert_eq!(next(1, 0, Duration::ZERO, 0, MS), Next::Stop);
        assert_eq!(next(1, 0, MS, 4096, MS), Next::Round);
        assert_eq!(next(1, u64::MAX, Duration::MAX, u64::MAX, MS), Next::Round);
    }
}
