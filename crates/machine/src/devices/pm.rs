//! ACPI's power management registers: a timer, and what a machine without power management has beside it. They have no
//! state.
//!
//! The timer counts VM time and needs no set-up. It is there for guests that compare clocks: it is computed from
//! neither the TSC that they read nor their kvmclock page. It has no interrupt. ACPI tables name it and the other
//! registers, if there are any (`--acpi`).

use guest_abi::ports::{PM_TIMER_BITS, PM_TIMER_HZ, PM1_CONTROL, PM1_EVENT, SLEEP_TYPE_OFF};
use vmtime::VmTime;

/// GBL_EN, bit 5 of the enable register behind the status register (ACPI 6.5, 4.8.3.1.2). It cannot be cleared: an
/// operating system sets it and reports an error if it finds it cleared then. The event itself never comes.
const ENABLE: u16 = PM1_EVENT + 2;
const GBL_EN: u8 = 1 << 5;
/// SCI_EN: the machine is in ACPI mode (ACPI 6.5, 4.8.3.2.1 "PM1 Control Registers").
const SCI_EN: u8 = 1;

/// Whether `port` is one of the PM1 registers.
pub(super) fn owns_pm1(port: u16) -> bool {
    (PM1_EVENT..PM1_CONTROL + 2).contains(&port)
}

/// IN from the PM1 registers: no event, ACPI mode.
pub(super) fn read_pm1(port: u16, data: &mut [u8]) {
    for (port, byte) in (port..).zip(data) {
        *byte = match port {
            ENABLE => GBL_EN,
            PM1_CONTROL => SCI_EN,
            _ => 0,
        };
    }
}

/// OUT to the PM1 registers. Returns whether it is the power-off: SLP_EN, bit 13 of the control register, "causes the
/// system to sequence into the sleeping state associated with the SLP_TYPx fields", bits 12:10. All else is ignored.
pub(super) fn powers_off(port: u16, data: &[u8]) -> bool {
    // The byte that has both.
    let high = (port..).zip(data).find_map(|(port, byte)| (port == PM1_CONTROL + 1).then_some(*byte));
    high.is_some_and(|high| high & 1 << 5 != 0 && high >> 2 & 7 == SLEEP_TYPE_OFF)
}

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

    // Catches: an event that a guest would wait to be cleared, a global lock that it takes for broken, and a machine
    // that it would switch to ACPI mode.
    #[test]
    fn pm1_is_in_acpi_mode_and_silent() {
        let mut data = [0xff; 4];
        read_pm1(PM1_EVENT, &mut data);
        assert_eq!(data, [0, 0, 0x20, 0]);
        read_pm1(PM1_CONTROL, &mut data[..2]);
        assert_eq!(data[..2], [1, 0]);
        assert_eq!([0x5ff, 0x600, 0x605, 0x606].map(owns_pm1), [false, true, true, false]);
    }

    // Catches: a power-off that a guest cannot get, or gets without asking: by another sleep state, or by reading and
    // writing back.
    #[test]
    fn slp_en_with_the_type_of_s5_powers_off() {
        let off = [0x01, 5 << 2 | 1 << 5];
        assert!(powers_off(PM1_CONTROL, &off) && powers_off(PM1_CONTROL + 1, &off[1..]));
        assert!(powers_off(PM1_EVENT, &[0, 0, 0, 0, 1, off[1]]));
        for (port, data) in [
            (PM1_CONTROL, &[1, 5 << 2][..]),
            (PM1_CONTROL, &[1, 4 << 2 | 1 << 5]),
            (PM1_CONTROL, &[off[1]]),
            (PM1_EVENT, &off),
            (PM1_CONTROL + 1, &[]),
        ] {
            assert!(!powers_off(port, data), "{port:#x} {data:x?}");
        }
    }

    #[test]
    fn a_narrow_access_reads_the_low_bytes() {
        let mut data = [0; 2];
        read(&mut data, VmTime(1_000_000_000));
        assert_eq!(u16::from_le_bytes(data), 0x9e99);
    }
}
