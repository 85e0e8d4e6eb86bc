//! The clock as the kernel reads it: every reading is compared with the one before it, of any CPU.

use core::hint::cold_path;

use guest_abi::pvclock::{FLAG_GUEST_STOPPED, WallClock};

use super::{Begun, Reading, Sample, Source, finish, read, read_checked_too_early};
use crate::report::Sink;

/// Holds the last reading. Counts steps back and stops by the host in the ring's header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Clock {
    last_ns: u64,
    steps_back: u64,
    worst_step_back_ns: u64,
    stopped_seen: u64,
    /// Read with [`read_checked_too_early`].
    check_too_early: bool,
}

impl Clock {
    /// A clock that was not read yet. Const, so that the kernel's state needs no run-time construction.
    #[must_use]
    pub const fn new() -> Self {
        Self { last_ns: 0, steps_back: 0, worst_step_back_ns: 0, stopped_seen: 0, check_too_early: false }
    }

    /// With `planted`, the clock has the bug of [`read_checked_too_early`] from now on.
    pub fn plant_early_check(&mut self, planted: bool) {
        self.check_too_early = planted;
    }

    /// Reads the clock once.
    pub fn read<M: Source + Sink>(&mut self, machine: &mut M) -> Reading {
        let before = machine.published().max(self.last_ns);
        let now = if self.check_too_early { read_checked_too_early(machine) } else { read(machine) };
        self.note(machine, before, now)
    }

    /// Finishes a reading that an interrupt's entry code began. For the only CPU: another CPU could publish a reading
    /// in between. (The planted bug is not in the entry code: with it, the whole reading is made here.)
    #[inline(always)]
    pub fn finish<M: Source + Sink>(&mut self, machine: &mut M, begun: Begun) -> Reading {
        let now = if self.check_too_early {
            cold_path();
            read_checked_too_early(machine)
        } else {
            finish(machine, begun)
        };
        self.note(machine, self.last_ns, now)
    }

    /// Notes a reading that was made by [`sample`](super::sample); for the only CPU.
    pub fn sampled<M: Source + Sink>(&mut self, machine: &mut M, sample: &Sample) -> Reading {
        self.note(machine, self.last_ns, sample.reading())
    }

    /// Compares a reading with the one before it. The header is written only when a count changes, which is rare:
    /// stores cost time.
    #[inline(always)]
    fn note<M: Source + Sink>(&mut self, machine: &mut M, before: u64, now: Reading) -> Reading {
        machine.publish(now.ns);
        if now.ns < before {
            cold_path();
            self.steps_back += 1;
            self.worst_step_back_ns = self.worst_step_back_ns.max(before - now.ns);
            machine.set_clock_steps_back(self.steps_back, self.worst_step_back_ns);
        }
        self.last_ns = now.ns;
        if now.flags & FLAG_GUEST_STOPPED != 0 {
            cold_path();
            machine.clear_guest_stopped();
            self.stopped_seen += 1;
            machine.set_guest_stopped_seen(self.stopped_seen);
        }
        now
    }

    /// How often a reading was smaller than the one before it.
    #[must_use]
    pub fn steps_back(&self) -> u64 {
        self.steps_back
    }

    /// How often the host had stopped the VM.
    #[must_use]
    pub fn stopped_seen(&self) -> u64 {
        self.stopped_seen
    }
}

/// A time of day.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WallTime {
    /// Seconds since the Unix epoch.
    pub sec: u64,
    /// Nanoseconds below one second.
    pub nsec: u32,
}

/// The time of day at VM time `ns`: `wall` is that of VM time 0. Takes any bytes, without overflow.
#[must_use]
pub fn wall_time(wall: &WallClock, ns: u64) -> WallTime {
    const SECOND: u64 = 1_000_000_000;
    let nsec = u64::from(wall.nsec) + ns % SECOND;
    WallTime { sec: u64::from(wall.sec) + ns / SECOND + nsec / SECOND, nsec: u32::try_from(nsec % SECOND).unwrap_or(0) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mock::{Mock, page_at};

    #[test]
    fn steps_back_are_counted_with_the_worst() {
        let mut m = Mock::new(page_at(2, 0, 0, 1 << 31, 1));
        let mut clock = Clock::new();
        for tsc in [1_000, 900, 950, 100, 100] {
            m.tsc = tsc;
            clock.read(&mut m);
        }
        assert_eq!((m.header.clock_steps_back, m.header.worst_step_back_ns), (2, 850));
        assert_eq!(clock.steps_back(), 2);
    }

    #[test]
    fn a_reading_below_another_cpus_is_a_step_back() {
        let mut m = Mock::new(page_at(2, 0, 0, 1 << 31, 1));
        let mut clock = Clock::new();
        for (tsc, published) in [(1_000, 0), (1_100, 1_100), (1_200, 1_230), (1_210, 1_200)] {
            (m.tsc, m.published) = (tsc, Some(published));
            clock.read(&mut m);
        }
        assert_eq!((m.header.clock_steps_back, m.header.worst_step_back_ns), (1, 30));
        assert_eq!(m.published, Some(1_210));
    }

    #[test]
    fn guest_stopped_is_cleared_and_counted() {
        let mut m = Mock::new(page_at(2, 0, 0, 1 << 31, 1));
        m.page.flags = 3;
        let mut clock = Clock::new();
        clock.read(&mut m);
        clock.read(&mut m);
        assert_eq!((m.page.flags, m.header.guest_stopped_seen, clock.stopped_seen()), (1, 1, 1));
    }

    #[test]
    fn wall_time_carries() {
        let wall = WallClock { version: 2, sec: 10, nsec: 999_999_999 };
        assert_eq!(wall_time(&wall, 2_000_000_001), WallTime { sec: 13, nsec: 0 });
        let _ = wall_time(&WallClock { version: 2, sec: u32::MAX, nsec: u32::MAX }, u64::MAX);
    }
}
