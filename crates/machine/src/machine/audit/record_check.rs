//! Checks the guest's records against the host's clocks.
//!
//! Two things must hold for a record. The TSC that the guest read and the VM time that it computed from it must be the
//! same instant by the reference clock, which does not use the kvmclock page. And no instant in a record can be later
//! than the one at which the record is read. The second check finds an RDTSC that is not in the guest's trap-site
//! table: it returns the host's TSC, and VM time is then computed correctly from a wrong TSC.

use guest_abi::report::Record;
use vmtime::{GuestTsc, TscAdjust, VmTime};

use crate::machine::{clock::Clock, config::LapicKind};

/// How far the guest's and the host's VM time of one instant may differ: the page rounds each reading down by up to 2
/// ns, and a restore rounds its base.
pub(crate) const CLOCKS_AGREE_NS: u64 = 1000;
/// VM time in which the page may drift by a nanosecond: KVM's arithmetic is good to 1 ppb.
const DRIFT_NS: u64 = 1_000_000_000;
/// The tolerance with KVM's kvmclock: the VMM last read that clock when the guest last stopped. A guest that reads
/// another machine's TSC is off by hours.
const KVMS_CLOCK_NS: u64 = 1_000_000_000;

/// The clocks of one CPU, when the records of its ring are read.
pub(crate) struct ClockReading {
    pub clock: Clock,
    /// The VM is paused because the host had stopped it. Records may be from within that gap.
    pub has_gap: bool,
    /// Whether the VMM or KVM emulates kvmclock.
    pub lapic: LapicKind,
    /// How far the CPU's TSC is ahead of the base, modulo 2^64.
    pub tsc_adjust: TscAdjust,
}

/// The check of the records that are read at one instant.
pub(crate) struct RecordCheck {
    /// VM time, by the page or by the reference clock, whichever is later.
    now: VmTime,
    /// None with KVM's kvmclock: the VMM does not compute VM time from the guest's TSC then.
    clock: Option<(Clock, TscAdjust)>,
    tolerance_ns: u64,
}

impl RecordCheck {
    /// The check with the clocks of `reading`; `restores` is how often the page got a new base.
    pub(crate) fn new(reading: ClockReading, restores: u64) -> Self {
        let ClockReading { clock, has_gap, lapic, tsc_adjust } = reading;
        let tsc = clock.tsc();
        let publishes_page = lapic == LapicKind::User;
        let tolerance_ns = if publishes_page { tolerance_ns(clock.vm_time(tsc), restores) } else { KVMS_CLOCK_NS };
        let now = if has_gap { VmTime(u64::MAX) } else { clock.vm_time(tsc).max(clock.reference_time(tsc)) };
        Self { now, clock: publishes_page.then_some((clock, tsc_adjust)), tolerance_ns }
    }

    /// How far the guest's clock was ahead when it wrote `record`, if that is more than the tolerance.
    pub(crate) fn clock_error(&self, record: &Record) -> Option<i64> {
        let Record { armed_ns, first_wake_ns, fired_ns, fired_tsc, .. } = *record;
        let reference = self
            .clock
            .as_ref()
            .and_then(|(clock, adjust)| clock.past_reference_time(adjust.to_base(GuestTsc(fired_tsc))));
        let errors = [
            reference.map(|reference| difference(fired_ns, reference.0)),
            later(fired_ns.max(armed_ns).max(first_wake_ns), self.now.0),
            // A tick is armed before it fires.
            later(armed_ns.max(first_wake_ns), fired_ns),
        ];
        let wrong = errors.into_iter().flatten().filter(|error| error.unsigned_abs() > self.tolerance_ns);
        wrong.max_by_key(|error| error.unsigned_abs())
    }
}

/// The tolerance at VM time `vm`. Each restore adds to it, because it rounds the page's base again.
fn tolerance_ns(vm: VmTime, restores: u64) -> u64 {
    CLOCKS_AGREE_NS.saturating_add(vm.0 / DRIFT_NS).saturating_add(restores.saturating_mul(2))
}

/// `a - b`, if `a` is the larger.
fn later(a: u64, b: u64) -> Option<i64> {
    (a > b).then(|| difference(a, b))
}

/// `a - b`, at the ends of the range if it leaves it.
fn difference(a: u64, b: u64) -> i64 {
    let distance = i64::try_from(a.abs_diff(b)).unwrap_or(i64::MAX);
    if a >= b { distance } else { distance.saturating_neg() }
}

#[cfg(test)]
impl RecordCheck {
    /// A check that finds no error.
    pub(crate) fn allowing_all() -> Self {
        Self { now: VmTime(u64::MAX), clock: None, tolerance_ns: u64::MAX }
    }

    /// The check with a clock that shows `now`.
    pub(crate) fn of(clock: Clock, now: VmTime, adjust: TscAdjust) -> Self {
        Self { now, clock: Some((clock, adjust)), tolerance_ns: tolerance_ns(now, 0) }
    }
}
