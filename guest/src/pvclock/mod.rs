//! Reads the kvmclock page, and inverts it.
//!
//! The page *is* VM time: all conversions between TSC and nanoseconds use the page's own numbers and no second formula.
//! Source: Linux `Documentation/virt/kvm/x86/msr.rst`, `arch/x86/kernel/pvclock.c`.

mod clock;
mod convert;

use core::hint::cold_path;

pub use clock::{Clock, WallTime, wall_time};
pub use convert::{BadPage, CAP_BITS, CAP_NS, Conversion, MUL_MIN, SHIFT_MAX, cached_mult, exact, mult, split};
use guest_abi::pvclock::TimeInfo;

/// Reads the page and the TSC. Every call reads memory or the counter again.
pub trait Source {
    /// The page's version. Reads and writes after the call may not move before it.
    fn version(&mut self) -> u32;
    /// The page's other fields, with any version; they may be torn.
    fn fields(&mut self) -> TimeInfo;
    /// The TSC.
    fn rdtsc(&mut self) -> u64;
    /// Executes PAUSE, while the page is being written.
    fn pause(&mut self);
    /// Clears PVCLOCK_GUEST_STOPPED in the page, and only that bit.
    fn clear_guest_stopped(&mut self);
    /// The largest reading that any CPU has published: later readings must not be smaller. The TSC is not read before
    /// this returns. A single CPU has no other to compare with.
    fn published(&mut self) -> u64 {
        0
    }
    /// Publishes a reading.
    fn publish(&mut self, _ns: u64) {}
}

/// One consistent reading of the clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reading {
    /// VM time in nanoseconds.
    pub ns: u64,
    /// The TSC value it was computed from.
    pub tsc: u64,
    /// Version of the page it was computed from.
    pub version: u32,
    /// The page's flags.
    pub flags: u8,
}

/// The first half of a reading, made by an interrupt's entry code before it saves a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Begun {
    /// The page's version.
    pub version: u32,
    /// The TSC, read after it.
    pub tsc: u64,
}

/// What a reading is computed from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    page: TimeInfo,
    version: u32,
    tsc: u64,
}

impl Sample {
    /// The reading.
    #[must_use]
    pub fn reading(&self) -> Reading {
        let Self { page, version, tsc } = *self;
        Reading { ns: system_ns(&page, tsc), tsc, version, flags: page.flags }
    }
}

/// Reads the clock, until the version was even and the same before and after.
pub fn read<S: Source + ?Sized>(source: &mut S) -> Reading {
    let begun = begin(source);
    finish(source, begun)
}

fn begin<S: Source + ?Sized>(source: &mut S) -> Begun {
    loop {
        let version = source.version();
        if version & 1 == 0 {
            return Begun { version, tsc: source.rdtsc() };
        }
        source.pause();
    }
}

/// As [`read`], for the time of `begun` if the page has not changed since.
#[inline(always)]
pub fn finish<S: Source + ?Sized>(source: &mut S, begun: Begun) -> Reading {
    let Begun { mut version, mut tsc } = begun;
    loop {
        if version & 1 == 0 {
            let page = source.fields();
            if source.version() == version {
                return Reading { ns: system_ns(&page, tsc), tsc, version, flags: page.flags };
            }
        }
        cold_path();
        source.pause();
        Begun { version, tsc } = begin(source);
    }
}

/// Reads the TSC and the page that belongs to it, from which [`Sample::reading`] computes a reading later.
pub fn sample<S: Source + ?Sized>(source: &mut S) -> Sample {
    loop {
        let Begun { version, tsc } = begin(source);
        let page = source.fields();
        if source.version() == version {
            return Sample { page, version, tsc };
        }
        source.pause();
    }
}

/// Reads the clock with a bug, for tools that must find it: the version is checked before the TSC is read. A migration
/// in between combines the old page's numbers with the new TSC.
#[inline(always)]
pub fn read_checked_too_early<S: Source + ?Sized>(source: &mut S) -> Reading {
    loop {
        let version = source.version();
        if version & 1 == 0 {
            let page = source.fields();
            if source.version() == version {
                let tsc = source.rdtsc();
                return Reading { ns: system_ns(&page, tsc), tsc, version, flags: page.flags };
            }
        }
        source.pause();
    }
}

/// VM time at `tsc`: `system_time + (((tsc - tsc_timestamp) << tsc_shift) * mul >> 32)`.
///
/// Wraps as the C code of Linux does: a TSC below `tsc_timestamp` gives a meaningless value, not a panic.
#[must_use]
#[inline(always)]
pub fn system_ns(page: &TimeInfo, tsc: u64) -> u64 {
    let delta = tsc.wrapping_sub(page.tsc_timestamp);
    let by = u32::from(page.tsc_shift.unsigned_abs());
    let shifted = if page.tsc_shift < 0 { delta.wrapping_shr(by) } else { slow_tsc(delta, by) };
    let product = u128::from(shifted) * u128::from(page.tsc_to_system_mul);
    page.system_time.wrapping_add(low64(product >> 32))
}

/// The shift for a TSC of 1 GHz or less. A function of its own, so that a faster TSC does not compute both shifts.
#[cold]
#[inline(never)]
fn slow_tsc(delta: u64, by: u32) -> u64 {
    delta.wrapping_shl(by)
}

/// The TSC frequency that the page states, in kHz, to the nearest; 0 if the page states none.
///
/// Linux (`pvclock_tsc_khz`) shifts after the division and loses up to `2^-tsc_shift` kHz; here the dividend is
/// shifted as far as its word allows.
#[must_use]
pub fn tsc_khz(page: &TimeInfo) -> u64 {
    const DIVIDEND: u64 = 1_000_000 << 32;
    const ROOM: u32 = DIVIDEND.leading_zeros() - 1;
    let mul = u64::from(page.tsc_to_system_mul);
    let by = u32::from(page.tsc_shift.unsigned_abs());
    if page.tsc_shift >= 0 {
        return ((DIVIDEND + mul / 2).checked_div(mul).unwrap_or(0)).wrapping_shr(by);
    }
    let first = by.min(ROOM);
    let khz = ((DIVIDEND << first) + mul / 2).checked_div(mul).unwrap_or(0);
    khz.wrapping_shl(by - first)
}

/// The low 64 bits, as C's assignment to a `u64` takes them.
#[expect(clippy::cast_possible_truncation, reason = "dropping the high half is what this is for")]
pub(crate) fn low64(value: u128) -> u64 {
    value as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mock::{Mock, page_at};

    #[test]
    fn reads_a_quiet_page_once() {
        let mut m = Mock::new(page_at(2, 1_000, 5_000, 1 << 31, 1));
        m.tsc = 1_100;
        // mul 2^31 and shift 1: one nanosecond a tick.
        assert_eq!(read(&mut m), Reading { ns: 5_100, tsc: 1_100, version: 2, flags: 0 });
        assert_eq!((m.tsc_reads, m.pauses), (1, 0));
    }

    #[test]
    fn waits_while_the_version_is_odd() {
        let mut m = Mock::new(page_at(3, 0, 0, 1 << 31, 1));
        m.after_pause = Some(page_at(4, 0, 7, 1 << 31, 1));
        assert_eq!(read(&mut m), Reading { ns: 7, tsc: 0, version: 4, flags: 0 });
        assert_eq!((m.tsc_reads, m.pauses), (1, 1));
    }

    #[test]
    fn reads_again_when_the_page_changed_under_it() {
        let mut m = Mock::new(page_at(2, 0, 7, 1 << 31, 1));
        m.after_rdtsc = Some(page_at(4, 0, 9, 1 << 31, 1));
        assert_eq!(read(&mut m), Reading { ns: 9, tsc: 0, version: 4, flags: 0 });
        assert_eq!(m.tsc_reads, 2);
    }

    #[test]
    fn a_begun_reading_is_of_the_time_it_was_begun() {
        let mut m = Mock::new(page_at(2, 0, 7, 1 << 31, 1));
        m.tsc = 900;
        assert_eq!(finish(&mut m, Begun { version: 2, tsc: 100 }), Reading { ns: 107, tsc: 100, version: 2, flags: 0 });
        assert_eq!((m.tsc_reads, m.pauses), (0, 0));
    }

    #[test]
    fn a_begun_reading_of_another_page_is_made_again() {
        let now = Reading { ns: 907, tsc: 900, version: 4, flags: 0 };
        // The page was older, or was being written.
        for version in [2, 3] {
            let mut m = Mock::new(page_at(4, 0, 7, 1 << 31, 1));
            m.tsc = 900;
            assert_eq!(finish(&mut m, Begun { version, tsc: 100 }), now);
            assert_eq!(m.tsc_reads, 1);
        }
        let mut m = Mock::new(page_at(3, 0, 0, 1 << 31, 1));
        m.tsc = 900;
        m.after_pause = Some(page_at(4, 0, 7, 1 << 31, 1));
        assert_eq!(finish(&mut m, Begun { version: 3, tsc: 100 }), now);
    }

    #[test]
    fn the_planted_bug_is_one() {
        let mut m = Mock::new(page_at(2, 0, 7, 1 << 31, 1));
        m.after_rdtsc = Some(page_at(4, 0, 9, 1 << 31, 1));
        assert_eq!(read_checked_too_early(&mut m).ns, 7);
        assert_eq!(m.tsc_reads, 1);
    }

    #[test]
    fn a_page_states_its_frequency() {
        // KVM's numbers for 2.6 GHz: 2^32 / 1.3, one right shift.
        let page = page_at(2, 0, 0, 3_303_820_997, -1);
        assert_eq!(tsc_khz(&page), 2_600_000);
        assert_eq!(tsc_khz(&page_at(2, 0, 0, 0, 0)), 0);
    }

    #[test]
    fn absurd_shifts_do_not_panic() {
        for shift in [i8::MIN, -64, -32, 32, 64, i8::MAX] {
            let page = page_at(2, u64::MAX, u64::MAX, u32::MAX, shift);
            let _ = (system_ns(&page, 1), tsc_khz(&page));
        }
    }
}
