//! The machine's clock: TSC, VM time and the page's numbers, changed together.
//!
//! One base serves all vCPUs. A vCPU that wrote its TSC has an `adjust` (IA32_TSC_ADJUST): its TSC is the base TSC plus
//! `adjust`, modulo 2^64, and its page is the base page moved by the same amount.

mod change;
mod state;

use std::time::Duration;

use vlapic::Deadline;
use vmtime::{
    GuestTsc, HostTsc, Khz, Moment, Now, PageClock, ReferenceClock, Remainder, Scale, Timeline, TscAdjust, VmTime,
    rebase,
};

use super::{
    config::{TimeMode, source::TscSource},
    instant::{HostInstant, Wall, wall_at},
};
use crate::{
    devices::Instant,
    host::{clock::HostClock, reading::Reading},
};

pub use state::ClockState;

/// Virtual time: the Unix time of VM time 0, 2000-01-01 00:00:00 UTC, so that runs repeat.
pub(super) const VIRTUAL_EPOCH_NS: u64 = 946_684_800 * 1_000_000_000;
/// Virtual time: operations in a millisecond, so that one costs about a microsecond, as an exit does.
const OPERATIONS_PER_MS: u32 = 1000;

/// VM time between two renewals of the page.
const RENEWAL_NS: u64 = 100_000_000_000;

/// How many earlier reference clocks [`Clock::past_reference_time`] uses. The rings are read when a guest halts; until
/// then it can be stopped and started again a few times.
const PAST_REFERENCES: usize = 4;

/// The machine's clock.
#[derive(Clone, Debug)]
pub struct Clock {
    source: TscSource,
    mode: TimeMode,
    host: HostClock,
    /// The guest's TSC can be set to any value.
    tsc_settable: bool,
    /// Source `host` or `scaled`: the offset that KVM adds to a vCPU's TSC.
    vcpu_offset: u64,
    khz: Khz,
    timeline: Timeline,
    page: PageClock,
    /// How far VM time is ahead of the page's line.
    remainder: Remainder,
    reference: ReferenceClock,
    /// The reference clocks before the last restores, the newest first, each with the last TSC for which it is valid. A
    /// guest may report a tick after a restore that it handled before it.
    past_references: [Option<(ReferenceClock, GuestTsc)>; PAST_REFERENCES],
    /// Virtual time: operations so far.
    operations: u64,
    /// When the last operation was.
    last_operation: HostTsc,
}

impl Clock {
    /// A stopped clock at VM time 0.
    #[must_use]
    pub fn new(source: TscSource, mode: TimeMode, host: HostClock, khz: Khz) -> Self {
        let tsc = GuestTsc(0);
        let page = PageClock { tsc_timestamp: tsc, system_time: VmTime(0), scale: Scale::from_khz(khz) };
        Self {
            source,
            mode,
            host,
            tsc_settable: source == TscSource::Trapped,
            vcpu_offset: 0,
            khz,
            timeline: Timeline::Stopped { tsc },
            page,
            remainder: Remainder::ZERO,
            reference: ReferenceClock::start(VmTime(0), tsc, khz),
            past_references: [None; PAST_REFERENCES],
            operations: 0,
            last_operation: host.tsc(),
        }
    }

    /// Notes that KVM can set a guest's TSC by an offset, as a probe has shown.
    pub fn set_tsc_settable(&mut self) {
        self.tsc_settable = true;
    }

    /// Whether the guest's TSC can be set to any value: because the VMM emulates RDTSC, or by KVM's offset.
    #[must_use]
    pub fn tsc_is_settable(&self) -> bool {
        self.tsc_settable
    }

    /// The source of the values that the guest's RDTSC returns.
    #[must_use]
    pub fn source(&self) -> TscSource {
        self.source
    }

    /// How time passes.
    #[must_use]
    pub fn mode(&self) -> TimeMode {
        self.mode
    }

    /// The guest's TSC frequency.
    #[must_use]
    pub fn khz(&self) -> Khz {
        self.khz
    }

    /// The frequency of a guest that was to have `khz`. With source `host` it is exactly the host's, from which `khz`
    /// may differ within a tolerance.
    #[must_use]
    pub fn achievable_khz(&self, khz: Khz) -> Khz {
        if self.source == TscSource::Host { self.host.khz() } else { khz }
    }

    /// The page's numbers for a vCPU with this `adjust`.
    #[must_use]
    pub fn page(&self, adjust: TscAdjust) -> PageClock {
        PageClock { tsc_timestamp: adjust.from_base(self.page.tsc_timestamp), ..self.page }
    }

    /// The Unix time of VM time 0, in nanoseconds: real time now minus VM time now (Linux `msr.rst`,
    /// MSR_KVM_WALL_CLOCK_NEW). So it changes with everything that stops VM time and with every change of the host's
    /// wall clock. In virtual time it is a constant.
    #[must_use]
    pub fn wall_ns_at_zero(&self) -> u64 {
        match self.mode {
            TimeMode::Virtual => VIRTUAL_EPOCH_NS,
            TimeMode::Real => {
                let wall = Reading::of(self.host, self.host.os_clocks().real_ns);
                wall.ns.saturating_sub(self.page.vm_time(self.timeline.tsc(wall.tsc)).0)
            }
        }
    }

    /// What devices are told of the instant `now`. The wall clock is the host's, and in virtual time VM time's.
    #[must_use]
    pub fn instant(&self, now: Now) -> Instant {
        let wall_ns = match self.mode {
            TimeMode::Virtual => VIRTUAL_EPOCH_NS.saturating_add(now.vm.0),
            TimeMode::Real => (self.host.os_clocks().real_ns)(),
        };
        Instant { vm: now.vm, reference: self.reference_time(now.base), wall_ns }
    }

    /// The base TSC, now.
    #[must_use]
    pub fn tsc(&self) -> GuestTsc {
        self.tsc_at(self.host.tsc())
    }

    /// The base TSC when the host's is `host`.
    #[must_use]
    pub fn tsc_at(&self, host: HostTsc) -> GuestTsc {
        self.timeline.tsc(host)
    }

    /// Now, for a vCPU with this `adjust`.
    #[must_use]
    pub fn now(&self, adjust: TscAdjust) -> Now {
        self.now_at(self.host.tsc(), adjust)
    }

    /// As [`Self::now`], when the host's TSC was `host`.
    #[must_use]
    pub fn now_at(&self, host: HostTsc, adjust: TscAdjust) -> Now {
        let tsc = self.tsc_at(host);
        Now::new(tsc, self.page.vm_time(tsc)).ahead(adjust)
    }

    /// VM time at a base TSC, by the page.
    #[must_use]
    pub fn vm_time(&self, tsc: GuestTsc) -> VmTime {
        self.page.vm_time(tsc)
    }

    /// VM time at a base TSC, by the reference clock.
    #[must_use]
    pub fn reference_time(&self, tsc: GuestTsc) -> VmTime {
        self.reference.at(tsc)
    }

    /// VM time when the base TSC was `tsc`, by the reference clock that was valid then; none if that one is no longer
    /// kept.
    #[must_use]
    pub fn past_reference_time(&self, tsc: GuestTsc) -> Option<VmTime> {
        if tsc >= self.reference.begins() {
            return Some(self.reference.at(tsc));
        }
        let holds = |(reference, last): &&(ReferenceClock, GuestTsc)| (reference.begins()..=*last).contains(&tsc);
        self.past_references.iter().flatten().find(holds).map(|(reference, _)| reference.at(tsc))
    }

    /// The reference clock.
    #[must_use]
    pub fn reference(&self) -> &ReferenceClock {
        &self.reference
    }

    /// The least base TSC at which VM time is `at`.
    #[must_use]
    pub fn least_tsc(&self, at: VmTime) -> Option<GuestTsc> {
        self.page.least_tsc(at)
    }

    /// VM time at which `deadline` falls due: a TSC deadline by the reference clock.
    #[must_use]
    pub fn due_time(&self, deadline: Deadline) -> VmTime {
        match deadline {
            Deadline::Tsc(due) => self.reference_time(due),
            Deadline::Vm(at) => at,
        }
    }

    /// The base TSC at which `deadline` falls due, if it ever does.
    #[must_use]
    pub fn due(&self, deadline: Deadline) -> Option<GuestTsc> {
        match deadline {
            Deadline::Tsc(due) => Some(due),
            Deadline::Vm(at) => self.page.least_tsc(at),
        }
    }

    /// VM time at which the page is to be renewed.
    ///
    /// A guest computes with the delta from the page's base, and some conversions have a limited range: the one posted
    /// in 2016 caps the delta at 275 s. With an older page it would arm only deadlines that are in the past. KVM renews
    /// every 300 s (Linux `arch/x86/kvm/x86.c`, KVMCLOCK_SYNC_PERIOD), which is too late for this guest.
    #[must_use]
    pub fn renewal(&self) -> VmTime {
        VmTime(self.page.system_time.0.saturating_add(RENEWAL_NS))
    }

    /// Bases the page on an instant at most 4.3 s ago. No reading of the guest changes by that.
    pub fn renew(&mut self) {
        self.page = rebase::renewed(&self.page, self.tsc());
    }

    /// The host's clock.
    #[must_use]
    pub fn host(&self) -> HostClock {
        self.host
    }

    /// Real time: the host TSC at which the base TSC is `target`, if it ever is.
    #[must_use]
    pub fn host_at(&self, target: GuestTsc) -> Option<HostTsc> {
        self.timeline.host_at(target)
    }

    /// Real time: how long until the base TSC is `target`; zero if it is.
    #[must_use]
    pub fn until(&self, target: GuestTsc) -> Option<Duration> {
        let now = self.host.tsc();
        if self.timeline.tsc(now) >= target {
            return Some(Duration::ZERO);
        }
        self.timeline.host_at(target).map(|host| self.host.duration(now, host))
    }

    /// Real time: the host TSC, for a trace.
    #[must_use]
    pub fn host_tsc(&self) -> Option<HostTsc> {
        (self.mode == TimeMode::Real).then(|| self.host.tsc())
    }

    /// The host's TSC at the last operation, or when the clock was started or the guest last slept. It is another one
    /// after each of them.
    #[must_use]
    pub fn last_operation(&self) -> HostTsc {
        self.last_operation
    }

    /// Sets [`Self::last_operation`] to now: the guest was idle, which does not count as spinning.
    pub fn restart_spin_budget(&mut self) {
        self.last_operation = self.host.tsc();
    }

    /// Virtual time: operations so far; a guest that spins makes none.
    #[must_use]
    pub fn operations(&self) -> u64 {
        self.operations
    }

    /// Whether the guest's TSC counts with the host's, now.
    #[must_use]
    pub fn counts_with_host(&self) -> bool {
        matches!(self.timeline, Timeline::Running { .. })
    }

    /// Whether the clock is stopped.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        matches!(self.timeline, Timeline::Stopped { .. })
    }

    /// The instant that a clock shows which was stopped at `at`.
    pub(crate) fn moment(&self, at: HostInstant) -> Moment {
        let tsc = self.tsc();
        let Self { khz, page, remainder, .. } = *self;
        let vm = page.vm_time(tsc);
        let Wall { ns, tai_offset_s, error_ns } = match self.mode {
            TimeMode::Real => wall_at(self.host, at),
            // In virtual time the downtime is an input and is never measured.
            TimeMode::Virtual => Wall { ns: VIRTUAL_EPOCH_NS, tai_offset_s: None, error_ns: None },
        };
        Moment { tsc, vm, khz, page, remainder, wall_ns: ns, tai_offset_s, wall_error_ns: error_ns }
    }

    /// A TSC that counts with the host's: how far it is ahead, modulo 2^64.
    #[must_use]
    pub fn ahead_of_host(&self) -> u64 {
        match self.timeline {
            Timeline::Running { host, tsc, .. } => tsc.0.wrapping_sub(host.0),
            Timeline::Stopped { .. } | Timeline::Virtual { .. } => 0,
        }
    }

    /// Notes that KVM adds `offset` to the TSC of each vCPU.
    pub fn set_vcpu_offset(&mut self, offset: u64) {
        self.vcpu_offset = offset;
    }

    /// The offset that KVM is to add to the TSC of a vCPU with this `adjust`; none if the VMM emulates RDTSC, or if KVM
    /// has no offset.
    #[must_use]
    pub fn vcpu_offset(&self, adjust: TscAdjust) -> Option<u64> {
        (self.source != TscSource::Trapped && self.tsc_settable).then(|| self.vcpu_offset.wrapping_add(adjust.0))
    }
}
