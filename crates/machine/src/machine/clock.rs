//! The machine's clock: TSC, VM time and the page's numbers, changed together.
//!
//! One base serves all vCPUs. A vCPU that wrote its TSC has an `adjust` (IA32_TSC_ADJUST): its TSC is the base TSC plus
//! `adjust`, modulo 2^64, and its page is the base page moved by the same amount.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use vlapic::Deadline;
use vmtime::{
    AdjustError, Adjusted, DowntimePolicy, GuestTsc, HostTsc, Khz, Moment, Now, PageClock, ReferenceClock, Scale,
    Stood, Timeline, VmTime, adjust,
};

use super::config::{TimeMode, source::TscSource};
use crate::{
    host::clock::{HostClock, wall_ns},
    kvm::KvmClock,
};

/// Virtual time: the Unix time of VM time 0, 2000-01-01 00:00:00 UTC, so that runs repeat.
const VIRTUAL_EPOCH_NS: u64 = 946_684_800 * 1_000_000_000;
/// Virtual time: operations in a millisecond, so that one costs about a microsecond, as an exit does.
const OPERATIONS_PER_MS: u32 = 1000;

/// VM time between two renewals of the page.
const RENEWAL_NS: u64 = 100_000_000_000;

/// Stretches before the present one that [`Clock::account`] knows. The rings are read when a guest halts; in between it can be
/// stopped and started again a few times.
const STRETCHES_KEPT: usize = 4;

/// The machine's clock.
#[derive(Clone, Debug)]
pub struct Clock {
    source: TscSource,
    mode: TimeMode,
    host: HostClock,
    /// The guest's TSC can be given any value.
    tsc_moves: bool,
    /// Source `host` or `scaled`: the offset that KVM adds to a vCPU's TSC.
    vcpu_offset: u64,
    khz: Khz,
    timeline: Timeline,
    page: PageClock,
    reference: ReferenceClock,
    /// The judge's clock of the stretches before the last restores, the newest first, each with the last TSC that it holds
    /// for: a guest may report a tick after the restore that it handled before.
    before: [Option<(ReferenceClock, GuestTsc)>; STRETCHES_KEPT],
    /// Virtual time: operations so far.
    operations: u64,
    /// When the last operation was.
    last_operation: HostTsc,
}

/// The clock as a snapshot holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClockState {
    /// The instant of the save.
    pub moment: Moment,
    /// The judge's clock.
    #[serde(rename = "judge")]
    pub reference: ReferenceClock,
    /// Virtual time: operations so far.
    pub operations: u64,
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
            tsc_moves: source == TscSource::Trapped,
            vcpu_offset: 0,
            khz,
            timeline: Timeline::Stopped { tsc },
            page,
            reference: ReferenceClock::start(VmTime(0), tsc, khz),
            before: [None; STRETCHES_KEPT],
            operations: 0,
            last_operation: host.tsc(),
        }
    }

    /// A stopped clock as it was saved.
    #[must_use]
    pub fn from_state(source: TscSource, mode: TimeMode, host: HostClock, state: &ClockState) -> Self {
        let ClockState { moment, reference, operations } = *state;
        Self {
            source,
            mode,
            host,
            tsc_moves: source == TscSource::Trapped,
            vcpu_offset: 0,
            khz: moment.khz,
            timeline: Timeline::Stopped { tsc: moment.tsc },
            page: moment.page,
            reference,
            before: [None; STRETCHES_KEPT],
            operations,
            last_operation: host.tsc(),
        }
    }

    /// The clock for a snapshot; it should be stopped.
    #[must_use]
    pub fn state(&self) -> ClockState {
        // The host's clock and the source are the next host's business; the timeline is in the moment.
        let Self {
            source: _,
            mode: _,
            host: _,
            tsc_moves: _,
            vcpu_offset: _,
            khz: _,
            timeline: _,
            page: _,
            reference,
            before: _,
            operations,
            last_operation: _,
        } = self;
        ClockState { moment: self.moment(), reference: *reference, operations: *operations }
    }

    /// Says that KVM moves a guest's TSC by an offset, as a probe saw.
    pub fn with_tsc_offset(&mut self) {
        self.tsc_moves = true;
    }

    /// Whether the guest's TSC can be given any value: because the VMM answers, or by KVM's offset.
    #[must_use]
    pub fn tsc_moves(&self) -> bool {
        self.tsc_moves
    }

    /// Where RDTSC answers come from.
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

    /// The frequency that a guest gets which is to have `khz`: with source `host` the host's own, from which `khz` may
    /// differ by a tolerance but the counter does not.
    #[must_use]
    pub fn possible(&self, khz: Khz) -> Khz {
        if self.source == TscSource::Host { self.host.khz() } else { khz }
    }

    /// The page's numbers for a vCPU with this `adjust`.
    #[must_use]
    pub fn page(&self, adjust: u64) -> PageClock {
        PageClock { tsc_timestamp: GuestTsc(self.page.tsc_timestamp.0.wrapping_add(adjust)), ..self.page }
    }

    /// The Unix time of VM time 0, in nanoseconds: real time now minus VM time now (Linux `msr.rst`,
    /// MSR_KVM_WALL_CLOCK_NEW). So it changes with everything that stops VM time and with every change of the host's wall
    /// clock. Virtual time has no wall clock, and a constant instead.
    #[must_use]
    pub fn wall_ns_at_zero(&self) -> u64 {
        match self.mode {
            TimeMode::Virtual => VIRTUAL_EPOCH_NS,
            TimeMode::Real => {
                let before = self.host.tsc();
                let wall = wall_ns();
                // The wall clock was read half-way between the two, give or take some ten nanoseconds.
                let half = self.host.tsc().0.saturating_sub(before.0) / 2;
                let tsc = self.timeline.tsc(HostTsc(before.0.saturating_add(half)));
                wall.saturating_sub(self.page.vm_time(tsc).0)
            }
        }
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
    pub fn now(&self, adjust: u64) -> Now {
        self.now_at(self.host.tsc(), adjust)
    }

    /// As [`Self::now`], when the host's TSC was `host`.
    #[must_use]
    pub fn now_at(&self, host: HostTsc, adjust: u64) -> Now {
        let tsc = self.tsc_at(host);
        Now::new(tsc, self.page.vm_time(tsc)).ahead(adjust)
    }

    /// VM time at a base TSC, by the page.
    #[must_use]
    pub fn vm_time(&self, tsc: GuestTsc) -> VmTime {
        self.page.vm_time(tsc)
    }

    /// VM time at a base TSC, by the host's own account.
    #[must_use]
    pub fn judged(&self, tsc: GuestTsc) -> VmTime {
        self.reference.at(tsc)
    }

    /// VM time when the base TSC was `tsc`, by the host's own account; none for a TSC from before the stretches that are
    /// remembered.
    #[must_use]
    pub fn account(&self, tsc: GuestTsc) -> Option<VmTime> {
        if tsc >= self.reference.begins() {
            return Some(self.reference.at(tsc));
        }
        let holds = |(reference, last): &&(ReferenceClock, GuestTsc)| (reference.begins()..=*last).contains(&tsc);
        self.before.iter().flatten().find(holds).map(|(reference, _)| reference.at(tsc))
    }

    /// The host's own account.
    #[must_use]
    pub fn reference(&self) -> &ReferenceClock {
        &self.reference
    }

    /// The least base TSC at which VM time is `at`.
    #[must_use]
    pub fn least_tsc(&self, at: VmTime) -> Option<GuestTsc> {
        self.page.least_tsc(at)
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
    /// A guest computes with the delta from the page's base, and some conversions only reach so far: the one posted in
    /// 2016 caps the delta at 275 s, and would fire at once for ever on an older page. KVM renews every 300 s (Linux
    /// `arch/x86/kvm/x86.c`, KVMCLOCK_SYNC_PERIOD), which is too late for it.
    #[must_use]
    pub fn renewal(&self) -> VmTime {
        VmTime(self.page.system_time.0.saturating_add(RENEWAL_NS))
    }

    /// Bases the page on the present instant: VM time neither steps nor changes its rate. All vCPUs must stand still: two
    /// pages with different bases round differently.
    pub fn renew(&mut self) {
        let tsc = self.tsc();
        self.page = PageClock { tsc_timestamp: tsc, system_time: self.page.vm_time(tsc), scale: self.page.scale };
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

    /// Host time since the last operation, or since the clock was started or the guest last slept.
    #[must_use]
    pub fn since_operation(&self) -> Duration {
        self.host.duration(self.last_operation, self.host.tsc())
    }

    /// The guest had nothing to do for a while: that is no spinning.
    pub fn slept(&mut self) {
        self.last_operation = self.host.tsc();
    }

    /// One guest operation passes: in virtual time, time moves.
    pub fn spend_operation(&mut self) {
        if self.mode == TimeMode::Virtual {
            self.operations = self.operations.saturating_add(1);
            self.last_operation = self.host.tsc();
            self.timeline.spend(u64::from((self.khz.get() / OPERATIONS_PER_MS).max(1)));
        }
    }

    /// Virtual time: operations so far; a guest that spins makes none.
    #[must_use]
    pub fn operations(&self) -> u64 {
        self.operations
    }

    /// Virtual time: goes on at `target`, never back.
    pub fn jump_to(&mut self, target: GuestTsc) {
        self.timeline.jump_to(target);
    }

    /// Stops; VM time and TSC then stand still.
    pub fn stop(&mut self) {
        self.stop_at(self.host.tsc());
    }

    /// Stops, as of the host TSC `host`: VM time and TSC are what they were then.
    pub fn stop_at(&mut self, host: HostTsc) {
        self.timeline.stop(host);
    }

    /// Whether the guest's TSC counts with the host's, now.
    #[must_use]
    pub fn counts_with_host(&self) -> bool {
        matches!(self.timeline, Timeline::Running { .. })
    }

    /// Whether the clock stands still.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        matches!(self.timeline, Timeline::Stopped { .. })
    }

    /// The instant that a stopped clock shows.
    #[must_use]
    pub fn moment(&self) -> Moment {
        let tsc = self.tsc();
        Moment { tsc, vm: self.page.vm_time(tsc), khz: self.khz, page: self.page, wall_ns: self.wall_now() }
    }

    fn wall_now(&self) -> u64 {
        match self.mode {
            TimeMode::Real => wall_ns(),
            // Downtime is an input there, never measured.
            TimeMode::Virtual => VIRTUAL_EPOCH_NS,
        }
    }

    /// Starts a stopped clock again at frequency `khz`, after it `stood` still: rebases page, TSC and judge.
    ///
    /// `hold`: the TSC goes on from its value, if it can be moved; false for one that is what the source gives.
    ///
    /// # Errors
    /// [`AdjustError`] if a clock would leave its range.
    pub fn start(
        &mut self,
        saved: &Moment,
        khz: Khz,
        policy: DowntimePolicy,
        stood: Stood,
        hold: bool,
    ) -> Result<Adjusted, AdjustError> {
        let host = self.host.tsc();
        let held = match self.source {
            TscSource::Trapped => None,
            TscSource::Host | TscSource::Scaled if self.tsc_moves && hold => None,
            TscSource::Host => Some(GuestTsc(host.0)),
            TscSource::Scaled => Some(self.timeline.tsc(host)),
        };
        let adjusted = adjust::restore(saved, khz, policy, stood, held)?;
        self.before.rotate_right(1);
        self.before[0] = Some((self.reference, saved.tsc));
        self.reference.rebase(saved.tsc, adjusted.downtime_ns, adjusted.tsc, khz);
        self.khz = khz;
        self.last_operation = host;
        self.page = adjusted.page;
        self.timeline = match self.mode {
            TimeMode::Virtual => Timeline::Virtual { tsc: adjusted.tsc, khz },
            TimeMode::Real => Timeline::Running { host, tsc: adjusted.tsc, host_khz: self.host.khz(), khz },
        };
        Ok(adjusted)
    }

    /// A restore goes wrong: the TSC goes on `ticks` further, and the page does not know. The judge does. Gives the TSC.
    pub fn bend(&mut self, ticks: u64) -> GuestTsc {
        let tsc = self.tsc();
        let bent = GuestTsc(tsc.0.saturating_add(ticks));
        self.reference.rebase(tsc, 0, bent, self.khz);
        self.timeline = match self.timeline {
            Timeline::Stopped { .. } => Timeline::Stopped { tsc: bent },
            Timeline::Virtual { khz, .. } => Timeline::Virtual { tsc: bent, khz },
            Timeline::Running { host, tsc, host_khz, khz } => {
                Timeline::Running { host, tsc: GuestTsc(tsc.0.saturating_add(ticks)), host_khz, khz }
            }
        };
        bent
    }

    /// The clock is KVM's: the page goes on from what KVM's clock showed. Its rate is that of the page that KVM publishes;
    /// the two differ by their roundings.
    pub fn follow(&mut self, kvm: KvmClock) {
        let tsc = self.timeline.tsc(kvm.host);
        self.page = PageClock { tsc_timestamp: tsc, system_time: kvm.vm, scale: Scale::from_khz(self.khz) };
    }

    /// As [`Self::stop`], at the instant of `kvm`.
    pub fn stop_with(&mut self, kvm: KvmClock) {
        self.follow(kvm);
        self.timeline = Timeline::Stopped { tsc: self.page.tsc_timestamp };
    }

    /// A TSC that counts with the host's: how far it is ahead, modulo 2^64.
    #[must_use]
    pub fn ahead_of_host(&self) -> u64 {
        match self.timeline {
            Timeline::Running { host, tsc, .. } => tsc.0.wrapping_sub(host.0),
            Timeline::Stopped { .. } | Timeline::Virtual { .. } => 0,
        }
    }

    /// KVM adds `offset` to the TSC of each vCPU.
    pub fn set_vcpu_offset(&mut self, offset: u64) {
        self.vcpu_offset = offset;
    }

    /// What KVM is to add to the TSC of a vCPU with this `adjust`; none if the VMM answers, or KVM adds nothing.
    #[must_use]
    pub fn vcpu_offset(&self, adjust: u64) -> Option<u64> {
        (self.source != TscSource::Trapped && self.tsc_moves).then(|| self.vcpu_offset.wrapping_add(adjust))
    }

    /// Source `scaled`: what a vCPU's TSC was measured to be at `host`.
    pub fn measured(&mut self, host: HostTsc, tsc: GuestTsc, khz: Khz) {
        self.timeline = Timeline::Running { host, tsc, host_khz: self.host.khz(), khz };
    }
}
