//! The real-time clock: the registers of a PC's MC146818 at ports 0x70 and 0x71. It shows the VM's wall clock, in UTC.
//!
//! It keeps no time of its own: the wall clock is an argument. So it goes on while the VM is stopped, setting it has
//! no effect, and there is little to save. It has no interrupt, no alarm and no battery-backed RAM: their registers
//! read 0.
//!
//! Sources: the MC146818's datasheet; the century's register is the one that ACPI's FADT names.

use chrono::{DateTime, Datelike, Timelike};
use guest_abi::ports::{RTC_CENTURY, RTC_DATA, RTC_INDEX};
use serde::{Deserialize, Serialize};

/// Bit 7 of the index port disables the NMI on a PC.
const INDEX: u8 = 0x7f;
const CONTROL_A: u8 = 0x0a;
const CONTROL_B: u8 = 0x0b;
const VALID: u8 = 0x0d;
/// Register A: an update is in progress (UIP). It cannot be written.
const UPDATING: u8 = 1 << 7;
/// Register A: the oscillator runs at 32,768 Hz, and the periodic interrupt is at 1,024 Hz, as a PC's firmware has it.
const RUNNING: u8 = 0x26;
/// Register B: the time is being set (SET), so that it is not updated.
const SET: u8 = 1 << 7;
/// Register B: values are binary (DM), not BCD; hours count to 24.
const BINARY: u8 = 1 << 2;
const HOURS_24: u8 = 1 << 1;
/// The afternoon, in the hours of the 12-hour mode.
const AFTERNOON: u8 = 1 << 7;
/// Register D: time and RAM are valid (VRT).
const VRT: u8 = 1 << 7;
/// UIP is set for so long before each second: "if the UIP bit is a 0, the update cycle is not in progress and will not
/// be for at least 244 µs".
const UPDATE_NS: u64 = 244_000;
const SECOND_NS: u64 = 1_000_000_000;

/// The clock; in a snapshot it is as it is while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RtcState {
    /// The register that the data port accesses.
    pub index: u8,
    /// Register A without UIP.
    pub control_a: u8,
    /// Register B.
    pub control_b: u8,
}

impl Default for RtcState {
    fn default() -> Self {
        Self { index: 0, control_a: RUNNING, control_b: HOURS_24 }
    }
}

/// The clock.
#[derive(Clone, Debug, Default)]
pub struct Rtc(RtcState);

impl Rtc {
    pub(super) fn owns(port: u16) -> bool {
        (RTC_INDEX..=RTC_DATA).contains(&port)
    }

    /// IN of one byte when the wall clock is `wall_ns` nanoseconds after the Unix epoch. The index cannot be read.
    pub(super) fn read(&self, port: u16, wall_ns: u64) -> u8 {
        if port == RTC_DATA { self.register(wall_ns) } else { 0xff }
    }

    /// OUT of one byte.
    pub(super) fn write(&mut self, port: u16, value: u8) {
        match (port, self.0.index) {
            (RTC_INDEX, _) => self.0.index = value & INDEX,
            (_, CONTROL_A) => self.0.control_a = value & !UPDATING,
            (_, CONTROL_B) => self.0.control_b = value,
            _ => {}
        }
    }

    fn register(&self, wall_ns: u64) -> u8 {
        let RtcState { index, control_a, control_b } = self.0;
        match index {
            CONTROL_A if control_b & SET == 0 && wall_ns % SECOND_NS >= SECOND_NS - UPDATE_NS => control_a | UPDATING,
            CONTROL_A => control_a,
            CONTROL_B => control_b,
            VALID => VRT,
            _ => self.time(wall_ns),
        }
    }

    /// A register of the time; 0 for any other.
    fn time(&self, wall_ns: u64) -> u8 {
        // The nanoseconds that fit reach to the year 2554.
        let Some(time) = i64::try_from(wall_ns / SECOND_NS).ok().and_then(|s| DateTime::from_timestamp(s, 0)) else {
            return 0;
        };
        let year = time.year().unsigned_abs();
        let value = match self.0.index {
            0 => time.second(),
            2 => time.minute(),
            4 => return self.hour(time.hour()),
            // Sunday is 1.
            6 => time.weekday().number_from_sunday(),
            7 => time.day(),
            8 => time.month(),
            9 => year % 100,
            RTC_CENTURY => year / 100,
            _ => 0,
        };
        self.encoded(value)
    }

    fn hour(&self, hour: u32) -> u8 {
        if self.0.control_b & HOURS_24 != 0 {
            return self.encoded(hour);
        }
        // Noon and midnight are 12.
        let value = self.encoded((hour + 11) % 12 + 1);
        if hour < 12 { value } else { value | AFTERNOON }
    }

    /// A value below 100, as register B asks for it.
    fn encoded(&self, value: u32) -> u8 {
        let value = if self.0.control_b & BINARY != 0 { value } else { value / 10 * 16 + value % 10 };
        u8::try_from(value).unwrap_or(0)
    }

    pub(super) fn state(&self) -> RtcState {
        self.0
    }

    /// `None` if it cannot have that state.
    pub(super) fn from_state(state: &RtcState) -> Option<Self> {
        (state.index & !INDEX == 0 && state.control_a & UPDATING == 0).then_some(Self(*state))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(rtc: &mut Rtc, index: u8, wall_ns: u64) -> u8 {
        rtc.write(RTC_INDEX, index);
        rtc.read(RTC_DATA, wall_ns)
    }

    fn in_mode(mode: u8) -> Rtc {
        let mut rtc = Rtc::default();
        rtc.write(RTC_INDEX, CONTROL_B);
        rtc.write(RTC_DATA, mode);
        rtc
    }

    /// Century, year, month, day, hour, minute, second, and the weekday last.
    fn time(rtc: &mut Rtc, wall_ns: u64) -> [u8; 8] {
        [RTC_CENTURY, 9, 8, 7, 4, 2, 0, 6].map(|index| read(rtc, index, wall_ns))
    }

    // Catches: a guest whose date is not the VM's; BCD where it asked for binary, and the reverse; noon as 0.
    #[test]
    fn shows_the_wall_clock_in_the_four_formats() {
        // Thursday, 29 February 2024, 13:45:59; and Saturday, 1 January 2000, 00:00:00.
        let [leap_day, millennium] = [1_709_214_359, 946_684_800].map(|s| s * SECOND_NS + 5);
        let bcd = &mut Rtc::default();
        assert_eq!(time(bcd, leap_day), [0x20, 0x24, 0x02, 0x29, 0x13, 0x45, 0x59, 5]);
        assert_eq!(time(bcd, millennium), [0x20, 0, 1, 1, 0, 0, 0, 7]);
        assert_eq!(time(&mut in_mode(BINARY | HOURS_24), leap_day), [20, 24, 2, 29, 13, 45, 59, 5]);
        assert_eq!(time(&mut in_mode(0), leap_day)[4], 0x81);
        let hours = [0, 1, 11, 12, 13, 23].map(|h| read(&mut in_mode(BINARY), 4, millennium + h * 3600 * SECOND_NS));
        assert_eq!(hours, [12, 1, 11, 0x8c, 0x81, 0x8b]);
    }

    proptest! {
        // Catches: a leap year, a month's length or a weekday that is wrong, at any time that the clock can have.
        #[test]
        fn agrees_with_a_calendar_that_counts_days(wall_ns: u64) {
            let (days, second) = (wall_ns / SECOND_NS / 86_400, wall_ns / SECOND_NS % 86_400);
            let leap =
                |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
            let (mut year, mut month, mut left) = (1970, 1, days);
            loop {
                let length = match month {
                    2 if leap(year) => 29,
                    2 => 28,
                    4 | 6 | 9 | 11 => 30,
                    _ => 31,
                };
                if left < length {
                    break;
                }
                left -= length;
                (year, month) = if month == 12 { (year + 1, 1) } else { (year, month + 1) };
            }
            // 1 January 1970 was a Thursday.
            let weekday = (days + 4) % 7 + 1;
            let expected = [year / 100, year % 100, month, left + 1, second / 3600, second / 60 % 60, second % 60, weekday];
            prop_assert_eq!(time(&mut in_mode(BINARY | HOURS_24), wall_ns).map(u64::from), expected);
            let bcd = expected.map(|value| value / 10 * 16 + value % 10);
            prop_assert_eq!(time(&mut Rtc::default(), wall_ns).map(u64::from), bcd);
        }
    }

    // Catches: a guest that waits for ever for an update to begin or to end, or reads while the second changes.
    #[test]
    fn an_update_is_in_progress_for_244_us_before_each_second() {
        let status = |ns| read(&mut Rtc::default(), CONTROL_A, 7 * SECOND_NS + ns);
        assert_eq!([0, 999_755_999, 999_756_000, 999_999_999].map(status), [0x26, 0x26, 0xa6, 0xa6]);
        assert_eq!(read(&mut in_mode(SET | HOURS_24), CONTROL_A, 999_999_999), 0x26);
    }

    // Catches: a clock that a guest takes for broken, a flag that it would wait to be cleared, and a setting that it
    // does not find again.
    #[test]
    fn is_valid_has_no_events_and_keeps_what_controls_it() {
        let mut rtc = Rtc::default();
        let read_all = |rtc: &mut Rtc| [0x0b, 0x0c, 0x0d, 0x8d, 0x0f, 1, 3, 5].map(|index| read(rtc, index, 0));
        assert_eq!(read_all(&mut rtc), [2, 0, 0x80, 0x80, 0, 0, 0, 0]);
        for (index, value) in [(CONTROL_A, 0xff), (0x0f, 0x0a), (0, 0x33), (CONTROL_B, SET | BINARY)] {
            rtc.write(RTC_INDEX, index);
            rtc.write(RTC_DATA, value);
        }
        assert_eq!(read(&mut rtc, CONTROL_A, 0), 0x7f);
        assert_eq!(read_all(&mut rtc), [0x84, 0, 0x80, 0x80, 0, 0, 0, 0]);
        assert_eq!(read(&mut rtc, 0, 9 * SECOND_NS), 9);
        assert_eq!(rtc.read(RTC_INDEX, 0), 0xff);
    }

    // Catches: a register that a restore loses, and a state that no guest could have made.
    #[test]
    fn its_state_is_kept_and_checked() {
        let state = RtcState { index: 0x0a, control_a: 0x7f, control_b: 0xff };
        assert_eq!(Rtc::from_state(&state).unwrap().state(), state);
        assert!(Rtc::from_state(&RtcState { index: 0x80, ..state }).is_none());
        assert!(Rtc::from_state(&RtcState { control_a: 0x80, ..state }).is_none());
    }
}
