//! VMClock: real time by the TSC, as the host tells it, compared with kvmclock.
//!
//! Both are computed from the TSC, so that an interval is as long by one as by the other, unless the host disrupted the
//! TSC. Then it changes VMClock's marker, and the guest knows that nothing can be concluded from the interval. An
//! interval that differs although the marker is the same shows that the host left one of the two as it was.

use guest_abi::vmclock::{Instant, VmClock};

/// The page, which the host may be writing.
pub trait Page {
    /// The sequence count. Reads after the call may not move before it, nor those before it behind it.
    fn seq_count(&mut self) -> u32;
    /// The structure, with any count; it may be torn.
    fn read(&mut self) -> VmClock;
    /// Executes PAUSE, while the page is being written.
    fn pause(&mut self);
}

/// Reads the page, and then calls `with`, until the page was the same before and after both.
pub fn read<P: Page, T>(page: &mut P, mut with: impl FnMut() -> T) -> (VmClock, T) {
    loop {
        let count = page.seq_count();
        let read = (page.read(), with());
        if count & 1 == 0 && page.seq_count() == count {
            return read;
        }
        page.pause();
    }
}

/// By how much the two may differ, in nanoseconds: a part for KVM's kvmclock, which it bases anew now and then, …
const AGREE_NS: u64 = 1_000;
/// … and 2^-19 of the interval for frequencies in whole kHz. At 1 GHz a kHz is 1 ppm.
const AGREE_SHIFT: u32 = 19;

/// One tick by both clocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tick {
    marker: u64,
    generation: u64,
    real: Instant,
    vm_ns: u64,
}

/// What was found, from tick to tick.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Found {
    last: Option<Tick>,
    /// Intervals between two ticks in which the marker stayed.
    pub compared: u64,
    /// Those of them that were longer or shorter by VMClock than by kvmclock.
    pub wrong: u64,
    /// By how much the worst interval was longer by VMClock.
    pub worst_ns: i64,
    /// How often another marker was found.
    pub disruptions: u64,
    /// How often another generation was found.
    pub generations: u64,
}

impl Found {
    /// A tick at `vm_ns` of kvmclock, when the TSC was `tsc` and the page `page`.
    pub fn tick(&mut self, page: &VmClock, tsc: u64, vm_ns: u64) {
        let real = page.utc_at(tsc);
        let now = Tick { marker: page.disruption_marker, generation: page.vm_generation_counter, real, vm_ns };
        let Some(last) = self.last.replace(now) else { return };
        self.generations += u64::from(now.generation != last.generation);
        if now.marker != last.marker {
            self.disruptions += 1;
            return;
        }
        self.compared += 1;
        let interval_ns = vm_ns.wrapping_sub(last.vm_ns);
        let longer_ns = real.ns().wrapping_sub(last.real.ns()).wrapping_sub(interval_ns).cast_signed();
        if longer_ns.unsigned_abs() > self.worst_ns.unsigned_abs() {
            self.worst_ns = longer_ns;
        }
        self.wrong += u64::from(longer_ns.unsigned_abs() > AGREE_NS + (interval_ns >> AGREE_SHIFT));
    }

    /// UTC at the last tick.
    #[must_use]
    pub fn real(&self) -> Instant {
        self.last.map_or(Instant::default(), |last| last.real)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    /// Counts in the order in which they are read; the structure has the count that was read last.
    struct Script(VecDeque<u32>, u32, u32);

    impl Page for Script {
        fn seq_count(&mut self) -> u32 {
            self.1 = self.0.pop_front().unwrap();
            self.1
        }

        fn read(&mut self) -> VmClock {
            VmClock { seq_count: self.1, ..VmClock::default() }
        }

        fn pause(&mut self) {
            self.2 += 1;
        }
    }

    // Catches: a page that was read while the host wrote it, and a TSC of another page than the one that is applied.
    #[test]
    fn page_and_reading_are_of_one_even_count() {
        for (counts, of, pauses) in [(&[2, 2][..], 2, 0), (&[3, 4, 4, 4], 4, 1), (&[2, 4, 6, 6], 6, 1)] {
            let (mut page, mut calls) = (Script(counts.iter().copied().collect(), 0, 0), 0);
            let (read, last) = read(&mut page, || {
                calls += 1;
                calls
            });
            assert_eq!((read.seq_count, page.2, last), (of, pauses, pauses + 1), "{counts:?}");
        }
    }

    fn page(khz: u32, tsc: u64, real: Instant, marker: u64) -> VmClock {
        let (counter_period_frac_sec, counter_period_shift) = VmClock::period(khz);
        VmClock {
            disruption_marker: marker,
            counter_value: tsc,
            time_sec: real.sec,
            time_frac_sec: real.frac,
            counter_period_frac_sec,
            counter_period_shift,
            ..VmClock::default()
        }
    }

    const MS: u64 = 1_000_000;

    // Catches: a disruption that is told, taken for an error; and a page left as it was, with the old frequency, taken
    // for right.
    #[test]
    fn an_interval_is_wrong_only_if_the_marker_says_nothing() {
        let start = page(2_000_000, 0, Instant { sec: 1_000, frac: 0 }, 7);
        let mut found = Found::default();
        found.tick(&start, 0, 0);
        found.tick(&start, 20 * MS, 10 * MS);
        assert_eq!((found.compared, found.wrong, found.worst_ns, found.disruptions), (1, 0, 0, 0));
        // Saved for a second, and restored at 1 GHz: 10 ms later the TSC has counted 10 million more.
        let told = VmClock { vm_generation_counter: 1, ..page(1_000_000, 20 * MS, Instant { sec: 1_001, frac: 0 }, 8) };
        let mut right = found;
        right.tick(&told, 30 * MS, 20 * MS);
        right.tick(&told, 40 * MS, 30 * MS);
        assert_eq!((right.compared, right.wrong, right.disruptions, right.generations), (2, 0, 1, 1));
        assert_eq!(right.real().sec, 1_001);
        found.tick(&start, 30 * MS, 20 * MS);
        assert_eq!((found.compared, found.wrong, found.worst_ns), (2, 1, -5_000_000));
    }

    // Catches: a limit that a frequency in whole kHz exceeds.
    #[test]
    fn a_khz_is_no_error() {
        let clock = page(1_000_001, 0, Instant::default(), 0);
        let mut found = Found::default();
        found.tick(&clock, 0, 0);
        found.tick(&clock, 1_000 * MS, 1_000 * MS);
        assert_eq!((found.wrong, found.worst_ns), (0, -1_000));
        found.tick(&clock, 1_000 * MS, 1_001 * MS);
        assert_eq!(found.wrong, 1);
    }
}
