//! Pause, resume, and migration within the process.
//!
//! A resume, a restore and an in-process migration are one operation ([`Machine::resume`]) on a paused machine: the clock
//! starts again from the saved moment at a frequency, policies decide about downtime and the deadline in flight, and the
//! page is published once with all of it. A real host does this in an order (LAPIC, TSC, deadline, page, GUEST_STOPPED);
//! see the comments in `resume` for what depends on what.

use std::{sync::atomic::Ordering, time::Duration};

use serde::Serialize;
use vlapic::Armed;
use vmtime::{Adjusted, DeadlinePolicy, DowntimePolicy, GuestTsc, HostTsc, Khz, Moment, Now, Stood, VmTime, adjust};

use super::{
    build::{Machine, Onward, Outputs},
    config::{
        HostEnvironment, TimeMode,
        first_vm_probe::FirstVmProbe,
        source::{self, Guest, SourceChoice, TscSource},
    },
    error::RunError,
    kvm_lapic::{self, Thaw},
    paused::{BootTime, Paused},
    policy::fault::InjectedFault,
    record::trace::Event,
    shared::{Ram, Shared, lock},
    vcpu::{Cpu, Local, ipi, tsc},
    wake::host_stop::Gap,
};

/// How a paused machine goes on.
#[derive(Clone, Copy, Debug, Default)]
pub struct Policies {
    /// The guest's TSC frequency from now on; none = as before.
    pub khz: Option<Khz>,
    /// What becomes of a deadline in flight.
    pub deadline: DeadlinePolicy,
    /// Whether VM time counts the time it stood still.
    pub downtime: DowntimePolicy,
    /// How long that was, instead of measuring it by wall time.
    pub downtime_length: Option<Duration>,
    /// What goes wrong, on purpose.
    pub fault: Option<InjectedFault>,
}

/// What a resume did to the clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Migration {
    /// TSC frequency before.
    pub from_khz: Khz,
    /// TSC frequency after.
    pub to_khz: Khz,
    /// VM time at which it stood still.
    pub vm_ns: VmTime,
    /// How far VM time advanced meanwhile, in nanoseconds.
    pub downtime_ns: u64,
    /// The wall clock had gone back; the downtime was taken as zero.
    pub clamped: bool,
}

/// A migration may change the frequency by at most this factor, either way.
const MAX_RATIO: u64 = 10;

impl Machine {
    /// Stops TSC and VM time. A machine that stands still stays as it is.
    ///
    /// # Errors
    /// If a message on its way cannot be delivered.
    pub fn pause(&mut self) -> Result<(), RunError> {
        if self.paused.is_some() {
            return Ok(());
        }
        self.stand_still(BootTime::now(), None)
    }

    /// There was a gap in which no vCPU ran: the machine stands still since it began. Gives its length, up to now.
    ///
    /// # Errors
    /// As [`Self::pause`], or if the TSC cannot be continued.
    pub(crate) fn stopped_by_host(&mut self, gap: Gap) -> Result<Duration, RunError> {
        let Gap { from, tsc_restarted } = gap;
        if tsc_restarted && lock(&self.shared.clock).source() != TscSource::Trapped {
            return Err(RunError::HostLacks(
                "the host's TSC began anew while the VM ran (has the host slept?), and the guest's with it; use --tsc trapped \
                 with a guest that has trap sites"
                    .to_owned(),
            ));
        }
        let length = from.boot.elapsed();
        self.stand_still(from.boot, Some(from.tsc))?;
        if let Some(Paused { moment, .. }) = &self.paused {
            let now = Now::new(moment.tsc, moment.vm);
            let gap_ns = u64::try_from(length.as_nanos()).unwrap_or(u64::MAX);
            self.shared.event(0, now, &Event::HostStop { gap_ns });
        }
        Ok(length)
    }

    /// Stops TSC and VM time at the instant `at`; `since`: no vCPU has run since this host TSC.
    fn stand_still(&mut self, at: BootTime, since: Option<HostTsc>) -> Result<(), RunError> {
        // What was sent has arrived: messages are in no snapshot.
        for cpu in &mut self.cpus {
            ipi::receive(cpu, &self.shared)?;
        }
        let mut clock = lock(&self.shared.clock);
        match &mut self.in_kernel {
            Some(cpus) => kvm_lapic::freeze(cpus, &self.vm, &mut clock, since)?,
            None => clock.stop(),
        }
        let moment = clock.moment();
        for Cpu { local, .. } in &mut self.cpus {
            // What fell due before the stop is an interrupt, not a deadline in flight.
            let now = clock.now(local.tsc_adjust);
            local.advance(&clock, now);
        }
        drop(clock);
        self.paused = Some(Paused::here(moment, at));
        for Cpu { local, .. } in &self.cpus {
            self.trace_save(local.index, &moment, local.pvclock.state().version, armed(local));
        }
        for cpu in self.in_kernel.iter().flatten() {
            let armed = cpu.frozen()?.armed;
            self.trace_save(cpu.index, &moment, cpu.page_version(&self.shared), some(armed));
        }
        Ok(())
    }

    fn trace_save(&self, cpu: u32, moment: &Moment, page_version: u32, armed: Option<Armed>) {
        let event = Event::Save { tsc_khz: moment.khz, page: moment.page, page_version, armed };
        self.shared.event(cpu, Now::new(moment.tsc, moment.vm), &event);
    }

    /// Starts a paused machine again.
    ///
    /// # Errors
    /// If the frequency is out of range, or a clock would leave its range.
    pub fn resume(&mut self, policies: &Policies) -> Result<Option<Migration>, RunError> {
        let Some(paused) = self.paused else { return Ok(None) };
        let moment = paused.moment;
        // Before its first instruction a machine was neither saved nor down.
        let boot = Policies::default();
        let policies = if self.has_run { policies } else { &boot };
        let mut clock = lock(&self.shared.clock);
        let khz = clock.possible(policies.khz.unwrap_or(moment.khz));
        check_ratio(moment.khz, khz)?;
        let ours = self.cpus.iter().map(|Cpu { vcpu, local }| (vcpu, local.tsc_adjust));
        let kvms = self.in_kernel.iter().flatten().map(|cpu| (&cpu.vcpu, cpu.tsc_adjust()));
        let vcpus: Vec<_> = ours.chain(kvms).collect();
        // Before its first start a TSC may be any; the host's is then the host's own, and what KVM scales is set to the clock's.
        let hold = clock.tsc_moves() && (self.has_run || clock.source() == TscSource::Scaled);
        if !hold {
            tsc::prepare(&vcpus, &mut clock, khz)?;
        }
        let host_stop = policies.fault.and_then(InjectedFault::host_stop);
        // To a guest that nobody stops, its clocks go on as at a catch-up.
        let downtime = if host_stop.is_some() { DowntimePolicy::CatchUp } else { policies.downtime };
        let stood = match (host_stop.or(policies.downtime_length), clock.mode()) {
            (Some(length), _) => Stood::For(length),
            (None, TimeMode::Real) => paused.stood(),
            // Virtual time measures nothing.
            (None, TimeMode::Virtual) => Stood::For(Duration::ZERO),
        };
        let mut adjusted = clock.start(&moment, khz, downtime, stood, hold)?;
        if hold {
            tsc::set(&vcpus, &mut clock, &adjusted, khz)?;
        }
        if self.in_kernel.is_some() {
            adjusted = kvm_lapic::start_clock(&self.vm, &mut clock, &adjusted)?;
        }
        if let Some(jump) = policies.fault.map(|fault| fault.tsc_jump(khz)).filter(|jump| *jump != 0) {
            adjusted.tsc = clock.bend(jump);
        }
        drop(clock);
        self.shared.begin_to_run();
        if adjusted.clamped {
            log::warn!("the wall clock went back while the VM was saved: the downtime counts as zero");
        }
        self.paused = None;
        let first_start = !self.has_run;
        self.has_run = true;
        if first_start {
            for Cpu { local, .. } in &self.cpus {
                ipi::publish_route(&self.shared, local);
            }
            self.trace_boot(&adjusted, khz);
            return Ok(None);
        }
        lock(&self.shared.audit).restored(adjusted.vm);
        for index in 0..self.cpus.len() {
            self.resume_cpu(index, policies, &moment, &adjusted)?;
        }
        let thaw = Thaw { vm: &self.vm, policies, moment: &moment, adjusted: &adjusted };
        for cpu in self.in_kernel.iter_mut().flatten() {
            let page_version = cpu.page_version(&self.shared);
            let armed = some(thaw.cpu(cpu)?);
            trace_restore(&self.shared, cpu.index, policies, &adjusted, khz, page_version, armed);
        }
        Ok(Some(Migration {
            from_khz: moment.khz,
            to_khz: khz,
            vm_ns: moment.vm,
            downtime_ns: adjusted.downtime_ns,
            clamped: adjusted.clamped,
        }))
    }

    fn resume_cpu(
        &mut self,
        index: usize,
        policies: &Policies,
        moment: &Moment,
        adjusted: &Adjusted,
    ) -> Result<(), RunError> {
        let Some(Cpu { local, .. }) = self.cpus.get_mut(index) else { return Ok(()) };
        let now = Now::new(adjusted.tsc, adjusted.vm).ahead(local.tsc_adjust);
        // LAPIC registers are in place already: writing a deadline before LVTT selects deadline mode would drop it.
        let mut armed_now = rearm(local.apic.armed(), local.tsc_adjust, policies.deadline, moment, adjusted);
        if let Some(fault) = policies.fault {
            armed_now = fault.armed(armed_now, local.apic.in_deadline_mode(), now);
        }
        local.apic.rearm(armed_now, now).map_err(|error| RunError::BadState(error.to_string()))?;
        ipi::publish_route(&self.shared, local);
        if let Some(vcpu_shared) = self.shared.vcpus.get(index) {
            vcpu_shared.page.store(local.pvclock.address().unwrap_or(0), Ordering::Relaxed);
            vcpu_shared.tsc_adjust.store(local.tsc_adjust, Ordering::Relaxed);
        }
        // The page last: from here on the guest computes with the new numbers. GUEST_STOPPED goes with it, at resume and
        // not at save, so that a snapshot taken twice is the same snapshot.
        let (page, khz) = {
            let clock = lock(&self.shared.clock);
            (clock.page(local.tsc_adjust), clock.khz())
        };
        let flags = self.shared.page_flags();
        local.published_flags = flags;
        let page = policies.fault.map_or(Some(page), |fault| fault.page(page, khz));
        if let Some(page) = page {
            local
                .pvclock
                .publish(
                    &Ram(&self.shared.memory),
                    &page,
                    flags,
                    policies.fault.is_none_or(InjectedFault::tells_stopped),
                )
                .map_err(|fault| RunError::BadState(fault.to_string()))?;
        }
        let version = local.pvclock.state().version;
        trace_restore(&self.shared, local.index, policies, adjusted, khz, version, armed(local));
        Ok(())
    }

    fn trace_boot(&self, adjusted: &Adjusted, khz: Khz) {
        let source = lock(&self.shared.clock).source();
        let now = Now::new(adjusted.tsc, adjusted.vm);
        self.shared.event(0, now, &Event::Boot { source: source.as_str(), tsc_khz: khz });
    }

    /// What to choose after a migration within the process: what was asked for, or else what suits.
    fn choice_after(&self, source: TscSource) -> SourceChoice {
        match self.choice {
            SourceChoice::Auto => source.choice_after(),
            fixed @ SourceChoice::Fixed(_) => fixed,
        }
    }

    /// Whether this machine could migrate to `khz` here; asked before [`Self::migrate`], which cannot go back.
    ///
    /// # Errors
    /// Why not.
    pub fn check_migration(&self, env: &HostEnvironment, khz: Khz) -> Result<(), RunError> {
        check_ratio(lock(&self.shared.clock).khz(), khz)?;
        self.check_source(env, khz)
    }

    /// Whether this machine could have the TSC frequency `khz` here.
    ///
    /// # Errors
    /// Why not.
    pub fn check_source(&self, env: &HostEnvironment, khz: Khz) -> Result<(), RunError> {
        let (source, time) = {
            let clock = lock(&self.shared.clock);
            (clock.source(), clock.mode())
        };
        let choice = self.choice_after(source);
        let running = || Paused::here(lock(&self.shared.clock).moment(), BootTime::now());
        let stopped = self.has_run.then(|| self.paused.unwrap_or_else(running).stopped_tsc());
        if self.in_kernel.is_some() {
            return kvm_lapic::choose(env, choice, time, khz, stopped, &self.image).map(drop);
        }
        let cpus = u32::try_from(self.cpus.len()).unwrap_or(u32::MAX);
        let guest = Guest { name: &self.image, sites: &self.all_sites, cpus, stopped };
        source::choose(&FirstVmProbe::certain(env)?, guest, choice, time, khz).map(drop)
    }

    /// Migrates within the process: a new virtual machine is built from the saved state, RAM stays where it is.
    ///
    /// # Errors
    /// [`RunError`]; the machine is lost then, as it would be when a restore fails after the source was stopped.
    pub fn migrate(mut self, env: &HostEnvironment, policies: &Policies) -> Result<(Self, Migration), RunError> {
        self.pause()?;
        let state = self.state(env)?;
        let present = state.clock.moment.khz;
        let khz = policies.khz.unwrap_or(present);
        check_ratio(present, khz)?;
        let choice = self.choice_after(state.machine.source);
        let changes = self.take_changes()?;
        self.shared.sites.unpatch(&self.shared.memory);
        let Self { cpus, in_kernel, shared, migrations_here, paused, vm, .. } = self;
        // The old machine is closed before the new one is built, as on two hosts.
        drop((cpus, in_kernel, vm));
        let Shared { devices, memory, audit, trace, outlets, costs, settled_down, .. } = shared;
        let console = devices.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner).into_output();
        let outputs = Outputs { console, trace: super::build::TraceTo::On(trace), outlets };
        let mut machine =
            Self::restored(env, &state, memory, Onward { choice, time: state.machine.time, khz, paused }, outputs)?;
        // The judge's counts go on: it is still this process that counts.
        machine.shared.audit = audit;
        machine.shared.costs = costs;
        machine.shared.settled_down = settled_down;
        machine.migrations_here = migrations_here.saturating_add(1);
        machine.set_changes(changes)?;
        let migration = machine.resume(policies)?;
        let migration = migration.ok_or_else(|| RunError::BadState("a migrated machine cannot be new".to_owned()))?;
        Ok((machine, migration))
    }
}

fn trace_restore(
    shared: &Shared,
    cpu: u32,
    policies: &Policies,
    adjusted: &Adjusted,
    tsc_khz: Khz,
    page_version: u32,
    armed: Option<Armed>,
) {
    let event = Event::Restore {
        tsc_khz,
        page: adjusted.page,
        page_version,
        armed,
        deadline: policies.deadline,
        downtime: policies.downtime,
        downtime_ns: adjusted.downtime_ns,
        clamped: adjusted.clamped,
    };
    shared.event(cpu, Now::new(adjusted.tsc, adjusted.vm), &event);
}

/// What the LAPIC timer waits for, after the policies.
///
/// A count (one-shot, periodic) is an absolute VM time and keeps its meaning; so does a nanosecond deadline, unless it is
/// to fire at once. A TSC deadline is a number in units that just changed: that is what the policy is about. Whatever the
/// policy, one that the base TSC has reached meanwhile is due, also if the vCPU's own TSC wrapped on the way and now reads
/// less than the deadline.
pub(crate) fn rearm(
    armed: Armed,
    tsc_adjust: u64,
    policy: DeadlinePolicy,
    moment: &Moment,
    adjusted: &Adjusted,
) -> Armed {
    match armed {
        Armed::Disarmed | Armed::Count { .. } => armed,
        Armed::Ns(at) => Armed::Ns(adjust::ns_deadline(policy, at, adjusted.vm)),
        Armed::Tsc(deadline) => {
            let here = moment.tsc.0.wrapping_add(tsc_adjust);
            let there = adjusted.tsc.0.wrapping_add(tsc_adjust);
            let base = GuestTsc(moment.tsc.0.saturating_add(deadline.0.saturating_sub(here)));
            // Never 0: that would disarm.
            Armed::Tsc(GuestTsc(match policy {
                DeadlinePolicy::Keep if base <= adjusted.tsc => deadline.0.min(there).max(1),
                DeadlinePolicy::Keep => deadline.0,
                DeadlinePolicy::Rescale | DeadlinePolicy::Fire => {
                    let moved = adjust::deadline(policy, base, &moment.page, &adjusted.page, adjusted.tsc);
                    let left = moved.0.saturating_sub(adjusted.tsc.0);
                    there.saturating_add(left).max(1)
                }
            }))
        }
    }
}

fn armed(local: &Local) -> Option<Armed> {
    some(local.apic.armed())
}

fn some(armed: Armed) -> Option<Armed> {
    (armed != Armed::Disarmed).then_some(armed)
}

/// Whether a migration may go from one frequency to the other.
///
/// # Errors
/// [`RunError::Ratio`].
pub fn check_ratio(present: Khz, wanted: Khz) -> Result<(), RunError> {
    let (p, w) = (u64::from(present.get()), u64::from(wanted.get()));
    if w > p * MAX_RATIO || w * MAX_RATIO < p {
        return Err(RunError::Ratio { wanted, present });
    }
    Ok(())
}
