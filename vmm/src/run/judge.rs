//! Every tick, judged twice.
//!
//! The guest says in its ring (see [`guest_abi::report`]) when a tick was to fire and when it did, by its kvmclock. The
//! host knows when it injected the interrupt, by its own exact account of VM time, which uses neither the page nor its
//! rounding. An error in one of them shows against the other. The ring is in guest RAM: not a byte of it is trusted.

use std::collections::VecDeque;

use guest_abi::report::{CAPACITY, HEADER_BYTES, Header, LAYOUT, MAGIC, MAX_CPUS, RECORD_BYTES, RING_BYTES, Record};
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};

use super::{Platform, platform::lock, trace::Event};
use crate::{
    boot::GuestRam,
    time::{GuestTsc, Now, VmTime},
};

/// Injections remembered that no record has claimed yet; a guest that writes no records makes us remember no more.
const MAX_UNCLAIMED: usize = 4096;
/// How much sooner than its expiry the host may have injected a tick before the two accounts disagree: the page rounds
/// each reading down by up to 2 ns and drifts by up to 1 ppb; a microsecond is a thousand seconds of that.
const ACCOUNTS_AGREE_NS: u64 = 1000;

/// What a guest's ticks came to.
#[derive(Debug)]
pub struct Judge {
    /// Guest physical address of CPU 0's ring; the others follow.
    ring: Option<u64>,
    /// Each CPU's ring, by CPU number.
    rings: Vec<Ring>,
    /// Intervals armed before this VM time say nothing about the present TSC frequency.
    since: VmTime,
    tally: Tally,
    late_by_guest: Histogram<u64>,
    late_by_host: Histogram<u64>,
    /// Each tick as it was read, for who wants them one by one.
    log: Option<Vec<Handled>>,
}

/// A tick that the guest handled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Handled {
    /// The CPU whose ring it was in.
    pub cpu: usize,
    /// What the guest says.
    pub record: Record,
    /// When the host injected its last interrupt.
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
    /// As last read.
    header: Header,
}

/// Plain counts.
#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    ticks: u64,
    missing: u64,
    overrun: u64,
    early_wakes: u64,
    early_by_host: u64,
    intervals: Intervals,
}

/// How long armed intervals lasted, as a fraction of what was asked.
#[derive(Clone, Copy, Debug, Default)]
struct Intervals {
    count: u64,
    asked_ns: u128,
    lasted_ns: u128,
}

/// The judge as a snapshot holds it: what is needed to go on reading, not what was counted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JudgeState {
    /// Guest physical address of CPU 0's ring.
    pub ring: Option<u64>,
    /// Each CPU's.
    pub rings: Vec<RingState>,
}

/// One CPU's ring as a snapshot holds it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RingState {
    /// Records read so far.
    pub read: u64,
    /// Sequence number of the next tick.
    pub next_seq: Option<u64>,
    /// Injections not yet claimed by a record.
    pub injections: Vec<VmTime>,
}

/// What to tell people and machines. Times are nanoseconds of VM time.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Summary {
    /// Ticks handled.
    pub ticks: u64,
    /// Ticks the scenario was to make in all, on all CPUs; 0 = without end.
    pub expected: u64,
    /// Ticks since boot, by the numbers that the guest gives them.
    pub next_seq: u64,
    /// Gaps in the ticks' numbers.
    pub missing: u64,
    /// Records overwritten before they were read; they count as ticks of unknown lateness.
    pub unread: u64,
    /// Interrupts that came before their tick's expiry.
    pub early_wakes: u64,
    /// Ticks that the host injected before their expiry by its own account, although the guest took them as due.
    pub early_by_host: u64,
    /// Lateness as the guest saw it.
    pub late_by_guest: Lateness,
    /// Lateness of the injection as the host saw it; none if the host injected nothing, as where the LAPIC is KVM's.
    pub late_by_host: Option<Lateness>,
    /// How long armed intervals lasted as a fraction of what was asked, since the last restore; none if none was armed.
    pub interval_ratio: Option<f64>,
    /// kvmclock readings smaller than the one before.
    pub clock_steps_back: u64,
    /// The worst of them.
    pub worst_step_back_ns: u64,
    /// How often the guest found GUEST_STOPPED.
    pub guest_stopped_seen: u64,
    /// Interrupts that the guest's CPUs sent each other.
    pub ipis_sent: u64,
    /// Those that arrived.
    pub ipis_received: u64,
}

/// A distribution of lateness, in nanoseconds of VM time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lateness {
    /// Half of the ticks were at most this late.
    pub p50_ns: u64,
    /// 99 of 100 were.
    pub p99_ns: u64,
    /// The worst.
    pub worst_ns: u64,
}

impl Lateness {
    fn of(histogram: &Histogram<u64>) -> Self {
        Self {
            p50_ns: histogram.value_at_quantile(0.5),
            p99_ns: histogram.value_at_quantile(0.99),
            worst_ns: histogram.max(),
        }
    }
}

/// Three significant digits; memory grows with the logarithm of the largest value only.
#[allow(clippy::expect_used, reason = "3 is a constant within the crate's documented range of 0 to 5")]
fn histogram() -> Histogram<u64> {
    Histogram::new(3).expect("three significant digits")
}

fn record_into(histogram: &mut Histogram<u64>, ns: u64) {
    // The histogram grows as it must, to some hundred kilobytes for the largest u64; it cannot refuse a value.
    let _ = histogram.record(ns);
}

impl Judge {
    /// A judge of the rings at `ring`, one for each of `cpus`.
    #[must_use]
    pub fn new(ring: Option<u64>, cpus: usize) -> Self {
        Self::from_state(&JudgeState { ring, rings: Vec::new() }, cpus, VmTime(0))
    }

    /// A judge that goes on reading where a saved one stopped; `since` is VM time at the restore.
    #[must_use]
    pub fn from_state(state: &JudgeState, cpus: usize, since: VmTime) -> Self {
        let JudgeState { ring, rings } = state;
        Self {
            ring: *ring,
            rings: saved_rings(rings, cpus),
            since,
            tally: Tally::default(),
            late_by_guest: histogram(),
            late_by_host: histogram(),
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

    /// Goes on reading where `state` stopped. What was counted since stays counted.
    pub fn go_back(&mut self, state: &JudgeState) {
        self.rings = saved_rings(&state.rings, self.rings.len());
        drop(self.take_log());
    }

    /// The header of `cpu`'s ring as it stands in `memory`; none if there is no ring.
    #[must_use]
    pub fn header(&self, memory: &GuestRam, cpu: usize) -> Option<Header> {
        read_header(memory, ring_address(self.ring?, cpu)?)
    }

    /// What a snapshot needs.
    #[must_use]
    pub fn state(&self) -> JudgeState {
        // What was counted stays with the process that counted it, and headers are in RAM.
        let Self { ring, rings, since: _, tally: _, late_by_guest: _, late_by_host: _, log: _ } = self;
        let state = |Ring { read, next_seq, injections, header: _ }: &Ring| RingState {
            read: *read,
            next_seq: *next_seq,
            injections: injections.iter().copied().collect(),
        };
        JudgeState { ring: *ring, rings: rings.iter().map(state).collect() }
    }

    /// The TSC frequency changed at this VM time: intervals armed earlier no longer count.
    pub fn restored(&mut self, at: VmTime) {
        self.since = at;
        self.tally.intervals = Intervals::default();
    }

    /// The host injected the timer interrupt of the CPU whose ring is number `cpu` ([`Platform::ring_of`]) at this VM time, by its own account.
    pub fn injected(&mut self, cpu: u32, at: VmTime) {
        let Some(ring) = usize::try_from(cpu).ok().and_then(|cpu| self.rings.get_mut(cpu)) else { return };
        if ring.injections.len() == MAX_UNCLAIMED {
            ring.injections.pop_front();
        }
        ring.injections.push_back(at);
    }

    /// Reads what the guest wrote since the last call.
    pub fn read_rings(&mut self, platform: &Platform) {
        for cpu in 0..self.rings.len() {
            self.read_ring(platform, cpu);
        }
    }

    fn read_ring(&mut self, platform: &Platform, cpu: usize) {
        let memory = &platform.memory;
        let Some(address) = self.ring.and_then(|first| ring_address(first, cpu)) else { return };
        let Some(header) = read_header(memory, address) else { return };
        let Some(ring) = self.rings.get_mut(cpu) else { return };
        ring.header = header;
        // A count that went back is not a ring's; reading goes on when it has caught up.
        let Some(new) = header.written.checked_sub(ring.read).filter(|new| *new != 0) else { return };
        let unread = new.saturating_sub(u64::from(CAPACITY));
        self.tally.overrun = self.tally.overrun.saturating_add(unread);
        let first = ring.read.saturating_add(unread);
        ring.read = header.written;
        for number in first..header.written {
            let Some(record) = read_record(memory, address, number) else { continue };
            let host = self.record(cpu, &record);
            if let Some(log) = &mut self.log {
                log.push(Handled { cpu, record, host });
            }
            let now = Now::new(GuestTsc(record.fired_tsc), VmTime(record.fired_ns));
            platform.event(
                u32::try_from(cpu).unwrap_or(u32::MAX),
                now,
                &Event::Tick {
                    seq: record.seq,
                    expires_ns: record.expires_ns,
                    fired_ns: record.fired_ns,
                    host_ns: host.map(|host| host.0),
                    early_wakes: record.early_wakes,
                },
            );
        }
    }

    /// Counts one tick of `cpu`; gives when the host injected its last interrupt.
    fn record(&mut self, cpu: usize, record: &Record) -> Option<VmTime> {
        let ring = self.rings.get_mut(cpu)?;
        let tally = &mut self.tally;
        tally.ticks = tally.ticks.saturating_add(1);
        let expected = ring.next_seq.unwrap_or(record.seq);
        tally.missing = tally.missing.saturating_add(record.seq.saturating_sub(expected));
        ring.next_seq = Some(record.seq.saturating_add(1));
        tally.early_wakes = tally.early_wakes.saturating_add(u64::from(record.early_wakes));
        // A tick armed after its expiry could not have come sooner.
        let due_ns = record.expires_ns.max(record.armed_ns);
        record_into(&mut self.late_by_guest, record.fired_ns.saturating_sub(due_ns));

        let asked = record.expires_ns.saturating_sub(record.armed_ns);
        if record.armed_ns >= self.since.0 && asked != 0 {
            let intervals = &mut tally.intervals;
            intervals.count += 1;
            intervals.asked_ns += u128::from(asked);
            intervals.lasted_ns += u128::from(record.first_wake_ns.saturating_sub(record.armed_ns));
        }

        // Interrupts from before it was armed are nobody's: those of timers that the guest only wakes itself with.
        while ring.injections.front().is_some_and(|at| at.0.saturating_add(ACCOUNTS_AGREE_NS) < record.armed_ns) {
            ring.injections.pop_front();
        }
        let mut host = None;
        for _ in 0..=record.early_wakes {
            match ring.injections.pop_front() {
                Some(at) => host = Some(at),
                None => break,
            }
        }
        if let Some(at) = host {
            record_into(&mut self.late_by_host, at.0.saturating_sub(due_ns));
            if at.0.saturating_add(ACCOUNTS_AGREE_NS) < record.expires_ns {
                tally.early_by_host = tally.early_by_host.saturating_add(1);
            }
        }
        host
    }

    /// The counts so far.
    #[must_use]
    pub fn summary(&self) -> Summary {
        let Tally { ticks, missing, overrun, early_wakes, early_by_host, intervals } = self.tally;
        let sum = |of: fn(&Header) -> u64| self.rings.iter().map(|r| of(&r.header)).fold(0, u64::saturating_add);
        Summary {
            ticks: ticks.saturating_add(overrun),
            expected: sum(|header| header.expected),
            next_seq: self.rings.iter().filter_map(|ring| ring.next_seq).fold(0, u64::saturating_add),
            missing: missing.saturating_sub(overrun),
            unread: overrun,
            early_wakes,
            early_by_host,
            late_by_guest: Lateness::of(&self.late_by_guest),
            late_by_host: (!self.late_by_host.is_empty()).then(|| Lateness::of(&self.late_by_host)),
            interval_ratio: (intervals.count != 0).then(|| ratio(intervals.lasted_ns, intervals.asked_ns)),
            clock_steps_back: sum(|header| header.clock_steps_back),
            worst_step_back_ns: self.rings.iter().map(|ring| ring.header.worst_step_back_ns).max().unwrap_or(0),
            guest_stopped_seen: sum(|header| header.guest_stopped_seen),
            ipis_sent: sum(|header| header.ipis_sent),
            ipis_received: sum(|header| header.ipis_received),
        }
    }
}

impl Summary {
    /// Ticks that never came: gaps, and those still missing when the scenario ended.
    #[must_use]
    pub fn lost(&self, ended: bool) -> u64 {
        let not_made = if ended && self.expected != 0 { self.expected.saturating_sub(self.next_seq) } else { 0 };
        self.missing.saturating_add(not_made)
    }
}

#[allow(clippy::cast_precision_loss, reason = "a ratio for people, to three digits")]
fn ratio(a: u128, b: u128) -> f64 {
    a as f64 / b as f64
}

fn saved_rings(rings: &[RingState], cpus: usize) -> Vec<Ring> {
    let saved = rings.iter().map(|RingState { read, next_seq, injections }| Ring {
        read: *read,
        next_seq: *next_seq,
        injections: injections.iter().take(MAX_UNCLAIMED).copied().collect(),
        header: Header::default(),
    });
    saved.chain(std::iter::repeat_with(Ring::default)).take(cpus.min(MAX_CPUS)).collect()
}

fn ring_address(first: u64, cpu: usize) -> Option<u64> {
    first.checked_add(u64::try_from(RING_BYTES.checked_mul(cpu)?).ok()?)
}

fn read_header(memory: &GuestRam, ring: u64) -> Option<Header> {
    let mut bytes = [0; HEADER_BYTES];
    memory.read_slice(&mut bytes, GuestAddress(ring)).ok()?;
    let header = Header::from_bytes(&bytes);
    (header.magic == MAGIC && header.layout == LAYOUT && header.capacity == CAPACITY).then_some(header)
}

fn read_record(memory: &GuestRam, ring: u64, number: u64) -> Option<Record> {
    let slot = number % u64::from(CAPACITY);
    let record_bytes = u64::try_from(RECORD_BYTES).ok()?;
    let offset = u64::try_from(HEADER_BYTES).ok()?.checked_add(slot.checked_mul(record_bytes)?)?;
    let mut bytes = [0; RECORD_BYTES];
    memory.read_slice(&mut bytes, GuestAddress(ring.checked_add(offset)?)).ok()?;
    Some(Record::from_bytes(&bytes))
}

/// Reads the ring of a machine that stands still, and sums up.
pub fn sum_up(platform: &Platform) -> Summary {
    let mut judge = lock(&platform.judge);
    judge.read_rings(platform);
    judge.summary()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interrupt_from_before_it_was_armed_is_no_ticks() {
        let mut judge = Judge::new(None, 1);
        for at in [5_000, 30_000, 50_000] {
            judge.injected(0, VmTime(at));
        }
        let tick = |seq, armed_ns, expires_ns| Record { seq, armed_ns, expires_ns, ..Record::default() };
        assert_eq!(judge.record(0, &tick(0, 10_000, 29_000)), Some(VmTime(30_000)));
        assert_eq!(judge.record(0, &tick(1, 31_000, 49_000)), Some(VmTime(50_000)));
        assert_eq!(judge.summary().early_by_host, 0);
    }

    #[test]
    fn an_interrupt_between_arming_and_expiry_is_early() {
        let mut judge = Judge::new(None, 1);
        judge.injected(0, VmTime(20_000));
        judge.record(0, &Record { armed_ns: 10_000, expires_ns: 29_000, ..Record::default() });
        assert_eq!(judge.summary().early_by_host, 1);
    }
}
