//! The vCPUs of a machine: operations that differ between LAPICs in user space and KVM's.

use std::sync::Arc;

use vlapic::Armed;
use vmtime::{Adjusted, HostTsc, Khz, Moment};

use super::{
    audit::TimerAudit,
    clock::Clock,
    config::{
        BootOptions, HostEnvironment, LapicKind, TimeMode, first_vm_probe,
        source::{self, Chosen, Guest, SourceChoice},
    },
    cpu_index::CpuIndex,
    error::RunError,
    instant::HostInstant,
    kvm_lapic::{self, KvmCpu},
    paused::StoppedTsc,
    policy::{Policies, Restart, restorer::SavedCpu},
    sched::{
        self,
        mailbox::RequestSource,
        round_robin::{RoundRobin, Until},
    },
    shared::Shared,
    state::{CpuStates, KvmCpuState},
    stop::StopReason,
    user_lapic,
    vcpu::{Cpu, ipi, tsc},
};
use crate::{
    boot::{Image, sites::Sites},
    kvm::Vm,
    mem::ram::GuestRam,
    x86::{EntryState, Leaf},
};

/// All vCPUs, by number. Their LAPICs are of one kind.
pub(crate) enum Vcpus {
    /// The LAPICs are in user space.
    User(Vec<Cpu>),
    /// KVM emulates the LAPICs, and kvmclock.
    Kvm(Vec<KvmCpu>),
}

/// A new VM with its vCPUs.
pub(crate) struct NewVm {
    /// The guest's TSC source.
    pub chosen: Chosen,
    pub vcpus: Vcpus,
    /// The CPUID that each vCPU sees.
    pub cpuids: Vec<Vec<Leaf>>,
    pub vm: Vm,
}

/// What a saved machine needs from the host.
#[derive(Clone, Copy)]
pub(crate) struct Wanted<'a> {
    /// The image's name, for messages.
    pub image: &'a str,
    pub sites: &'a Sites,
    pub choice: SourceChoice,
    pub time: TimeMode,
    pub khz: Khz,
    /// The TSC that is to be continued.
    pub stopped: StoppedTsc,
}

/// A vCPU's armed timer and kvmclock page, at a stop or after a resume.
pub(crate) struct InFlight {
    /// The vCPU.
    pub cpu: CpuIndex,
    /// Version of its kvmclock page.
    pub page_version: u32,
    /// What its timer waits for, if it waits.
    pub armed: Option<Armed>,
    /// Its steal time, if a resume added to it.
    pub steal_ns: Option<u64>,
}

impl Vcpus {
    /// Creates the vCPUs of a machine about to boot, number 0 at `entry`. `khz` returns the TSC frequency that they see
    /// with the chosen TSC source.
    pub(crate) fn boot(
        env: &HostEnvironment,
        image: &Image,
        options: &BootOptions,
        memory: &Arc<GuestRam>,
        entry: &EntryState,
        (wanted, khz): (Khz, impl Fn(&Chosen) -> Khz),
    ) -> Result<NewVm, RunError> {
        let BootOptions { source, time, cpus, .. } = *options;
        match options.lapic {
            LapicKind::User => first_vm_probe::build(env, |probe| {
                let guest = Guest { name: image.name(), sites: image.sites(), cpus, stopped: None };
                let chosen = source::choose(probe, guest, source, time, wanted)?;
                let vm = Vm::new(&env.host, Arc::clone(memory), chosen.lapics)?;
                let (cpus, cpuids) = user_lapic::boot(&vm, probe, &chosen, options, khz(&chosen), entry)?;
                Ok(NewVm { chosen, vcpus: Self::User(cpus), cpuids, vm })
            }),
            LapicKind::Kvm => {
                let chosen = kvm_lapic::choose(env, source, time, wanted, None, image.name())?;
                let vm = Vm::new(&env.host, Arc::clone(memory), chosen.lapics)?;
                let offer = kvm_lapic::offer(env.supported()?, &chosen, options, khz(&chosen));
                let (cpus, cpuids) = kvm_lapic::boot(&vm, env, &options.cpuid, &offer, entry)?;
                Ok(NewVm { chosen, vcpus: Self::Kvm(cpus), cpuids, vm })
            }
        }
    }

    /// Creates the vCPUs as they were saved.
    ///
    /// The order is that of a VMM with KVM's LAPIC: CPUID, control registers, LAPIC, TSC, deadline, page. With LAPICs
    /// in user space only the first two are KVM's; the LAPIC is set here, and TSC, deadline and page together in
    /// [`super::Machine::resume`]. With KVM's LAPIC, the LAPIC is set there too.
    pub(crate) fn restore(
        env: &HostEnvironment,
        saved: &CpuStates,
        memory: &Arc<GuestRam>,
        wanted: Wanted<'_>,
    ) -> Result<NewVm, RunError> {
        let Wanted { image, time, khz, choice, stopped, .. } = wanted;
        let cpuids = saved.cpuids();
        match saved {
            CpuStates::User(saved) => first_vm_probe::build(env, |probe| {
                let chosen = source::choose(probe, wanted.guest(saved.len()), choice, time, khz)?;
                saved.iter().try_for_each(|cpu| user_lapic::check_features(probe, cpu, &chosen))?;
                let vm = Vm::new(&env.host, Arc::clone(memory), chosen.lapics)?;
                let vcpus = Self::User(user_lapic::restore(&vm, probe, memory, saved)?);
                Ok(NewVm { chosen, vcpus, cpuids: cpuids.clone(), vm })
            }),
            CpuStates::Kvm(saved) => {
                let chosen = kvm_lapic::choose(env, choice, time, khz, Some(stopped), image)?;
                saved.iter().try_for_each(|cpu| kvm_lapic::check_features(env, cpu, &chosen))?;
                let vm = Vm::new(&env.host, Arc::clone(memory), chosen.lapics)?;
                let vcpus = Self::Kvm(kvm_lapic::restore(&vm, saved)?);
                Ok(NewVm { chosen, vcpus, cpuids, vm })
            }
        }
    }

    /// Whether the VMM or KVM emulates the LAPICs.
    pub(crate) const fn lapic(&self) -> LapicKind {
        match self {
            Self::User(_) => LapicKind::User,
            Self::Kvm(_) => LapicKind::Kvm,
        }
    }

    /// The vCPUs with LAPICs in user space: all or none.
    pub(crate) fn user(&self) -> &[Cpu] {
        match self {
            Self::User(cpus) => cpus,
            Self::Kvm(_) => &[],
        }
    }

    /// As [`Self::user`].
    pub(crate) fn user_mut(&mut self) -> &mut [Cpu] {
        match self {
            Self::User(cpus) => cpus,
            Self::Kvm(_) => &mut [],
        }
    }

    /// Completes the last instruction of each, and emulates the accesses that it still makes.
    pub(crate) fn drain(&mut self, shared: &Shared) -> Result<(), RunError> {
        match self {
            Self::User(cpus) => cpus.iter_mut().try_for_each(|cpu| cpu.drain(shared)),
            Self::Kvm(cpus) => cpus.iter_mut().try_for_each(|cpu| cpu.drain(shared)),
        }
    }

    /// The state of the vCPUs, which must be drained.
    pub(crate) fn states(
        &mut self,
        cpuids: &[Vec<Leaf>],
        env: &HostEnvironment,
        clock: &Clock,
    ) -> Result<CpuStates, RunError> {
        Ok(match self {
            Self::User(cpus) => CpuStates::User(user_lapic::states(cpus, cpuids, env, clock)?),
            Self::Kvm(cpus) => {
                let msrs = env.msrs()?;
                let states = cpus.iter().zip(cpuids).map(|(cpu, cpuid)| {
                    // `frozen` has read the MP state, before the rest: reading it may change the rest.
                    let lapic = cpu.frozen()?;
                    Ok(KvmCpuState { cpuid: cpuid.clone(), kvm: cpu.vcpu.state(msrs)?, lapic })
                });
                CpuStates::Kvm(states.collect::<Result<_, RunError>>()?)
            }
        })
    }

    /// Runs until one of them stops, `until` is reached or a request waits in `mailbox`.
    pub(crate) fn run(
        &mut self,
        vm: &Vm,
        shared: &Shared,
        mailbox: &impl RequestSource,
        (mode, until): (TimeMode, Until),
        round_robin: &mut RoundRobin,
    ) -> Result<StopReason, RunError> {
        match (self, mode) {
            (Self::Kvm(cpus), _) => {
                // KVM renews its page itself.
                let stopped = sched::run_threads(cpus, shared, mailbox, until.stop, kvm_lapic::run)?;
                if !shared.has_gap() {
                    shared.clock.lock().adopt_kvm_clock(vm.clock()?);
                }
                Ok(stopped)
            }
            (Self::User(cpus), TimeMode::Real) => {
                sched::run_threads(cpus, shared, mailbox, until.first(), sched::run_vcpu)
            }
            (Self::User(cpus), TimeMode::Virtual) => sched::run_round_robin(cpus, shared, mailbox, until, round_robin),
        }
    }

    /// Stops TSC and VM time, and returns the instant by its clocks and by the host's. `since`: no vCPU has run since
    /// this instant, as of which they stop.
    pub(crate) fn freeze(
        &mut self,
        vm: &Vm,
        shared: &Shared,
        since: Option<HostInstant>,
    ) -> Result<(Moment, HostInstant), RunError> {
        // Delivers all messages, because no snapshot contains any.
        for cpu in self.user_mut() {
            ipi::receive(cpu, shared)?;
        }
        let mut clock = shared.clock.lock();
        let host = clock.host();
        let stopped = match self {
            Self::User(_) => {
                let now = host.tsc();
                // After a gap it is stopped already, where the gap began.
                clock.stop_at(now);
                now
            }
            Self::Kvm(cpus) => kvm_lapic::freeze(cpus, vm, &mut clock, since.map(|since| since.tsc))?,
        };
        let at = since.unwrap_or_else(|| HostInstant::now(host).moved_to(host, stopped));
        for Cpu { local, .. } in self.user_mut() {
            // A deadline before the stop becomes an interrupt. Otherwise the deadline policy would be applied to it.
            let now = clock.now(local.tsc_adjust);
            local.advance(&clock, now);
        }
        Ok((clock.moment(at), at))
    }

    /// The armed timers and kvmclock pages of a stopped machine.
    pub(crate) fn in_flight(&self, shared: &Shared) -> Result<Vec<InFlight>, RunError> {
        match self {
            Self::User(cpus) => Ok(cpus.iter().map(InFlight::of).collect()),
            Self::Kvm(cpus) => cpus
                .iter()
                .map(|cpu| Ok(InFlight::new(cpu.index, cpu.page_version(shared), cpu.frozen()?.armed)))
                .collect(),
        }
    }

    /// The address of each vCPU's kvmclock page; the machine must be stopped.
    pub(crate) fn kvmclock_pages(&self) -> Vec<Option<u64>> {
        match self {
            Self::User(cpus) => cpus.iter().map(|cpu| cpu.local.pvclock.address()).collect(),
            Self::Kvm(cpus) => cpus.iter().map(KvmCpu::page_address).collect(),
        }
    }

    /// The vCPUs in KVM, to set their TSCs.
    pub(crate) fn vcpu_tscs(&self) -> Vec<tsc::VcpuTsc<'_>> {
        match self {
            Self::User(cpus) => cpus.iter().map(|Cpu { vcpu, local }| (vcpu, local.tsc_adjust)).collect(),
            Self::Kvm(cpus) => cpus.iter().map(|cpu| (&cpu.vcpu, cpu.tsc_adjust())).collect(),
        }
    }

    /// Starts KVM's clock, if KVM emulates kvmclock, after the machine's clock was started at `adjusted`, when the
    /// host's TSC was `start`. Returns the instant from which the guest continues, and by how many nanoseconds KVM's
    /// clock may be wrong.
    pub(crate) fn start_clock(
        &self,
        vm: &Vm,
        clock: &mut Clock,
        adjusted: Adjusted,
        start: HostTsc,
    ) -> Result<(Adjusted, u64), RunError> {
        match self {
            Self::User(_) => Ok((adjusted, 0)),
            Self::Kvm(_) => kvm_lapic::start_clock(vm, clock, &adjusted, start),
        }
    }

    /// The stopped vCPUs with LAPICs in user space, for a restore by another VMM's rules.
    pub(crate) fn saved(&self, policies: &Policies, moment: &Moment, adjusted: &Adjusted) -> Vec<SavedCpu> {
        self.user().iter().map(|cpu| user_lapic::saved(cpu, policies, moment, adjusted)).collect()
    }

    /// Takes the accounts of their timers, for the vCPUs that continue in their place.
    pub(crate) fn take_timer_audits(&mut self) -> Vec<Option<Box<TimerAudit>>> {
        self.user_mut().iter_mut().map(|cpu| cpu.local.timers.take()).collect()
    }

    /// Continues the accounts of their timers.
    pub(crate) fn continue_timer_audits(&mut self, audits: Vec<Option<Box<TimerAudit>>>) {
        for (cpu, audit) in self.user_mut().iter_mut().zip(audits) {
            cpu.local.timers = audit;
        }
    }

    /// Publishes their routes. Call it before they run for the first time.
    pub(crate) fn publish_routes(&self, shared: &Shared) {
        self.user().iter().for_each(|cpu| ipi::publish_route(shared, &cpu.local));
    }

    /// Prepares them to run again after the clock was started. Returns what their timers then wait for.
    pub(crate) fn thaw(&mut self, vm: &Vm, shared: &Shared, restart: Restart<'_>) -> Result<Vec<InFlight>, RunError> {
        match self {
            Self::User(cpus) => cpus
                .iter_mut()
                .map(|cpu| {
                    let steal_ns = user_lapic::thaw(&mut cpu.local, shared, restart)?;
                    Ok(InFlight { steal_ns, ..InFlight::of(cpu) })
                })
                .collect(),
            Self::Kvm(cpus) => cpus
                .iter_mut()
                .map(|cpu| {
                    let page_version = cpu.page_version(shared);
                    Ok(InFlight::new(cpu.index, page_version, kvm_lapic::thaw(cpu, vm, restart)?))
                })
                .collect(),
        }
    }
}

impl Wanted<'_> {
    /// The guest, to choose a TSC source for.
    fn guest(&self, cpus: usize) -> Guest<'_> {
        let cpus = u32::try_from(cpus).unwrap_or(u32::MAX);
        Guest { name: self.image, sites: self.sites, cpus, stopped: Some(self.stopped) }
    }
}

impl InFlight {
    fn new(cpu: CpuIndex, page_version: u32, armed: Armed) -> Self {
        Self { cpu, page_version, armed: (armed != Armed::Disarmed).then_some(armed), steal_ns: None }
    }

    fn of(Cpu { local, .. }: &Cpu) -> Self {
        Self::new(local.index, local.pvclock.state().version, local.apic.armed())
    }
}
