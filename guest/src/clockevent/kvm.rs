//! The clockevents that work after a migration: one converts with the present page, one leaves conversion to the host.

use core::hint::cold_path;

use guest_abi::pvclock::TimeInfo;

use super::{ClockEvent, LVT_TSC_DEADLINE, LVT_VECTOR, Port};
use crate::pvclock::{self, BadPage, Conversion, Reading, Source};

/// `kvm-tsc-deadline`: VM time to TSC through the kvmclock page, then IA32_TSC_DEADLINE.
#[derive(Clone, Copy, Debug)]
pub struct KvmTscDeadline {
    conversion: Conversion,
    recheck: bool,
    cache: MultCache,
}

/// The multiplier of `conversion=mult`, with the page version it was computed from. A torn page may give a wrong one,
/// but no later page has that version. Pages with an odd version are not read, so [`MultCache::EMPTY`] matches none.
#[derive(Clone, Copy, Debug)]
struct MultCache {
    version: u32,
    mult: u64,
}

impl MultCache {
    const EMPTY: Self = Self { version: 1, mult: 0 };

    fn get(&mut self, version: u32, page: &TimeInfo) -> u64 {
        if self.version != version {
            cold_path();
            *self = Self { version, mult: pvclock::cached_mult(page.tsc_to_system_mul).unwrap_or(0) };
        }
        self.mult
    }
}

impl KvmTscDeadline {
    /// With `recheck`, the version is read again after the WRMSR, and the deadline written again if the page changed.
    /// Without, as in the thread, such a deadline stays in the units of the old page until the timer is armed again.
    #[must_use]
    pub fn new(conversion: Conversion, recheck: bool) -> Self {
        Self { conversion, recheck, cache: MultCache::EMPTY }
    }

    #[inline(always)]
    fn convert(&mut self, version: u32, page: &TimeInfo, expires_ns: u64) -> Result<u64, BadPage> {
        match self.conversion {
            Conversion::Split => pvclock::split(page, expires_ns),
            Conversion::Mult => pvclock::mult(page, self.cache.get(version, page), expires_ns),
            Conversion::Exact => pvclock::exact(page, expires_ns),
        }
    }

    /// Converts until the version was the same before and after. Torn pages are converted, too, as in the first patch.
    #[inline(always)]
    fn convert_under_one_version<S: Source>(&mut self, source: &mut S, expires_ns: u64) -> (u32, Result<u64, BadPage>) {
        loop {
            let version = source.version();
            if version & 1 == 0 {
                let result = self.convert(version, &source.fields(), expires_ns);
                if source.version() == version {
                    return (version, result);
                }
            }
            cold_path();
            source.pause();
        }
    }
}

impl ClockEvent for KvmTscDeadline {
    fn set_oneshot<M: Port>(&mut self, machine: &mut M) {
        machine.write_timer_lvt(LVT_VECTOR | LVT_TSC_DEADLINE);
    }

    #[inline(always)]
    fn set_next_event<M: Port + Source>(&mut self, m: &mut M, expires_ns: u64, _now: &Reading) -> Result<u64, BadPage> {
        loop {
            let (version, tsc) = self.convert_under_one_version(m, expires_ns);
            let deadline = armable(tsc?);
            m.write_tsc_deadline(deadline);
            if !self.recheck || m.version() == version {
                return Ok(deadline);
            }
            cold_path();
        }
    }
}

/// `kvm-ns-deadline`: the expiry itself, in an MSR of the host's that takes VM time.
#[derive(Clone, Copy, Debug)]
pub struct KvmNsDeadline {
    msr: u32,
}

impl KvmNsDeadline {
    /// With the MSR number that CPUID gave.
    #[must_use]
    pub fn new(msr: u32) -> Self {
        Self { msr }
    }
}

impl ClockEvent for KvmNsDeadline {
    fn set_oneshot<M: Port>(&mut self, machine: &mut M) {
        machine.write_timer_lvt(LVT_VECTOR | LVT_TSC_DEADLINE);
    }

    #[inline(always)]
    fn set_next_event<M: Port + Source>(&mut self, m: &mut M, expires_ns: u64, _now: &Reading) -> Result<u64, BadPage> {
        let deadline = armable(expires_ns);
        m.write_ns_deadline(self.msr, deadline);
        Ok(deadline)
    }
}

/// Avoids a deadline of 0, which would disarm the timer and lose the tick; 1 is in the past as well. A deadline of 0
/// does occur: a page whose base is TSC 0 converts every past expiry to it.
pub(super) fn armable(deadline: u64) -> u64 {
    deadline.max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mock::{Mock, page_at};

    const NOW: Reading = Reading { ns: 0, tsc: 0, version: 2, flags: 0 };

    fn arm(m: &mut Mock, conversion: Conversion, recheck: bool, ns: u64) -> u64 {
        KvmTscDeadline::new(conversion, recheck).set_next_event(m, ns, &NOW).unwrap()
    }

    #[test]
    fn a_migration_before_the_wrmsr_is_repaired_only_by_the_recheck() {
        for conversion in [Conversion::Split, Conversion::Mult, Conversion::Exact] {
            for (recheck, want) in [(false, std::vec![4_000]), (true, std::vec![4_000, 8_000])] {
                let mut m = Mock::new(page_at(2, 0, 0, 1 << 31, 1));
                m.before_deadline = Some(page_at(4, 0, 0, 1 << 31, 0));
                let deadline = arm(&mut m, conversion, recheck, 4_000);
                assert_eq!(m.deadline_writes, want);
                assert_eq!(deadline, m.tsc_deadline);
            }
        }
    }

    #[test]
    fn mult_is_computed_once_a_version() {
        let mut m = Mock::new(page_at(2, 0, 0, 1 << 31, 1));
        let mut d = KvmTscDeadline::new(Conversion::Mult, true);
        assert_eq!(d.set_next_event(&mut m, 1_000, &NOW), Ok(1_000));
        // A change of the multiplier is ignored while the version is the same.
        m.page.tsc_to_system_mul = 3 << 30;
        assert_eq!(d.set_next_event(&mut m, 1_500, &NOW), Ok(1_500));
        m.page.version = 4;
        assert_eq!(d.set_next_event(&mut m, 1_500, &NOW), Ok(999));
    }

    #[test]
    fn no_device_ever_writes_zero() {
        let mut m = Mock::new(page_at(2, 0, 50, 1 << 31, 1));
        for conversion in [Conversion::Split, Conversion::Mult, Conversion::Exact] {
            assert_eq!(arm(&mut m, conversion, true, 0), 1);
        }
        assert_eq!(KvmNsDeadline::new(7).set_next_event(&mut m, 0, &NOW), Ok(1));
        assert_eq!(m.ns_deadline, (7, 1));
    }

    #[test]
    fn shutdown_clears_the_mode_bits() {
        let mut m = Mock::default();
        let mut d = KvmTscDeadline::new(Conversion::Exact, true);
        d.set_oneshot(&mut m);
        assert_eq!(m.lvt, 0x4_0040);
        d.shutdown(&mut m);
        assert_eq!(m.lvt, 0x1_0040);
    }
}
