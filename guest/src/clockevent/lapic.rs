//! The native clockevents. They arm a distance from now, in ticks of the frequency that was read at boot.

use core::hint::cold_path;

use super::kvm::armable;
use super::{ClockEvent, LVT_ONESHOT, LVT_TSC_DEADLINE, LVT_VECTOR, Port};
use crate::pvclock::{BadPage, Reading, Source, low64};

/// `lapic-deadline`: TSC now + distance × the frequency at boot, as Linux does. After a migration to another
/// frequency every wait is wrong by the ratio: the failure that the thread is about.
#[derive(Clone, Copy, Debug)]
pub struct LapicDeadline {
    /// TSC ticks per nanosecond, as a 32-bit fraction.
    mult: u64,
}

impl LapicDeadline {
    /// With the TSC frequency at boot.
    #[must_use]
    pub fn new(tsc_khz: u64) -> Self {
        Self { mult: per_ns(tsc_khz) }
    }
}

/// Ticks per nanosecond of a clock of `khz`, as a 32-bit fraction: `khz * 2^32 / 10^6`, saturating.
///
/// In two 64-bit steps, because `khz << 32` leaves 64 bits from 4.3 GHz on and a 128-bit division is slow.
fn per_ns(khz: u64) -> u64 {
    let (whole, rest) = (khz / 1_000_000, khz % 1_000_000);
    whole.checked_shl(32).filter(|_| whole >> 32 == 0).unwrap_or(u64::MAX).saturating_add((rest << 32) / 1_000_000)
}

impl ClockEvent for LapicDeadline {
    fn set_oneshot<M: Port>(&mut self, machine: &mut M) {
        machine.write_timer_lvt(LVT_VECTOR | LVT_TSC_DEADLINE);
    }

    #[inline(always)]
    fn set_next_event<M: Port + Source>(&mut self, m: &mut M, expires_ns: u64, now: &Reading) -> Result<u64, BadPage> {
        let delta = expires_ns.saturating_sub(now.ns);
        let ticks = low64((u128::from(delta) * u128::from(self.mult)) >> 32);
        // The TSC is read here and not taken from `now`: Linux reads it in the device, after the distance was taken.
        let deadline = armable(m.rdtsc().wrapping_add(ticks));
        m.write_tsc_deadline(deadline);
        Ok(deadline)
    }
}

/// `lapic-oneshot`: the countdown timer, for CPUs without TSC-deadline.
///
/// Its count has 32 bits. The smallest divider that fits is used, so that short waits are exact to a bus cycle. A wait
/// too long for a divider of 128 is cut short: the tick layer sees an early wake and arms again.
#[derive(Clone, Copy, Debug)]
pub struct LapicOneshot {
    /// Bus cycles per nanosecond, as a 32-bit fraction.
    mult: u64,
    /// log2 of the divider that the register holds; writing it costs an exit, so only changes are written.
    divider: Option<u32>,
}

/// log2 of the largest divider.
const MAX_DIVIDER: u32 = 7;

impl LapicOneshot {
    /// A placeholder that is never armed.
    pub const IDLE: Self = Self { mult: 0, divider: None };

    /// With the frequency of the timer's clock before its divider.
    #[must_use]
    pub fn new(bus_khz: u64) -> Self {
        Self { mult: per_ns(bus_khz), divider: None }
    }
}

/// The divide configuration register's encoding of 2^`log2` (bits 3, 1 and 0; 1011b is 1).
fn divide_register(log2: u32) -> u32 {
    let code = log2.wrapping_sub(1) & 7;
    (code & 3) | (code & 4) << 1
}

impl ClockEvent for LapicOneshot {
    fn set_oneshot<M: Port>(&mut self, machine: &mut M) {
        machine.write_timer_lvt(LVT_VECTOR | LVT_ONESHOT);
    }

    #[inline(always)]
    fn set_next_event<M: Port + Source>(&mut self, m: &mut M, expires_ns: u64, now: &Reading) -> Result<u64, BadPage> {
        let delta = expires_ns.saturating_sub(now.ns);
        // Rounded up to whole cycles, and at least one: a count of 0 would stop the timer.
        let cycles = (u128::from(delta) * u128::from(self.mult) + u128::from(u32::MAX)) >> 32;
        let cycles = u64::try_from(cycles).unwrap_or(u64::MAX).max(1);
        let mut divider = 0;
        while divider < MAX_DIVIDER && div_ceil_pow2(cycles, divider) > u64::from(u32::MAX) {
            cold_path();
            divider += 1;
        }
        let count = u32::try_from(div_ceil_pow2(cycles, divider)).unwrap_or(u32::MAX);
        if self.divider != Some(divider) {
            cold_path();
            self.divider = Some(divider);
            m.write_divide(divide_register(divider));
        }
        m.write_initial_count(count);
        Ok(u64::from(count))
    }
}

/// Rounds up when dividing by 2^n.
fn div_ceil_pow2(value: u64, n: u32) -> u64 {
    let floor = value >> n;
    floor + u64::from(floor << n != value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mock::Mock;

    fn at(ns: u64) -> Reading {
        Reading { ns, ..Reading::default() }
    }

    #[test]
    fn per_ns_is_the_fraction() {
        assert_eq!(per_ns(1_000_000), 1 << 32);
        assert_eq!(per_ns(2_600_000), (2_600_000u64 << 32) / 1_000_000);
        assert_eq!(per_ns(4_999_999), low64((4_999_999u128 << 32) / 1_000_000));
        assert_eq!(per_ns(u64::MAX), u64::MAX);
    }

    #[test]
    fn deadline_counts_from_its_own_tsc_read() {
        let mut m = Mock { tsc: 10_000, ..Mock::default() };
        let mut d = LapicDeadline::new(2_000_000);
        assert_eq!(d.set_next_event(&mut m, 1_500, &at(1_000)), Ok(11_000));
        // Past: at once.
        assert_eq!(d.set_next_event(&mut m, 1, &at(1_000)), Ok(10_000));
        assert_eq!(m.tsc_reads, 2);
    }

    #[test]
    fn divide_register_is_the_manuals_table() {
        let table: std::vec::Vec<u32> = (0..=MAX_DIVIDER).map(divide_register).collect();
        assert_eq!(table, [0b1011, 0b0000, 0b0001, 0b0010, 0b0011, 0b1000, 0b1001, 0b1010]);
    }

    #[test]
    fn oneshot_uses_the_smallest_divider_and_rounds_up() {
        let mut m = Mock::default();
        let mut d = LapicOneshot::new(1_000_000);
        for (ns, count, register, writes) in [
            (0, 1, 0b1011, 1),
            (5, 5, 0b1011, 1),
            (u64::from(u32::MAX), u32::MAX, 0b1011, 1),
            (1 << 32, 1 << 31, 0b0000, 2),
            (5_000_000_001, 2_500_000_001, 0b0000, 2),
            (400_000_000_000, 3_125_000_000, 0b1010, 3),
            (u64::MAX, u32::MAX, 0b1010, 3),
            (7, 7, 0b1011, 4),
        ] {
            assert_eq!(d.set_next_event(&mut m, ns, &at(0)), Ok(u64::from(count)));
            assert_eq!((m.initial_count, m.divide, m.divide_writes), (count, register, writes));
        }
    }

    #[test]
    fn oneshot_in_the_past_still_counts_one() {
        let mut m = Mock::default();
        assert_eq!(LapicOneshot::new(1_000_000).set_next_event(&mut m, 3, &at(9)), Ok(1));
    }
}
