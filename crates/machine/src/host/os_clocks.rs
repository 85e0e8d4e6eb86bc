//! The operating system's clocks.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

use super::{
    clock::HostClock,
    reading::{Reading, nanos},
};

/// The functions that read the clocks, so that a test can pass its own.
#[derive(Clone, Copy, Debug)]
pub struct OsClocks {
    /// CLOCK_BOOTTIME in nanoseconds: it counts while the host sleeps, and cannot be set.
    pub boot_ns: fn() -> u64,
    /// CLOCK_MONOTONIC in nanoseconds: as CLOCK_BOOTTIME, but without the time in which the host slept.
    pub monotonic_ns: fn() -> u64,
    /// CLOCK_MONOTONIC_RAW in nanoseconds: as CLOCK_MONOTONIC, but nothing slews it.
    pub raw_ns: fn() -> u64,
    /// CLOCK_REALTIME in nanoseconds since the Unix epoch: it can be set, and a leap second sets it back.
    pub real_ns: fn() -> u64,
    /// TAI − UTC in seconds, as the kernel was told by an NTP or PTP daemon; 0 if it was not.
    pub tai_offset_s: fn() -> i32,
    /// By how many nanoseconds CLOCK_REALTIME may be wrong, by the NTP or PTP daemon's account; none if there is none
    /// that synchronizes it.
    pub sync_error_ns: fn() -> Option<u64>,
}

impl OsClocks {
    /// Those of the operating system.
    pub const LINUX: Self = Self {
        boot_ns: || read(ClockId::CLOCK_BOOTTIME),
        monotonic_ns: || read(ClockId::CLOCK_MONOTONIC),
        raw_ns: || read(ClockId::CLOCK_MONOTONIC_RAW),
        real_ns: || read(ClockId::CLOCK_REALTIME),
        tai_offset_s,
        sync_error_ns,
    };
}

/// The wall clock at an instant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WallReading {
    /// CLOCK_REALTIME.
    pub real: Reading,
    /// TAI − UTC at that instant; none if the kernel was not told. CLOCK_TAI is CLOCK_REALTIME plus this.
    pub tai_offset_s: Option<i32>,
}

impl WallReading {
    /// Now.
    pub fn now(host: HostClock) -> Self {
        let OsClocks { real_ns, tai_offset_s, .. } = host.os_clocks();
        let mut before = tai_offset_s();
        loop {
            let real = Reading::of(host, real_ns);
            let after = tai_offset_s();
            // A leap second changes both clock and offset. If the offset is the same, so is the clock's meaning.
            if before == after {
                return Self { real, tai_offset_s: (after != 0).then_some(after) };
            }
            before = after;
        }
    }
}

/// A clock, in nanoseconds; 0 before its zero.
fn read(clock: ClockId) -> u64 {
    // It cannot fail: Linux has had all of them since 2.6.39.
    nanos(clock_gettime(clock).map_or(Duration::ZERO, Duration::from))
}

/// What the kernel was told of its clock; none if it does not say.
fn timex() -> Option<libc::timex> {
    // SAFETY: all zeros is a value of the structure, which has integers only.
    let mut timex: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: with `modes` = 0 the call changes no clock, and fills in the live local that it is given.
    let state = unsafe { libc::adjtimex(&raw mut timex) };
    (state != -1).then_some(timex)
}

fn tai_offset_s() -> i32 {
    timex().map_or(0, |timex| timex.tai)
}

fn sync_error_ns() -> Option<u64> {
    let timex = timex().filter(|timex| timex.status & libc::STA_UNSYNC == 0)?;
    // Microseconds.
    u64::try_from(timex.maxerror).ok()?.checked_mul(1000)
}

/// The CPU time of the calling thread so far, that of guests that it ran included.
pub(crate) fn thread_cpu_time() -> Duration {
    // Linux has had this clock since 2.6.12: it cannot fail.
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map(Duration::from).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use vmtime::Khz;

    use super::*;

    #[test]
    fn the_wall_clock_is_past_2020_and_no_clock_goes_back() {
        let clocks = OsClocks::LINUX;
        assert!((clocks.real_ns)() > 1_577_836_800_000_000_000);
        for clock in [clocks.boot_ns, clocks.monotonic_ns, clocks.raw_ns] {
            let before = clock();
            assert!((before..before + 3_600_000_000_000).contains(&clock()));
        }
        assert!((0..1000).contains(&(clocks.tai_offset_s)()));
    }

    thread_local! {
        /// Calls of the clock of the test below.
        static CALLS: Cell<u32> = const { Cell::new(0) };
    }

    // Catches: a reading across a leap second, of which CLOCK_REALTIME is from before and the offset from after.
    #[test]
    fn a_leap_second_does_not_come_between_clock_and_offset() {
        /// The leap second comes before call 12 of the clock.
        fn leapt() -> bool {
            CALLS.get() >= 12
        }
        fn real_ns() -> u64 {
            CALLS.set(CALLS.get() + 1);
            if leapt() { 99_000_000_000 } else { 100_000_000_000 }
        }
        let os = OsClocks { real_ns, tai_offset_s: || if leapt() { 38 } else { 37 }, ..OsClocks::LINUX };
        let host = HostClock::new(|| 0, Khz::new(1_000_000).unwrap()).with_os_clocks(os);
        for _ in 0..3 {
            let WallReading { real, tai_offset_s } = WallReading::now(host);
            assert_eq!(real.ns + u64::try_from(tai_offset_s.unwrap()).unwrap() * 1_000_000_000, 137_000_000_000);
        }
        assert!(leapt());
    }
}
