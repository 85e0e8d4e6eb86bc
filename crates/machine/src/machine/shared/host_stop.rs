//! A gap in which no vCPU ran, without a request to pause: SIGSTOP, a frozen cgroup, a host that slept.
//!
//! The process gets no notice of these, and the host's clocks continue. If the guest's did too, its time would jump,
//! and PVCLOCK_GUEST_STOPPED would stay clear: the guest's watchdogs would take the gap for a hang. So the VMM finds
//! the gap afterwards, and treats it as a pause that began with it.
//!
//! Every vCPU notes until when it may run ([`LastRun`]): a kick ends each entry after [`PULSE`]. (While that kick is
//! pending the guest cannot run, even if its thread continues before others.) When the clock is read for a vCPU, the
//! notes of all vCPUs are compared with the host's TSC. After a gap the clock is stopped where the gap began, before
//! anything is computed from a later reading: see [`Shared::read_clock`](super::Shared::read_clock). Then all vCPUs
//! stop, and the machine is paused.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use vmtime::HostTsc;

use crate::{host::clock::HostClock, machine::instant::HostInstant};

/// The longest time that an entry lasts. The beginning of a gap is known no better than that: it may have begun this
/// much earlier than noted.
pub(crate) const PULSE: Duration = Duration::from_millis(100);

/// A gap of this length or less is attributed to the host's scheduler: on a busy host a thread waits for a CPU, and the
/// guest is late.
pub(crate) const GAP: Duration = Duration::from_millis(500);

/// Until when a vCPU may have run, and from when on it should have run again, as host TSCs.
#[derive(Debug, Default)]
pub(crate) struct LastRun {
    until: AtomicU64,
    /// 0 = always; [`u64::MAX`] = never, unless another vCPU wakes it.
    runnable_from: AtomicU64,
}

impl LastRun {
    /// Notes that the clock was started at `host` and the vCPU has not been entered since.
    pub(crate) fn begin(&self, host: HostTsc) {
        self.note(host, Some(HostTsc(0)));
    }

    /// Notes that the vCPU is idle since `now`, until `due`; none if no timer can wake it.
    pub(crate) fn note_idle(&self, now: HostTsc, due: Option<HostTsc>) {
        self.note(now, due);
    }

    /// Notes that the vCPU may run until `until`, and is to run again from `runnable_from` on; none = never.
    pub(crate) fn note(&self, until: HostTsc, runnable_from: Option<HostTsc>) {
        self.until.store(until.0, Ordering::SeqCst);
        self.runnable_from.store(runnable_from.map_or(u64::MAX, |due| due.0), Ordering::SeqCst);
    }
}

/// A gap in which no vCPU ran.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Gap {
    /// When it began. No vCPU has run since.
    pub from: HostInstant,
    /// The host's TSC was reset meanwhile, to a lower value.
    pub tsc_restarted: bool,
}

/// The gap that ends now, if there is one. `known` is an instant at which some vCPU ran.
pub(crate) fn gap<'a>(
    vcpus: impl Iterator<Item = &'a LastRun>,
    host: HostClock,
    known: HostInstant,
    now: HostTsc,
) -> Option<Gap> {
    let (mut until, mut runnable_from) = (0, u64::MAX);
    for last_run in vcpus {
        until = until.max(last_run.until.load(Ordering::SeqCst));
        runnable_from = runnable_from.min(last_run.runnable_from.load(Ordering::SeqCst));
    }
    // A TSC that is behind by less than this is that of another CPU, and was not reset.
    let tsc_restarted = host.duration(now, HostTsc(until)) > PULSE.saturating_add(GAP);
    let from = HostTsc(if tsc_restarted { until } else { until.max(runnable_from) });
    let gap = Gap { from: known.moved_to(host, from), tsc_restarted };
    (tsc_restarted || host.duration(from, now) > GAP).then_some(gap)
}

/// How long the host slept between two instants without counting its TSC; none if it did not.
pub(crate) fn slept(host: HostClock, known: HostInstant, now: HostInstant) -> Option<Duration> {
    let uncounted = now.boot.since(known.boot).saturating_sub(host.duration(known.tsc, now.tsc));
    (uncounted > GAP).then_some(uncounted)
}

#[cfg(test)]
mod tests {
    use vmtime::Khz;

    use super::*;
    use crate::machine::instant::BootTime;

    /// 1 GHz: a tick is a nanosecond.
    fn host() -> HostClock {
        HostClock::new(|| 0, Khz::new(1_000_000).unwrap())
    }

    fn ticks(ms: u64) -> HostTsc {
        HostTsc(1_000_000_000_000 + ms * 1_000_000)
    }

    fn known(ms: u64) -> HostInstant {
        let boot = BootTime::start().after(Duration::from_millis(ms));
        HostInstant { tsc: ticks(ms), boot, slept: Duration::ZERO, error_ns: Some(0) }
    }

    fn vcpu(until: u64, runnable_from: Option<u64>) -> LastRun {
        let last = LastRun::default();
        last.note(ticks(until), runnable_from.map(|ms| if ms == 0 { HostTsc(0) } else { ticks(ms) }));
        last
    }

    /// When the gap that ends at `now` began, in ms; none if there is none. Some vCPU ran at 0 ms.
    fn began(vcpus: &[LastRun], now: u64) -> Option<u64> {
        let gap = gap(vcpus.iter(), host(), known(0), ticks(now))?;
        assert!(!gap.tsc_restarted);
        let ms = (gap.from.tsc.0 - ticks(0).0) / 1_000_000;
        assert_eq!(gap.from, known(ms), "TSC and CLOCK_BOOTTIME are of one instant");
        Some(ms)
    }

    // Catches: a gap that is taken to begin before some vCPU ran, which would take its clock back.
    #[test]
    fn a_gap_begins_where_no_vcpu_ran_any_more() {
        assert_eq!(began(&[vcpu(100, Some(0))], 600), None);
        assert_eq!(began(&[vcpu(100, Some(0))], 601), Some(100));
        assert_eq!(began(&[vcpu(100, Some(0)), vcpu(700, Some(0))], 1000), None);
        assert_eq!(began(&[vcpu(100, Some(0)), vcpu(700, Some(0))], 2000), Some(700));
    }

    // Catches: an idle guest whose sleep is taken for a stop.
    #[test]
    fn a_gap_begins_where_a_vcpu_was_to_run() {
        assert_eq!(began(&[vcpu(100, Some(5000))], 5100), None);
        assert_eq!(began(&[vcpu(100, Some(5000))], 9000), Some(5000));
        assert_eq!(began(&[vcpu(100, None)], 1_000_000), None);
        assert_eq!(began(&[vcpu(100, None), vcpu(100, Some(5000))], 9000), Some(5000));
        assert_eq!(began(&[vcpu(100, Some(7000)), vcpu(100, Some(5000))], 9000), Some(5000));
        // A vCPU that is in the guest runs, so another one's missed deadline is no gap.
        assert_eq!(began(&[vcpu(8900, Some(0)), vcpu(100, Some(5000))], 9000), None);
    }

    // Catches: a host that sleeps and resets its TSC. The guest's TSC would not advance until the host's had reached
    // its old value again.
    #[test]
    fn a_tsc_that_begins_anew_is_a_gap() {
        let found = gap([vcpu(900, Some(0))].iter(), host(), known(850), HostTsc(5)).unwrap();
        assert!(found.tsc_restarted);
        assert_eq!(found.from, known(900));
        // Another CPU's TSC may be a little behind.
        assert_eq!(gap([vcpu(900, Some(0))].iter(), host(), known(850), ticks(899)), None);
    }

    #[test]
    fn a_host_that_slept_without_counting_shows_in_its_clock() {
        let woken = HostInstant { boot: known(10_000).boot, ..known(1000) };
        assert_eq!(slept(host(), known(0), woken), Some(Duration::from_secs(9)));
        assert_eq!(slept(host(), known(0), known(1000)), None);
        assert_eq!(slept(host(), known(0), HostInstant { boot: known(1500).boot, ..known(1000) }), None);
    }
}
