//! Measures the lateness of every tick twice: by the guest's clock and by the host's.
//!
//! The guest writes into its ring (see [`guest_abi::report`]) when a tick was to fire and when it did, by its kvmclock.
//! The host records when it injected the interrupt, by its reference clock, which is exact and uses neither the
//! kvmclock page nor its rounding. So an error in one clock shows as a difference from the other. The ring is in guest
//! RAM: no byte of it is trusted.
//!
//! KVM's LAPIC injects by itself. There the host converts the TSC that the guest's handler read, with the page that KVM
//! wrote: so it sees whether the guest's clock is what KVM published, and how late the handler came by it.

pub mod checks;

mod guest_stopped;
mod record_check;
mod ring;
mod state;
mod sum;
mod summary;
mod timers;

use std::collections::VecDeque;

use guest_abi::report::{CAPACITY, Header, Record};
use vmtime::{PageClock, VmTime};

use self::{
    record_check::{CLOCKS_AGREE_NS, KvmPages, RecordCheck},
    ring::RingFound,
    summary::Latenesses,
};
use crate::mem::ram::GuestRam;

pub use guest_stopped::GuestStopped;
pub(crate) use guest_stopped::GuestStoppedAudit;
pub(crate) use record_check::{ClockReading, Converts};
pub use ring::OtherRing;
pub use state::{RingState, TickAuditState};
pub use summary::{Lateness, Summary, TimerSummary, WatchdogSummary};
pub(crate) use timers::TimerAudit;
pub use timers::{Arming, ArmingKind, InFlight, TimerAccount};

/// The most injections per CPU that are kept until a record claims them. This bounds memory for a guest that writes no
/// records.
const MAX_UNCLAIMED: usize = 4096;

/// Reads the tick rings, and counts what the ticks show.
#[derive(Debug)]
pub struct TickAudit {
    /// Guest physical address of CPU 0's ring; the others follow.
    ring: Option<u64>,
    /// Each CPU's ring, by CPU number.
    rings: Vec<Ring>,
    /// Intervals that were armed before this VM time were armed with another TSC frequency, and are not counted.
    since: VmTime,
    tally: Tally,
    late_by_guest: Latenesses,
    late_by_host: Latenesses,
    timer: TimerTally,
    /// A ring that cannot be read, and which CPU's.
    other: Option<(usize, OtherRing)>,
    /// With KVM's kvmclock: the pages that judge the records.
    kvm_pages: KvmPages,
    /// The ticks since [`Self::take_log`], if they are kept.
    log: Option<Vec<Handled>>,
}

/// A tick that the guest handled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Handled {
    /// The CPU whose ring it was in.
    pub cpu: usize,
    /// The guest's record of it.
    pub record: Record,
    /// When the host injected its last interrupt; with KVM's LAPIC, when the guest handled it, by KVM's page.
    pub host: Option<VmTime>,
}

/// One CPU's ring.
#[derive(Clone, Debug, Default)]
struct Ring {
    /// Records read so far.
    read: u64,
    /// Sequence number of the next tick.
    next_seq: Option<u64>,
    /// Injections of the timer's vector that no record has claimed, oldest first.
    injections: VecDeque<VmTime>,
    /// As last read; none before the guest has made it.
    header: Option<Header>,
    /// The bytes in the place of a record were not a record: nothing more is read.
    broken: bool,
}

/// Plain counts.
#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    ticks: u64,
    missing: u64,
    overrun: u64,
    malformed: u64,
    early_wakes: u64,
    taken_early: u64,
    early_by_host: u64,
    armed_late: u64,
    worst_armed_late_ns: u64,
    clock_errors: u64,
    worst_clock_error_ns: i64,
    intervals: Intervals,
}

/// Interrupts of the LAPICs' timers.
#[derive(Debug)]
struct TimerTally {
    interrupts: u64,
    early: u64,
    late: Latenesses,
}

/// The armed intervals: their requested and their actual lengths.
#[derive(Clone, Copy, Debug, Default)]
struct Intervals {
    count: u64,
    asked_ns: u128,
    lasted_ns: u128,
}

impl TickAudit {
    /// An audit of the rings at `ring`, one for each of `cpus`.
    #[must_use]
    pub fn new(ring: Option<u64>, cpus: usize) -> Self {
        Self::from_state(&TickAuditState { ring, rings: Vec::new() }, cpus, VmTime(0))
    }

    /// An audit that continues where a saved one stopped. `since` is VM time at this restore.
    #[must_use]
    pub fn from_state(state: &TickAuditState, cpus: usize, since: VmTime) -> Self {
        let TickAuditState { ring, rings } = state;
        Self {
            ring: *ring,
            rings: state::rings(rings, cpus),
            since,
            tally: Tally::default(),
            late_by_guest: Latenesses::new(),
            late_by_host: Latenesses::new(),
            timer: TimerTally { interrupts: 0, early: 0, late: Latenesses::new() },
            other: None,
            kvm_pages: KvmPages::default(),
            log: None,
        }
    }

    /// Keeps each tick from now on, until [`Self::take_log`] takes them.
    pub fn keep_log(&mut self) {
        self.log = Some(Vec::new());
    }

    /// The ticks since the last call.
    pub fn take_log(&mut self) -> Vec<Handled> {
        self.log.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Continues where `state` stopped. The counts stay.
    pub fn go_back(&mut self, state: &TickAuditState) {
        self.rings = state::rings(&state.rings, self.rings.len());
        drop(self.take_log());
    }

    /// The header of `cpu`'s ring in `memory`, now; none if there is no ring.
    #[must_use]
    pub fn header(&self, memory: &GuestRam, cpu: usize) -> Option<Header> {
        ring::header(memory, ring::address(self.ring?, cpu)?)
    }

    /// The state for a snapshot.
    #[must_use]
    pub fn state(&self) -> TickAuditState {
        // The counts are those of this process, and headers are in RAM.
        let Self {
            ring,
            rings,
            since: _,
            tally: _,
            late_by_guest: _,
            late_by_host: _,
            timer: _,
            other: _,
            kvm_pages: _,
            log: _,
        } = self;
        let state = |Ring { read, next_seq, injections, header: _, broken: _ }: &Ring| RingState {
            read: *read,
            next_seq: *next_seq,
            injections: injections.iter().copied().collect(),
        };
        TickAuditState { ring: *ring, rings: rings.iter().map(state).collect() }
    }

    /// The TSC frequency changed at this VM time: intervals armed earlier no longer count.
    pub fn restored(&mut self, at: VmTime) {
        self.since = at;
        self.tally.intervals = Intervals::default();
    }

    /// Notes that the host injected a timer interrupt at the VM time `at`, by the reference clock. `ring` is the number
    /// of the CPU's ring (guests number their CPUs in the order in which these start). `due` is the instant that the
    /// timer was armed for; none if the interrupt did not wait for it.
    pub fn injected(&mut self, ring: usize, at: VmTime, due: Option<VmTime>) {
        self.timer.interrupts = self.timer.interrupts.saturating_add(1);
        if let Some(due) = due {
            match at.0.checked_sub(due.0) {
                None if at.0.saturating_add(CLOCKS_AGREE_NS) < due.0 => {
                    self.timer.early = self.timer.early.saturating_add(1);
                }
                late => self.timer.late.add(late.unwrap_or(0)),
            }
        }
        let Some(ring) = self.rings.get_mut(ring) else { return };
        if ring.injections.len() == MAX_UNCLAIMED {
            ring.injections.pop_front();
        }
        ring.injections.push_back(at);
    }

    /// Notes the pages that KVM has written for the CPUs. Call it before [`Self::read_rings`], and whenever the machine
    /// stops.
    pub(crate) fn note_kvm_pages(&mut self, pages: Vec<PageClock>) {
        self.kvm_pages.add(pages);
    }

    /// Reads the records that the guest wrote into `memory` since the last call, and calls `on_tick` for each. `now`
    /// returns a CPU's clocks, against which the records of its ring are checked. It is called after the ring's header
    /// was read: so no record that the header counts was written after that instant.
    pub(crate) fn read_rings(
        &mut self,
        memory: &GuestRam,
        now: impl Fn(usize) -> ClockReading,
        mut on_tick: impl FnMut(&Handled),
    ) {
        for cpu in 0..self.rings.len() {
            self.read_ring(memory, cpu, &now, &mut on_tick);
        }
    }

    fn read_ring(
        &mut self,
        memory: &GuestRam,
        cpu: usize,
        now: &impl Fn(usize) -> ClockReading,
        on_tick: &mut impl FnMut(&Handled),
    ) {
        let Some(address) = self.ring.and_then(|first| ring::address(first, cpu)) else { return };
        let header = match ring::find_ring(memory, address, cpu) {
            RingFound::Nothing => return,
            RingFound::Ring(header) => header,
            RingFound::Other(other) => return self.cannot_read(cpu, address, other),
        };
        let Some(ring) = self.rings.get_mut(cpu) else { return };
        ring.header = Some(header);
        // A correct guest never lowers the count. If one does, reading continues when the count has passed the old one.
        let Some(new) = header.written.checked_sub(ring.read).filter(|new| *new != 0 && !ring.broken) else { return };
        let overwritten = new.saturating_sub(u64::from(CAPACITY));
        self.tally.overrun = self.tally.overrun.saturating_add(overwritten);
        let first = ring.read.saturating_add(overwritten);
        ring.read = header.written;
        let check = RecordCheck::new(now(cpu), &self.kvm_pages);
        for number in first..header.written {
            let Some(record) = ring::record(memory, address, number) else { continue };
            if !self.is_record(memory, cpu, address, number, &record, &check) {
                return;
            }
            let handled = Handled { cpu, record, host: self.record(cpu, &record, &check) };
            if let Some(log) = &mut self.log {
                log.push(handled);
            }
            on_tick(&handled);
        }
    }

    /// Notes a ring of another layout for the summary, and logs the first one.
    fn cannot_read(&mut self, cpu: usize, address: u64, other: OtherRing) {
        if self.other.is_none() {
            log::warn!("the tick ring of CPU {cpu} at {address:#x} is not read, so no tick is judged: {other}");
            self.other = Some((cpu, other));
        }
    }

    /// Whether this is a record. If not, the ring is read no further.
    fn is_record(
        &mut self,
        memory: &GuestRam,
        cpu: usize,
        address: u64,
        number: u64,
        record: &Record,
        check: &RecordCheck,
    ) -> bool {
        let Some(Ring { header: Some(header), next_seq, broken, .. }) = self.rings.get_mut(cpu) else { return true };
        // A record may follow missing ticks, or have an impossible instant. If both are so, these are other fields'
        // bytes.
        let in_sequence = next_seq.is_none_or(|next| record.seq == next);
        if ring::is_record(record, number, header, *next_seq) && (in_sequence || check.clock_error(record).is_none()) {
            return true;
        }
        // The guest runs on meanwhile, and may have overwritten this record with a later one.
        let written = ring::header(memory, address).map_or(0, |header| header.written);
        if written.saturating_sub(number) >= u64::from(CAPACITY) {
            self.tally.overrun = self.tally.overrun.saturating_add(1);
            return true;
        }
        let Record { seq, cpu: in_record, reserved, .. } = record;
        log::warn!(
            "record {number} in the tick ring of CPU {cpu} at {address:#x} is none (tick {seq} of CPU {in_record}, \
             last field {reserved}): records are {} bytes from one to the next; the ring is read no further",
            guest_abi::report::RECORD_BYTES
        );
        *broken = true;
        self.tally.malformed = self.tally.malformed.saturating_add(header.written.saturating_sub(number));
        false
    }

    /// Counts one tick of `cpu`, and returns its [`Handled::host`].
    fn record(&mut self, cpu: usize, record: &Record, check: &RecordCheck) -> Option<VmTime> {
        let ring = self.rings.get_mut(cpu)?;
        let tally = &mut self.tally;
        tally.ticks = tally.ticks.saturating_add(1);
        let expected = ring.next_seq.unwrap_or(record.seq);
        tally.missing = tally.missing.saturating_add(record.seq.saturating_sub(expected));
        ring.next_seq = Some(record.seq.saturating_add(1));
        tally.early_wakes = tally.early_wakes.saturating_add(u64::from(record.early_wakes));
        self.late_by_guest.add(record.fired_ns.saturating_sub(record.expires_ns));
        tally.taken_early = tally.taken_early.saturating_add(u64::from(record.fired_ns < record.expires_ns));
        // This tick was armed after its expiry, so no timer could have fired in time.
        if let Some(late) = record.armed_ns.checked_sub(record.expires_ns).filter(|late| *late != 0) {
            tally.armed_late = tally.armed_late.saturating_add(1);
            tally.worst_armed_late_ns = tally.worst_armed_late_ns.max(late);
        }
        if let Some(error) = check.clock_error(record) {
            tally.clock_errors = tally.clock_errors.saturating_add(1);
            if error.unsigned_abs() > tally.worst_clock_error_ns.unsigned_abs() {
                tally.worst_clock_error_ns = error;
            }
        }

        let asked = record.expires_ns.saturating_sub(record.armed_ns);
        if record.armed_ns >= self.since.0 && asked != 0 {
            let intervals = &mut tally.intervals;
            intervals.count += 1;
            intervals.asked_ns += u128::from(asked);
            intervals.lasted_ns += u128::from(record.first_wake_ns.saturating_sub(record.armed_ns));
        }

        // Injections from before the tick was armed belong to no tick: the guest also arms timers only to wake itself.
        // They go first, so that the rest are this tick's: its early wakes and then the interrupt that the guest took
        // as due.
        while ring.injections.front().is_some_and(|at| at.0.saturating_add(CLOCKS_AGREE_NS) < record.armed_ns) {
            ring.injections.pop_front();
        }
        let mut host = None;
        for _ in 0..=record.early_wakes {
            match ring.injections.pop_front() {
                Some(at) => host = Some(at),
                None => break,
            }
        }
        let host = host.or_else(|| check.handled_by_kvms_page(record));
        if let Some(at) = host {
            self.late_by_host.add(at.0.saturating_sub(record.expires_ns));
            if at.0.saturating_add(CLOCKS_AGREE_NS) < record.expires_ns {
                tally.early_by_host = tally.early_by_host.saturating_add(1);
            }
        }
        host
    }
}

#[cfg(test)]
mod tests;
