use std::collections::VecDeque;

use super::*;

/// Counts of a 2 GHz TSC, of kvmclock and of the PM timer at a time, which `step_ns` passes on at every reading.
#[derive(Default)]
struct Clocks {
    ns: u64,
    step_ns: u64,
    /// Parts per million that the TSC runs fast.
    tsc_ppm: i64,
    /// Added to kvmclock.
    kvmclock_ahead_ns: i64,
    /// Read instead of the PM timer's count, if there are any.
    pm: VecDeque<u64>,
}

impl Counters for Clocks {
    fn readout(&mut self, watchdog: Clocksource, clocksource: Clocksource) -> [u64; 3] {
        [watchdog, clocksource, watchdog].map(|clocksource| self.read(clocksource))
    }
}

impl Clocks {
    fn read(&mut self, clocksource: Clocksource) -> u64 {
        self.ns += self.step_ns;
        match clocksource {
            Clocksource::Tsc => {
                (self.ns * 2).saturating_add_signed((self.ns * 2 / 1_000_000).cast_signed() * self.tsc_ppm)
            }
            Clocksource::Kvmclock => self.ns.saturating_add_signed(self.kvmclock_ahead_ns),
            Clocksource::AcpiPm => {
                let count = low64(u128::from(self.ns) * 3_579_545 / 1_000_000_000) & 0xff_ffff;
                self.pm.pop_front().unwrap_or(count)
            }
        }
    }
}

const HALF_SECOND: u64 = 500_000_000;

fn watchdog(watchdog: Clocksource) -> Watchdog {
    Watchdog::new(watchdog, 2_000_000)
}

/// Checks once, then `checks` times with half a second in between.
fn run(watchdog: &mut Watchdog, clocks: &mut Clocks, checks: u32) {
    watchdog.check(clocks);
    for _ in 0..checks {
        clocks.ns += HALF_SECOND;
        watchdog.check(clocks);
    }
}

// Catches: a limit other than Linux 7.2's. kvm-clock does not say that it is calibrated, so that 1/256 of the interval
// is allowed; the PM timer and the TSC both do, so that it is 1/2048.
#[test]
fn the_limit_is_4000_ppm_of_the_interval_and_500_between_calibrated_ones() {
    for (reference, most_ppm) in [(Clocksource::Kvmclock, 3906), (Clocksource::AcpiPm, 488)] {
        for (ppm, unstable) in [(most_ppm - 30, 0), (most_ppm + 30, UNSTABLE_TSC)] {
            // A slow TSC is the same as a fast one, but for the longer of the two intervals.
            for tsc_ppm in [ppm, -ppm] {
                let (mut w, mut clocks) = (watchdog(reference), Clocks { tsc_ppm, ..Clocks::default() });
                run(&mut w, &mut clocks, 4);
                assert_eq!(w.found().unstable, unstable, "{reference:?} {tsc_ppm} ppm");
            }
        }
    }
}

/// Counts in the order in which they are read.
struct Script(VecDeque<u64>);

impl Counters for Script {
    fn readout(&mut self, _: Clocksource, _: Clocksource) -> [u64; 3] {
        [(); 3].map(|()| self.0.pop_front().unwrap())
    }
}

// Catches: a limit that is off by a nanosecond, or that forgets the time that reading the watchdog takes.
#[test]
fn the_limit_itself_is_too_much() {
    let limit = HALF_SECOND / 256;
    for (skew_ns, readout_ns, unstable) in
        [(limit, 0, true), (limit - 1, 0, false), (limit + 9, 10, false), (limit + 10, 10, true)]
    {
        // The TSC is slow, so that the longer interval is the watchdog's.
        let tsc = 2 * (HALF_SECOND - skew_ns);
        let mut script = Script([0, 0, 0, HALF_SECOND, tsc, HALF_SECOND + readout_ns].into());
        let mut w = watchdog(Clocksource::Kvmclock);
        w.check(&mut script);
        w.check(&mut script);
        assert_eq!(w.found().unstable != 0, unstable, "{skew_ns} {readout_ns}");
        assert_eq!((w.found().worst_skew_ns, w.found().worst_interval_ns), (-skew_ns.cast_signed(), HALF_SECOND));
    }
}

// Catches: a comparison with readings that a preempted CPU made too far apart, and one with the readings before that.
#[test]
fn a_slow_readout_is_no_verdict_and_begins_anew() {
    let (mut w, mut clocks) = (watchdog(Clocksource::Kvmclock), Clocks::default());
    run(&mut w, &mut clocks, 1);
    (clocks.step_ns, clocks.tsc_ppm) = (READOUT_MAX_NS / 2 + 1, 100_000);
    w.check(&mut clocks);
    assert_eq!((w.found().checks, w.found().timed_out, w.found().unstable), (1, 1, 0));
    // What happened until then is not compared.
    (clocks.step_ns, clocks.tsc_ppm) = (READOUT_MAX_NS / 2, 0);
    w.check(&mut clocks);
    assert_eq!((w.found().checks, w.found().timed_out, w.found().unstable), (1, 1, 0));
}

// Catches: a PM timer whose wrap every 4.7 s is taken for a step, and an interval longer than it can tell.
#[test]
fn the_pm_timer_wraps_and_an_interval_too_long_for_it_is_not_compared() {
    let (mut w, mut clocks) = (watchdog(Clocksource::AcpiPm), Clocks { step_ns: 1_000, ..Clocks::default() });
    run(&mut w, &mut clocks, 40);
    assert_eq!((w.found().checks, w.found().unstable), (80, 0));
    assert!(w.found().worst_skew_ns.unsigned_abs() < 1_000 + 280 + 2, "{:?}", w.found());
    // Ten seconds are two wraps and 0.6 s.
    clocks.ns += 10_000_000_000;
    w.check(&mut clocks);
    assert_eq!((w.found().checks, w.found().unstable), (80, 0));
}

// Catches: a watchdog that watches itself; kvmclock unwatched with another reference; marks that do not stay.
#[test]
fn kvmclock_watches_the_tsc_and_the_pm_timer_both() {
    let (mut w, mut clocks) = (watchdog(Clocksource::AcpiPm), Clocks::default());
    run(&mut w, &mut clocks, 1);
    assert_eq!(w.found().checks, 2);
    clocks.kvmclock_ahead_ns = -400_000_000;
    clocks.ns += HALF_SECOND;
    w.check(&mut clocks);
    let marked: std::vec::Vec<_> = w.unstable().collect();
    let [(Clocksource::Kvmclock, skew_ns, _)] = marked[..] else { panic!("{marked:?}") };
    assert!(skew_ns.abs_diff(-400_000_000) < 1_000, "{skew_ns}");
    // Marked ones are watched no longer, however well they do.
    clocks.ns += HALF_SECOND;
    run(&mut w, &mut clocks, 2);
    assert_eq!((w.found().unstable, w.found().checks), (UNSTABLE_KVMCLOCK, 2 + 2 + 3));
    let mut alone = watchdog(Clocksource::Kvmclock);
    run(&mut alone, &mut clocks, 3);
    assert_eq!(alone.found().checks, 3);
}

// Catches: a clock that went back and is taken for one that made a huge step forward.
#[test]
fn a_clock_that_went_back_made_no_interval() {
    let w = watchdog(Clocksource::Kvmclock);
    assert_eq!(w.interval_ns(Clocksource::Kvmclock, 100, 99), 0);
    assert_eq!(w.interval_ns(Clocksource::AcpiPm, 5, 4), 0);
    assert_eq!(w.interval_ns(Clocksource::AcpiPm, 0xff_ffff, 0x36_9e98), 1_000_000_000);
    assert_eq!(w.interval_ns(Clocksource::Tsc, u64::MAX, 1_999_999_999), 1_000_000_000);
}
