//! Compares each line of the demonstration's table with what is expected of its clockevent.

use machine::{TimeMode, audit::Summary};
use serde::Serialize;

use super::{BASE_KHZ, HZ};

/// The verdict on one line of the table.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "verdict", rename_all = "kebab-case")]
pub enum Verdict {
    /// Every tick came in time.
    Good,
    /// Wrong, as is expected of this clockevent: intervals are too long or too short by this factor.
    WrongAsExpected {
        /// Length of an interval ÷ the length that was asked for.
        interval_ratio: f64,
    },
    /// Not as expected.
    Unexpected {
        /// What is not as expected.
        reason: String,
    },
}

impl Verdict {
    /// Whether the line is as expected.
    pub fn as_expected(&self) -> bool {
        !matches!(self, Self::Unexpected { .. })
    }
}

/// The interval ratio that is expected: the native clockevent computes with the frequency that it saw at boot.
fn expected_ratio(clockevent: &str, khz: u32) -> f64 {
    if clockevent == "lapic-deadline" { f64::from(BASE_KHZ) / f64::from(khz) } else { 1.0 }
}

/// How far a measured interval ratio may be off. Virtual time has no noise: what remains is the few operations (a
/// microsecond each) between deadline and handler, in intervals of 10 ms. In real time the host's scheduler adds up to
/// milliseconds; a factor of two still shows.
fn tolerance(time: TimeMode) -> f64 {
    match time {
        TimeMode::Virtual => 0.002,
        TimeMode::Real => 0.3,
    }
}

/// Compares one line of the table with what is expected: `lost` ticks in all, and the counts `after` the migration to
/// `khz`.
pub(super) fn check(clockevent: &str, khz: u32, time: TimeMode, lost: u64, after: &Summary) -> Verdict {
    let unexpected = |reason: String| Verdict::Unexpected { reason };
    if lost != 0 {
        return unexpected(format!("{lost} ticks lost"));
    }
    if after.clock_steps_back != 0 {
        return unexpected(format!("the clock stepped back {} times", after.clock_steps_back));
    }
    if after.guest_stopped_seen == 0 {
        return unexpected("the guest was not told that it had been stopped".to_owned());
    }
    let Some(ratio) = after.interval_ratio else { return unexpected("no tick after the migration".to_owned()) };
    let expected = expected_ratio(clockevent, khz);
    if (ratio - expected).abs() > expected * tolerance(time) {
        return unexpected(format!("intervals last {ratio:.3} of what was asked, not {expected:.3}"));
    }
    // The guest does not notice a deadline that is too early by less than its handler's latency; the host does. With
    // intervals that are too short this is expected, otherwise it is wrong.
    if expected >= 1.0 && after.early_by_host != 0 {
        return unexpected(format!("{} ticks fired before their time by the host's clock", after.early_by_host));
    }
    let half_period_ns = 500_000_000 / u64::from(HZ);
    if (expected - 1.0).abs() > f64::EPSILON {
        return Verdict::WrongAsExpected { interval_ratio: ratio };
    }
    let worst = [after.late_by_guest, after.late_by_host].into_iter().flatten().map(|late| late.worst_ns).max();
    if time == TimeMode::Virtual && worst.is_some_and(|worst| worst > half_period_ns) {
        return unexpected("a tick was more than half a period late".to_owned());
    }
    Verdict::Good
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(interval_ratio: f64) -> Summary {
        Summary { guest_stopped_seen: 1, interval_ratio: Some(interval_ratio), ..Summary::default() }
    }

    #[test]
    fn the_native_clockevent_must_fail_and_the_others_must_not() {
        let virt = TimeMode::Virtual;
        assert_eq!(check("kvm-ns-deadline", BASE_KHZ / 2, virt, 0, &after(1.0)), Verdict::Good);
        assert!(!check("kvm-ns-deadline", BASE_KHZ / 2, virt, 0, &after(2.0)).as_expected());
        assert!(matches!(check("lapic-deadline", BASE_KHZ / 2, virt, 0, &after(2.0)), Verdict::WrongAsExpected { .. }));
        // If the native clockevent is right after the migration, the frequency did not change.
        assert!(!check("lapic-deadline", BASE_KHZ / 2, virt, 0, &after(1.0)).as_expected());
    }

    #[test]
    fn lost_ticks_and_clock_steps_are_never_expected() {
        let virt = TimeMode::Virtual;
        assert!(!check("lapic-deadline", BASE_KHZ / 2, virt, 1, &after(2.0)).as_expected());
        let stepped = Summary { clock_steps_back: 1, ..after(1.0) };
        assert!(!check("kvm-ns-deadline", BASE_KHZ, virt, 0, &stepped).as_expected());
        let early = Summary { early_by_host: 1, ..after(1.0) };
        assert!(!check("kvm-ns-deadline", BASE_KHZ, virt, 0, &early).as_expected());
    }
}
