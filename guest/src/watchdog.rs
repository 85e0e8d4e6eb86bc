//! The clocksource watchdog, as Linux has it: every half second the guest compares an interval by one clocksource with
//! the same interval by another, the *watchdog*, and marks the first unstable if they differ by too much.
//!
//! Numbers and order are those of `watchdog_check_freq` in `kernel/time/clocksource.c` of Linux 7.2 (rewritten in 7.1
//! by commit 763aacf86f1b). Linux takes the best-rated clocksource that needs no verification for the watchdog. In a
//! KVM guest that is kvm-clock, and the TSC is watched. Without kvm-clock it is HPET or the ACPI PM timer. Here it is
//! kvmclock or the PM timer, on request.
//!
//! What is not here: the comparison of CPUs with each other, and the restart of the comparison after
//! PVCLOCK_GUEST_STOPPED, for which kvm-clock of Linux 7.2 does not look when it is read.

use guest_abi::ports::{PM_TIMER_BITS, PM_TIMER_HZ};
use guest_abi::report::{UNSTABLE_KVMCLOCK, UNSTABLE_TSC, Watchdog as Found};

use crate::pvclock::low64;

/// Checks a second: `WATCHDOG_INTERVAL` is `HZ >> 1` jiffies.
pub const HZ: u32 = 2;
/// `WATCHDOG_READOUT_MAX_NS`: a clocksource is read between two readings of the watchdog, which are at most so far
/// apart.
pub const READOUT_MAX_NS: u64 = 50_000;
/// `WATCHDOG_FREQ_RETRIES`: how often that is tried.
pub const RETRIES: u32 = 3;
/// `SHIFT_500PPM`: the limit, if both say that their frequency is calibrated, is the interval shifted right by this.
pub const SHIFT_500PPM: u32 = 11;
/// `SHIFT_4000PPM`: the limit if not both do.
pub const SHIFT_4000PPM: u32 = 8;

/// A clocksource of this guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clocksource {
    /// The TSC, at the frequency that the guest saw at boot. Linux: `tsc`.
    Tsc,
    /// Linux: `kvm-clock`.
    Kvmclock,
    /// The ACPI PM timer. Linux: `acpi_pm`.
    AcpiPm,
}

impl Clocksource {
    /// Its name on the command line and in messages.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tsc => "tsc",
            Self::Kvmclock => "kvmclock",
            Self::AcpiPm => "acpi_pm",
        }
    }

    /// `CLOCK_SOURCE_CALIBRATED`: set for the TSC (`arch/x86/kernel/tsc.c`) and the PM timer
    /// (`drivers/clocksource/acpi_pm.c`), but not for kvm-clock (`arch/x86/kernel/kvmclock.c`).
    const fn is_calibrated(self) -> bool {
        matches!(self, Self::Tsc | Self::AcpiPm)
    }

    /// Its width, as a mask.
    const fn mask(self) -> u64 {
        match self {
            Self::Tsc | Self::Kvmclock => u64::MAX,
            Self::AcpiPm => (1 << PM_TIMER_BITS) - 1,
        }
    }

    /// `max_idle_ns`: a longer interval is not compared. It is what Linux prints when it registers each of them; the
    /// TSC's is 440.8 s at every frequency, to a tenth.
    const fn max_idle_ns(self) -> u64 {
        match self {
            Self::Tsc => 440_800_000_000,
            Self::Kvmclock => 881_590_591_483,
            Self::AcpiPm => 2_085_701_024,
        }
    }

    const fn bit(self) -> u64 {
        match self {
            Self::Tsc => UNSTABLE_TSC,
            Self::Kvmclock => UNSTABLE_KVMCLOCK,
            Self::AcpiPm => 0,
        }
    }
}

/// Reads clocksources.
pub trait Counters {
    /// The counts of `watchdog`, `clocksource` and again `watchdog`, one after the other, with interrupts off: TSC
    /// ticks, nanoseconds, or PM timer ticks. What can be computed later is: where the kernel's code is emulated, a few
    /// hundred instructions take longer than [`READOUT_MAX_NS`].
    fn readout(&mut self, watchdog: Clocksource, clocksource: Clocksource) -> [u64; 3];
}

/// A clocksource that is watched.
#[derive(Clone, Copy, Debug)]
struct Watched {
    clocksource: Clocksource,
    /// The counts of the watchdog and of the clocksource at the last check, if they are to be compared with.
    last: Option<(u64, u64)>,
    /// How far it was off when it was marked unstable, and the interval by the watchdog, in nanoseconds.
    unstable: Option<(i64, u64)>,
}

impl Watched {
    const fn new(clocksource: Clocksource) -> Self {
        Self { clocksource, last: None, unstable: None }
    }
}

/// The result of one comparison.
enum Check {
    /// The interval by the watchdog, by how much the clocksource's is longer, and whether that is too much.
    Compared { interval_ns: u64, skew_ns: i64, skewed: bool },
    /// The first reading, or an interval that is too long to compare.
    Reset,
    /// The watchdog could not be read fast enough.
    TimedOut,
}

/// The watchdog.
#[derive(Clone, Debug)]
pub struct Watchdog {
    watchdog: Clocksource,
    watched: [Watched; 2],
    /// Nanoseconds per TSC tick, as a 32-bit fraction.
    tsc_mult: u64,
    found: Found,
}

impl Watchdog {
    /// With `watchdog` as the clock that others are compared with, and the TSC frequency at boot in kHz.
    ///
    /// Kvmclock watches the TSC. The PM timer watches the TSC and, which Linux would not do, kvmclock.
    #[must_use]
    pub fn new(watchdog: Clocksource, tsc_khz: u64) -> Self {
        let watched = [Watched::new(Clocksource::Tsc), Watched::new(Clocksource::Kvmclock)];
        let tsc_mult = (1_000_000u64 << 32).checked_div(tsc_khz).unwrap_or(0);
        Self { watchdog, watched, tsc_mult, found: Found::default() }
    }

    /// The clock that the others are compared with.
    #[must_use]
    pub fn clocksource(&self) -> Clocksource {
        self.watchdog
    }

    /// What was found so far.
    #[must_use]
    pub fn found(&self) -> &Found {
        &self.found
    }

    /// The clocksources that were marked unstable: by how many nanoseconds each was off, in an interval of how many.
    pub fn unstable(&self) -> impl Iterator<Item = (Clocksource, i64, u64)> {
        self.watched.iter().filter_map(|of| of.unstable.map(|(skew_ns, interval)| (of.clocksource, skew_ns, interval)))
    }

    /// The timer's function: checks each clocksource.
    pub fn check<C: Counters>(&mut self, counters: &mut C) {
        let mut watched = self.watched;
        for of in watched.iter_mut().filter(|of| of.clocksource != self.watchdog && of.unstable.is_none()) {
            match self.check_one(of, counters) {
                Check::Reset => {}
                Check::TimedOut => {
                    self.found.timed_out += 1;
                    of.last = None;
                }
                Check::Compared { interval_ns, skew_ns, skewed } => {
                    self.found.checks += 1;
                    if skew_ns.unsigned_abs() >= self.found.worst_skew_ns.unsigned_abs() {
                        (self.found.worst_skew_ns, self.found.worst_interval_ns) = (skew_ns, interval_ns);
                    }
                    if skewed {
                        of.unstable = Some((skew_ns, interval_ns));
                        self.found.unstable |= of.clocksource.bit();
                    }
                }
            }
        }
        self.watched = watched;
    }

    /// `watchdog_check_freq`.
    fn check_one<C: Counters>(&self, of: &mut Watched, counters: &mut C) -> Check {
        let shift =
            if self.watchdog.is_calibrated() && of.clocksource.is_calibrated() { SHIFT_500PPM } else { SHIFT_4000PPM };
        for _ in 0..RETRIES {
            let [before, count, after] = counters.readout(self.watchdog, of.clocksource);
            let readout_ns = self.interval_ns(self.watchdog, before, after);
            if readout_ns > READOUT_MAX_NS {
                continue;
            }
            let Some((watchdog_last, last)) = of.last.replace((before, count)) else { return Check::Reset };
            let watchdog_ns = self.interval_ns(self.watchdog, watchdog_last, before);
            let ns = self.interval_ns(of.clocksource, last, count);
            let longer_ns = watchdog_ns.max(ns);
            if longer_ns > of.clocksource.max_idle_ns() || longer_ns > self.watchdog.max_idle_ns() {
                return Check::Reset;
            }
            // Both are below 2^40.
            let skew_ns = ns.wrapping_sub(watchdog_ns).cast_signed();
            let skewed = skew_ns.unsigned_abs() >= (longer_ns >> shift) + readout_ns;
            return Check::Compared { interval_ns: watchdog_ns, skew_ns, skewed };
        }
        Check::TimedOut
    }

    /// The nanoseconds from one count to another; 0 if the clocksource went back (`clocksource_delta` in
    /// `kernel/time/timekeeping_internal.h`).
    fn interval_ns(&self, of: Clocksource, from: u64, to: u64) -> u64 {
        let mask = of.mask();
        let ticks = to.wrapping_sub(from) & mask;
        // `max_raw_delta`
        if ticks > (mask >> 1) + (mask >> 2) + (mask >> 3) {
            return 0;
        }
        match of {
            Clocksource::Tsc => low64((u128::from(ticks) * u128::from(self.tsc_mult)) >> 32),
            Clocksource::Kvmclock => ticks,
            // Of 24 bits, so that the product has 54.
            Clocksource::AcpiPm => ticks * 1_000_000_000 / u64::from(PM_TIMER_HZ),
        }
    }
}

#[cfg(test)]
mod tests;
