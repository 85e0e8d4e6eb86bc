//! What the vCPUs of one machine share.

pub(crate) mod doorbell;
pub(crate) mod host_stop;
mod ram;
mod vcpu_shared;

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use guest_abi::{
    pvclock::{FLAG_TSC_STABLE, TIME_INFO_BYTES, TimeInfo},
    sites::Kind,
};
use kvm_pv::WallRegistration;
use vm_memory::{Bytes, GuestAddress};
use vmtime::{GuestTsc, HostTsc, Now, PageClock, Scale, TscAdjust, VmTime};

pub(crate) use ram::Ram;
pub(crate) use vcpu_shared::{Unwakeable, VcpuShared};

use self::{host_stop::Gap, vcpu_shared::rank};
use super::{
    audit::{ClockReading, Converts, Handled, TickAudit},
    clock::Clock,
    config::{LapicKind, user_syscall::UserSyscallProbe},
    cpu_index::CpuIndex,
    instant::HostInstant,
    lock::{Guard, Ranked},
    record::{
        assists::Assists,
        counters::Counters,
        trace::{Event, Trace},
    },
    stop::{At, End},
};
use crate::{boot::sites::Sites, devices::Devices, mem::ram::GuestRam, output::Outlet};

/// Clock, devices, RAM, trap sites, tick audit and trace.
///
/// A thread that holds a lock takes only locks of higher ranks. The number in a lock's type is its rank, so the order
/// is that of the fields below, down to `gap`, then a [`VcpuShared`]'s `inbox`, `route` and `unwakeable`, of one vCPU
/// at a time, then `warned_msrs`, the trace's output (11) and a doorbell's thread (12). Where two are held at once, and
/// why:
///
/// - `audit`, then `clock`: records are checked against a clock reading from after the ring's header was read. The
///   trace comes after both, so that ticks are in it in their order.
/// - `clock`, then `devices` or `inbox`: the next deadline depends on the clock, the 8254 and the messages at one
///   instant.
/// - `clock`, then `last_known_running` and `gap`: a gap stops the clock before any thread computes from it.
pub struct Shared {
    /// Compares the guest's records of its ticks with the host's.
    pub(crate) audit: Ranked<TickAudit, 1>,
    /// The machine's clock.
    pub(crate) clock: Ranked<Clock, 2>,
    /// Devices.
    pub(crate) devices: Ranked<Devices, 3>,
    /// The wall-clock registration.
    pub(crate) wall: Ranked<WallRegistration, 4>,
    /// Real time: an instant at which some vCPU ran.
    pub(crate) last_known_running: Ranked<HostInstant, 5>,
    /// A gap in which no vCPU ran, which ended the run: the machine is to be paused as of its beginning.
    pub(crate) gap: Ranked<Option<Gap>, 6>,
    /// One for each vCPU.
    pub(crate) vcpus: Vec<VcpuShared>,
    /// Unknown MSRs for which a warning was logged.
    pub(crate) warned_msrs: Ranked<BTreeSet<u32>, 10>,
    /// Guest RAM.
    pub(crate) memory: Arc<GuestRam>,
    /// Sites that are patched.
    pub(crate) sites: Sites,
    /// The trace.
    pub(crate) trace: Trace,
    /// Outputs whose reader may be slow: the vCPUs wait while one is full.
    pub(crate) outlets: Vec<Outlet>,
    /// Every vCPU's loop is to end at the next instruction boundary.
    pub(crate) stopping: AtomicBool,
    /// All vCPUs' TSCs are equal, so that their pages share one base.
    pub(crate) tsc_stable: AtomicBool,
    /// WRMSR IA32_TSC_DEADLINE outside a trap site has no effect: see [`super::config::EmulatedHost`].
    pub(crate) swallow_deadline: bool,
    /// Real time: how long a vCPU's thread may poll at a time.
    pub(crate) poll: Duration,
    /// Virtual time: how long a guest may run without an operation, in host time. Its VM time does not advance
    /// meanwhile.
    pub(crate) spin_limit: Option<Duration>,
    /// The pages that only the start needed were returned to the host.
    pub(crate) start_pages_released: AtomicBool,
    /// Whether the VMM or KVM emulates the local APICs, and with them kvmclock.
    pub(crate) lapic: LapicKind,
    /// What running costs.
    pub(crate) costs: Counters,
    /// Instructions that were performed because KVM cannot.
    pub(crate) assists: Assists,
    /// What this host's KVM does with SYSCALL in user mode.
    pub(crate) user_syscall: Arc<UserSyscallProbe>,
}

impl Shared {
    /// Locks the clock and reads the host's TSC, for an access or a step of a vCPU. If there was a gap in which no vCPU
    /// ran, the clock is first stopped where the gap began.
    pub(crate) fn read_clock(&self) -> (Guard<'_, Clock>, HostTsc) {
        let mut clock = self.clock.lock();
        let host = clock.host();
        let now = host.tsc();
        if clock.counts_with_host() {
            let known = *self.last_known_running.lock();
            let vcpus = self.vcpus.iter().map(|vcpu_shared| &vcpu_shared.last_run);
            if let Some(gap) = host_stop::gap(vcpus, host, known, now) {
                self.stop_for(gap, &mut clock);
            }
        }
        (clock, now)
    }

    /// Stops the clock where `gap` began.
    pub(crate) fn found_gap(&self, gap: Gap) {
        self.stop_for(gap, &mut self.clock.lock());
    }

    fn stop_for(&self, gap: Gap, clock: &mut Clock) {
        self.gap.lock().get_or_insert(gap);
        // KVM's kvmclock counts on meanwhile. It is read when all vCPUs have stopped.
        if self.lapic == LapicKind::User {
            clock.stop_at(gap.from.tsc);
        }
    }

    /// Whether an output is full, so that the vCPUs are to wait for its reader.
    pub(crate) fn waits_for_reader(&self) -> bool {
        self.outlets.iter().any(Outlet::is_full)
    }

    /// Whether the vCPUs are to stop because of a gap.
    pub(crate) fn has_gap(&self) -> bool {
        self.gap.lock().is_some()
    }

    /// Notes that the clock was started and no vCPU has run since.
    pub(crate) fn begin_to_run(&self) {
        let now = HostInstant::now(self.clock.lock().host());
        *self.last_known_running.lock() = now;
        for vcpu_shared in &self.vcpus {
            vcpu_shared.last_run.begin(now.tsc);
        }
    }

    /// Traces an event at `now`.
    pub(crate) fn event(&self, cpu: CpuIndex, now: Now, event: &Event<'_>) {
        if self.trace.is_on() {
            let host = self.clock.lock().host_tsc();
            self.trace.event(cpu, now, host, event);
        }
    }

    /// Reads what the guest wrote into its tick rings since the last call, and traces it.
    pub(crate) fn read_rings(&self) {
        let mut audit = self.audit.lock();
        if self.lapic == LapicKind::Kvm {
            audit.note_kvm_pages(self.vcpus.iter().filter_map(|vcpu| self.kvms_page(vcpu)).collect());
        }
        audit.read_rings(&self.memory, |ring| self.clock_reading(ring), |handled| self.trace_tick(handled));
    }

    /// The clocks now, against which the records of a ring are checked.
    fn clock_reading(&self, ring: usize) -> ClockReading {
        let clock = self.clock.lock().clone();
        // After a gap the VM's clocks are stopped where the gap began, until the machine is resumed.
        let has_gap = self.has_gap();
        let converts = match self.lapic {
            LapicKind::User => Converts::Reference(self.tsc_adjust_of(ring)),
            LapicKind::Kvm => Converts::Pages,
        };
        ClockReading { clock, has_gap, converts }
    }

    /// The page that KVM wrote for a vCPU; none if there is none, or if KVM writes it now.
    fn kvms_page(&self, vcpu_shared: &VcpuShared) -> Option<PageClock> {
        let address = vcpu_shared.page.load(Ordering::Relaxed);
        let read = || {
            let mut bytes = [0; TIME_INFO_BYTES];
            self.memory.read_slice(&mut bytes, GuestAddress(address)).ok().map(|()| bytes)
        };
        let bytes = read().filter(|bytes| address != 0 && read() == Some(*bytes))?;
        let page = TimeInfo::from_bytes(&bytes);
        let scale =
            Scale::new(page.tsc_to_system_mul, page.tsc_shift).ok().filter(|_| page.version.is_multiple_of(2))?;
        let (tsc_timestamp, system_time) = (GuestTsc(page.tsc_timestamp), VmTime(page.system_time));
        Some(PageClock { tsc_timestamp, system_time, scale })
    }

    fn trace_tick(&self, handled: &Handled) {
        let Handled { cpu: ring, record, host } = handled;
        let now = Now::new(GuestTsc(record.fired_tsc), VmTime(record.fired_ns));
        let tick = Event::Tick {
            seq: record.seq,
            expires_ns: record.expires_ns,
            fired_ns: record.fired_ns,
            host_ns: host.map(|host| host.0),
            early_wakes: record.early_wakes,
        };
        // The record has no number of the vCPU, only that of its ring.
        self.event(CpuIndex::at(*ring), now, &tick);
    }

    /// The shared part of vCPU `index`.
    pub(crate) fn vcpu(&self, index: CpuIndex) -> Option<&VcpuShared> {
        index.of(&self.vcpus)
    }

    /// The patched site at the linear address `address`; none if the guest has overwritten it with code of its own.
    pub(crate) fn site_at(&self, address: u64) -> Option<Kind> {
        self.sites.patched_at(address, &self.memory)
    }

    /// Notes that vCPU `index` may run. Called before it reads its messages.
    pub(crate) fn set_wakeable(&self, index: CpuIndex) {
        if let Some(vcpu_shared) = self.vcpu(index) {
            *vcpu_shared.unwakeable.lock() = None;
        }
    }

    /// Notes that only a message can wake vCPU `index`. If that holds for all vCPUs and no message is on its way, the
    /// guest has ended: no vCPU is left to send one. The last vCPU to note it sees the others' notes, so that the end
    /// is not missed.
    pub(crate) fn set_unwakeable(&self, index: CpuIndex, why: Unwakeable) -> Option<End> {
        let vcpu_shared = self.vcpu(index)?;
        *vcpu_shared.unwakeable.lock() = Some(why);
        let all: Option<Vec<Unwakeable>> =
            self.vcpus.iter().map(|vcpu_shared| *vcpu_shared.unwakeable.lock()).collect();
        let all = all.filter(|_| self.vcpus.iter().all(|vcpu_shared| vcpu_shared.inbox.lock().is_empty()))?;
        let halted = CpuIndex::all().zip(all).find_map(|(cpu, unwakeable)| match unwakeable {
            Unwakeable::Halted { address } => Some(End::HaltedForever(At { cpu, address })),
            Unwakeable::Parked => None,
        });
        Some(halted.unwrap_or(End::AllParked))
    }

    /// The number of vCPU `index`'s tick ring: guests number their CPUs in the order in which these start, and keep
    /// both rings and kvmclock pages in that order.
    pub(crate) fn ring_of(&self, index: CpuIndex) -> usize {
        rank(&self.vcpus, index)
    }

    /// IA32_TSC_ADJUST of the vCPU with tick ring number `ring`.
    pub(crate) fn tsc_adjust_of(&self, ring: usize) -> TscAdjust {
        let of = |(index, vcpu_shared): (CpuIndex, &VcpuShared)| {
            (self.ring_of(index) == ring).then(|| TscAdjust(vcpu_shared.tsc_adjust.load(Ordering::Relaxed)))
        };
        CpuIndex::all().zip(&self.vcpus).find_map(of).unwrap_or_default()
    }

    /// Makes every vCPU's loop end at the next instruction boundary.
    pub(crate) fn stop_all(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        for vcpu_shared in &self.vcpus {
            vcpu_shared.doorbell.ring();
        }
    }

    /// The flags of every vCPU's page.
    pub(crate) fn page_flags(&self) -> u8 {
        if self.tsc_stable.load(Ordering::SeqCst) { FLAG_TSC_STABLE } else { 0 }
    }

    /// Logs, once per MSR, that a guest touched one that is not there.
    pub(crate) fn unknown_msr(&self, index: u32, access: &str) {
        let mut warned_msrs = self.warned_msrs.lock();
        // A guest could try all four billion MSR numbers.
        if warned_msrs.len() < 64 && warned_msrs.insert(index) {
            log::warn!("the guest's {access} of MSR {index:#x}, which is not there, gets a #GP");
        }
    }
}
