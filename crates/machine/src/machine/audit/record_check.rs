//! Checks the guest's records against the host's clocks.
//!
//! Two things must hold for a record. The TSC that the guest read and the VM time that it computed from it must be the
//! same instant by the reference clock, which does not use the kvmclock page. And no instant in a record can be later
//! than the one at which the record is read. The second check finds an RDTSC that is not in the guest's trap-site
//! table: it returns the host's TSC, and VM time is then computed correctly from a wrong TSC.
//!
//! With KVM's kvmclock the pages that KVM writes take the place of the reference clock: the host reads them in guest
//! memory and converts the record's TSC itself.

use guest_abi::report::Record;
use vmtime::{GuestTsc, PageClock, TscAdjust, VmTime};

use crate::machine::clock::Clock;

/// How far the guest's and the host's VM time of one instant may differ. The page rounds each reading down by up to 2
/// ns, and after any number of restores its line is off by less than 1 ns.
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
    /// How the host converts the CPU's TSC into VM time.
    pub converts: Converts,
}

/// How the host converts a TSC that a CPU read into VM time.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Converts {
    /// The VMM emulates kvmclock: by the reference clock. The CPU's TSC is ahead of the base by this, modulo 2^64.
    Reference(TscAdjust),
    /// KVM does: by the pages that KVM wrote for the CPUs ([`super::TickAudit::note_kvm_pages`]).
    Pages,
}

/// The pages that KVM wrote for the CPUs lately, the newest first.
///
/// A record may be older than the pages that are there when it is read. They change at a restore, and when KVM gives
/// its clock a new base. And a guest may be stopped between a tick and its record.
///
/// All CPUs' pages are on one line, unless a guest wrote a TSC. Which CPU has which ring is not certain while they
/// start. So all pages are tried.
#[derive(Clone, Debug, Default)]
pub(crate) struct KvmPages(Vec<PageClock>);

impl KvmPages {
    /// With the pages that are there now; keeps three older ones for each.
    pub(crate) fn add(&mut self, mut now: Vec<PageClock>) {
        let keep = now.len().saturating_mul(4);
        self.0.retain(|page| !now.contains(page));
        now.append(&mut self.0);
        now.truncate(keep.max(4));
        self.0 = now;
    }

    /// VM time at `tsc`, by the page with which it is nearest to `read`, what the guest computed.
    fn vm_time(&self, tsc: GuestTsc, read: VmTime) -> Option<VmTime> {
        let vm_time = |page: &PageClock| {
            let PageClock { tsc_timestamp, system_time, scale } = *page;
            match tsc_timestamp.0.checked_sub(tsc.0) {
                None | Some(0) => page.vm_time(tsc),
                // KVM has moved the base since, to an instant after the tick. The line is the same to some nanoseconds.
                Some(before) => VmTime(system_time.0.saturating_sub(vmtime::saturate(scale.ns(before)))),
            }
        };
        self.0.iter().map(vm_time).min_by_key(|vm| vm.0.abs_diff(read.0))
    }
}

/// The check of the records that are read at one instant.
pub(crate) struct RecordCheck {
    /// VM time, by the page or by the reference clock, whichever is later.
    now: VmTime,
    /// The host's account of VM time, by the reference clock.
    clock: Clock,
    /// For a CPU whose TSC is so far ahead.
    adjust: TscAdjust,
    /// The host's account is by KVM's pages instead.
    pages: Option<KvmPages>,
    /// For an instant that may be later than `now`.
    tolerance_ns: u64,
    /// For VM time of the record's TSC.
    agree_ns: u64,
}

impl RecordCheck {
    /// The check with the clocks of `reading`; `pages` are those that KVM wrote, the present one among them.
    pub(crate) fn new(reading: ClockReading, pages: &KvmPages) -> Self {
        let ClockReading { clock, has_gap, converts } = reading;
        let tsc = clock.tsc();
        let now = if has_gap { VmTime(u64::MAX) } else { clock.vm_time(tsc).max(clock.reference_time(tsc)) };
        let agree_ns = tolerance_ns(clock.vm_time(tsc));
        let by_reference = |adjust| Self { now, clock, adjust, pages: None, tolerance_ns: agree_ns, agree_ns };
        match converts {
            Converts::Reference(adjust) => by_reference(adjust),
            Converts::Pages => Self {
                pages: Some(pages.clone()),
                tolerance_ns: KVMS_CLOCK_NS,
                agree_ns: CLOCKS_AGREE_NS,
                ..by_reference(TscAdjust::ZERO)
            },
        }
    }

    /// VM time at which the guest handled the tick, by the host's account: what the host makes of the TSC that the
    /// guest read.
    fn handled(&self, record: &Record) -> Option<VmTime> {
        let tsc = GuestTsc(record.fired_tsc);
        match &self.pages {
            None => self.clock.past_reference_time(self.adjust.to_base(tsc)),
            Some(pages) => pages.vm_time(tsc, VmTime(record.fired_ns)),
        }
    }

    /// With KVM's LAPIC, whose injections the host does not see: VM time at which the guest handled the tick, by the
    /// page that KVM wrote.
    pub(crate) fn handled_by_kvms_page(&self, record: &Record) -> Option<VmTime> {
        self.pages.as_ref().and_then(|_| self.handled(record))
    }

    /// How far the guest's clock was ahead when it wrote `record`, if that is more than the tolerance.
    pub(crate) fn clock_error(&self, record: &Record) -> Option<i64> {
        let Record { armed_ns, first_wake_ns, fired_ns, .. } = *record;
        let errors = [
            (self.handled(record).map(|handled| difference(fired_ns, handled.0)), self.agree_ns),
            (later(fired_ns.max(armed_ns).max(first_wake_ns), self.now.0), self.tolerance_ns),
            // A tick is armed before it fires.
            (later(armed_ns.max(first_wake_ns), fired_ns), self.tolerance_ns),
        ];
        let wrong = errors.into_iter().filter_map(|(error, most)| error.filter(|error| error.unsigned_abs() > most));
        wrong.max_by_key(|error| error.unsigned_abs())
    }
}

/// The tolerance at VM time `vm`.
fn tolerance_ns(vm: VmTime) -> u64 {
    CLOCKS_AGREE_NS.saturating_add(vm.0 / DRIFT_NS)
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
    pub(crate) fn allowing_all(clock: Clock) -> Self {
        let pages = Some(KvmPages::default());
        Self { pages, tolerance_ns: u64::MAX, agree_ns: u64::MAX, ..Self::of(clock, VmTime(u64::MAX), TscAdjust::ZERO) }
    }

    /// The check with a clock that shows `now`.
    pub(crate) fn of(clock: Clock, now: VmTime, adjust: TscAdjust) -> Self {
        let tolerance_ns = tolerance_ns(now);
        Self { now, clock, adjust, pages: None, tolerance_ns, agree_ns: tolerance_ns }
    }
}
