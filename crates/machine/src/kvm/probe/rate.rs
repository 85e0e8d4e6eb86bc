//! Measures the frequency of a guest's TSC after KVM was asked for another one, and decides whether KVM scales it.

use std::{thread, time::Duration};

use super::{Probe, TSC_LOOP, USER_SPACE, with_apic_features};
use crate::{
    kvm::{Error, Host},
    x86::Leaf,
};

/// Entries before the first reading. During the first ones KVM builds the guest's page tables. One of them took 200
/// times as long as a later one, and the guest read its TSC at the end of it.
const WARM_UP: usize = 16;
/// How many readings are taken, of which the one with the shortest bracket is used.
const READINGS: usize = 16;
/// The shortest time between the two that are compared.
const SHORTEST: Duration = Duration::from_millis(4);
/// How many times the time between the two is as long as a reading's bracket, so that the rate is correct to 0.5 %.
const BRACKETS: u64 = 200;
/// The longest time between the two, for hosts that are too busy for that.
const LONGEST: Duration = Duration::from_millis(200);

/// A reading of a guest's TSC, bracketed by two of the host's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::kvm) struct Reading {
    /// The host's TSC before the entry.
    pub before: u64,
    /// The value that the guest's RDTSC returned.
    pub guest: u64,
    /// The host's TSC after the exit.
    pub after: u64,
}

impl Reading {
    fn bracket(&self) -> u64 {
        self.after.saturating_sub(self.before)
    }
}

/// The frequency of a guest's TSC after KVM was asked for another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TscRate {
    /// KVM_SET_TSC_KHZ succeeded.
    pub accepted: bool,
    /// The host has KVM_CAP_TSC_CONTROL.
    pub control: bool,
    /// The frequency that the guest's TSC had, in kHz.
    pub measured_khz: u64,
}

/// Whether KVM scales a guest's TSC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// KVM scales the guest's TSC.
    Scales,
    /// The guest's TSC has the frequency only on average. KVM does not scale it, but sets it forward at each entry;
    /// between two entries it runs at the host's frequency.
    CatchesUp,
    /// The guest's TSC does not have the frequency.
    No,
}

impl TscRate {
    /// Compares the measured frequency with the requested one, to 1 %.
    #[must_use]
    pub fn verdict(self, asked_khz: u32) -> Verdict {
        let asked = u64::from(asked_khz);
        let has_it = self.accepted && self.measured_khz.abs_diff(asked) <= asked / 100;
        match (has_it, self.control) {
            (true, true) => Verdict::Scales,
            (true, false) => Verdict::CatchesUp,
            (false, _) => Verdict::No,
        }
    }
}

/// The reading with the shortest bracket, in which the two counters belong together best.
pub(in crate::kvm) fn tightest(readings: &[Reading]) -> Option<Reading> {
    readings.iter().copied().min_by_key(Reading::bracket)
}

/// The guest TSC's frequency between two readings, in kHz. The guest's value is paired with the host's after the exit,
/// because less time passes between the guest's RDTSC and the exit than between the entry and the RDTSC.
fn rate_khz(first: Reading, second: Reading, host_khz: u32) -> u64 {
    let host = u128::from(second.after.saturating_sub(first.after)).max(1);
    let guest = u128::from(second.guest.saturating_sub(first.guest));
    u64::try_from(guest * u128::from(host_khz) / host).unwrap_or(u64::MAX)
}

/// How long to wait between the two readings, if the first has this `bracket`.
fn interval(bracket: u64, host_khz: u32) -> Duration {
    let needed_us = u128::from(bracket) * u128::from(BRACKETS) * 1000 / u128::from(host_khz.max(1));
    Duration::from_micros(u64::try_from(needed_us).unwrap_or(u64::MAX)).clamp(SHORTEST, LONGEST)
}

fn read(probe: &mut Probe) -> Result<Option<Reading>, Error> {
    let mut readings = Vec::new();
    for _ in 0..READINGS {
        readings.extend(probe.read_guest_tsc()?);
    }
    Ok(tightest(&readings))
}

/// Asks KVM for a TSC of `khz` and measures the guest's frequency, over some milliseconds.
///
/// # Errors
/// If KVM fails in a way that says nothing about the frequency.
pub fn tsc_rate(host: &Host, supported: &[Leaf], host_khz: u32, khz: u32) -> Result<TscRate, Error> {
    let mut probe = Probe::new(host, &with_apic_features(supported), &TSC_LOOP, USER_SPACE)?;
    let accepted = probe.vcpu.set_tsc_khz(khz).is_ok();
    for _ in 0..WARM_UP {
        probe.next()?;
    }
    let first = read(&mut probe)?;
    thread::sleep(interval(first.map_or(0, |first| first.bracket()), host_khz));
    let second = read(&mut probe)?;
    let measured_khz = first.zip(second).map_or(0, |(first, second)| rate_khz(first, second, host_khz));
    Ok(TscRate { accepted, control: host.has_tsc_control(), measured_khz })
}

/// Whether KVM scales a guest's TSC to `khz`.
///
/// # Errors
/// As [`tsc_rate`].
pub fn tsc_scales(host: &Host, supported: &[Leaf], host_khz: u32, khz: u32) -> Result<bool, Error> {
    // Without the capability KVM never scales, so nothing is measured.
    Ok(host.has_tsc_control() && tsc_rate(host, supported, host_khz, khz)?.verdict(khz) == Verdict::Scales)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST_KHZ: u32 = 1_000_000;

    /// A guest's reading at host TSC `at`, on a host whose guests' TSC has `ratio` times its frequency; the entry cost
    /// `entry` before it and the exit `exit` after it.
    fn reading(at: u64, ratio: u64, entry: u64, exit: u64) -> Reading {
        Reading { before: at - entry, guest: at * ratio, after: at + exit }
    }

    // A first entry, in which page tables are built, takes a fifth of the 4 ms that are measured.
    #[test]
    fn slow_first_entries_do_not_count_as_guest_time() {
        let slow = reading(1_800_000, 2, 800_000, 2_000);
        let first =
            tightest(&[slow, reading(2_000_000, 2, 3_000, 2_000), reading(2_100_000, 2, 90_000, 2_000)]).unwrap();
        let second = tightest(&[reading(6_000_000, 2, 400_000, 2_000), reading(6_500_000, 2, 3_000, 2_000)]).unwrap();
        assert_eq!((first.guest, second.guest), (4_000_000, 13_000_000));
        assert_eq!(rate_khz(first, second, HOST_KHZ), 2_000_000);
        // Paired with the host's TSC after the exit, a slow entry does no harm either.
        assert_eq!(rate_khz(slow, second, HOST_KHZ), 2_000_000);
        assert_eq!(tightest(&[]), None);
    }

    #[test]
    fn the_interval_makes_the_rate_true_to_half_a_percent() {
        for bracket in [0, 1_000, 20_000, 100_000, 500_000] {
            let ticks = interval(bracket, HOST_KHZ).as_nanos();
            assert!(ticks >= u128::from(bracket) * 200 || interval(bracket, HOST_KHZ) == LONGEST, "{bracket}");
            assert!((4_000_000..=200_000_000).contains(&ticks), "{bracket}");
        }
        assert_eq!(interval(u64::MAX, 0), LONGEST);
    }

    #[test]
    fn a_tsc_that_catches_up_at_entries_is_not_scaled() {
        let rate = |accepted, control, measured_khz| TscRate { accepted, control, measured_khz }.verdict(2_000_000);
        assert_eq!(rate(true, true, 2_000_000), Verdict::Scales);
        assert_eq!(rate(true, true, 1_980_000), Verdict::Scales);
        assert_eq!(rate(true, false, 2_000_000), Verdict::CatchesUp);
        // Accepted and without effect, with and without the capability; a host's TSC that happens to fit a refusal.
        assert_eq!(rate(true, true, 1_000_000), Verdict::No);
        assert_eq!(rate(true, false, 1_979_999), Verdict::No);
        assert_eq!(rate(false, true, 2_000_000), Verdict::No);
    }

    #[test]
    fn impossible_readings_do_not_overflow() {
        let backwards = Reading { before: 10, guest: 50, after: 5 };
        assert_eq!(backwards.bracket(), 0);
        assert_eq!(rate_khz(reading(9_000, 1, 1, 1), reading(8_000, 1, 1, 1), HOST_KHZ), 0);
        let leap = Reading { before: 0, guest: u64::MAX, after: 1 };
        assert_eq!(rate_khz(Reading { before: 0, guest: 0, after: 1 }, leap, u32::MAX), u64::MAX);
    }
}
