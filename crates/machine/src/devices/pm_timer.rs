//! The ACPI power management timer: a counter of VM time that needs no set-up and has no state.
//!
//! It is there for guests that compare clocks: it is computed from neither the TSC that they read nor their kvmclock
//! page. It has no interrupt (no status and enable registers), and no ACPI table names it.

use guest_abi::ports::{PM_TIMER_BITS, PM_TIMER_HZ};
use vmtime::VmTime;

/// IN of the timer's port at `now`: the count, in the low 24 bits of 32. A narrower access reads its low bytes.
pub(super) fn read(data: &mut [u8], now: VmTime) {
    let ticks = u128::from(now.0) * u128::from(PM_TIMER_HZ) / 1_000_000_000;
    let count = ticks % (1 << PM_TIMER_BITS);
    for (byte, value) in data.iter_mut().zip(count.to_le_bytes()) {
        *byte = value;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(ns: u64) -> u32 {
        let mut data = [0xee; 4];
        read(&mut data, VmTime(ns));
        u32::from_le_bytes(data)
    }

    // Catches: another frequency or width than ACPI's, and an overflow late in VM time.
    #[test]
    fn counts_at_3_579545_mhz_in_24_bits() {
        assert_eq!([0, 279, 280, 1_000_000_000].map(count), [0, 0, 1, 3_579_545]);
        // 2^24 ticks are 4.69 s.
        assert_eq!([4_686_968_874, 4_686_968_875].map(count), [0xff_ffff, 0]);
        let wide = u128::from(u64::MAX) * 3_579_545 / 1_000_000_000;
        assert_eq!(u128::from(count(u64::MAX)), wide & 0xff_ffff);
    }

    #[test]
    fn a_narrow_access_reads_the_low_bytes() {
        let mut data = [0; 2];
        read(&mut data, VmTime(1_000_000_000));
        assert_eq!(u16::from_le_bytes(data), 0x9e99);
    }
}
