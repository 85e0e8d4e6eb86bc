//! A whole machine: built from an image or from saved state, then run, paused, saved.

use std::{
    io::Write,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use guest_abi::{report::Header, sites::Kind};
use kvm_pv::WallRegistration;
use vmtime::{Khz, Now, VmTime};

use super::{
    MAX_CPUS,
    audit::TickAudit,
    clock::Clock,
    config::{
        BootOptions, EmulatedHost, HostEnvironment, LapicKind, TimeMode, first_vm_probe,
        source::{self, Chosen, Guest, SourceChoice, TscSource},
    },
    dirty::Changes,
    error::{Outcome, RunError},
    kvm_lapic::{self, KvmCpu},
    paused::{BootTime, Paused},
    record::{
        counters::Counters,
        trace::{Event, Trace},
    },
    sched::{
        self,
        mailbox::Interruptions,
        round_robin::{RoundRobin, Until},
    },
    shared::{Ram, Shared, VcpuShared, lock},
    state::{CpuStates, DevicesState, KvmCpuState, MachineSection, MachineState},
    vcpu::{Cpu, Phase, step::Stop},
    vcpus,
    wake::host_stop::HostInstant,
};
use crate::{
    boot::{self, Image, sites::Sites, unlisted::Unlisted},
    devices::Devices,
    host::clock::{HostClock, wall_ns},
    kvm::Vm,
    mem::ram::{self, GuestRam},
    output::Outlet,
    x86::Leaf,
};

/// Where a machine's output goes.
pub struct Outputs {
    /// What the guest prints.
    pub console: Box<dyn Write + Send>,
    /// What happened.
    pub trace: TraceTo,
    /// What somebody may read slowly, so that the vCPUs are to wait for it, and for a trace; none = they wait for nobody.
    pub outlets: Vec<Outlet>,
}

/// Where a trace goes.
pub enum TraceTo {
    /// Nowhere.
    Nowhere,
    /// To a new file: created when the machine is, so that a machine that cannot be leaves an older one alone.
    File(PathBuf),
    /// To standard output.
    Stdout,
    /// On in this one.
    On(Trace),
}

impl TraceTo {
    fn begin(self) -> Result<Trace, RunError> {
        match self {
            Self::Nowhere => Ok(Trace::default()),
            Self::File(path) => Trace::to_file(&path),
            Self::Stdout => Trace::to_stdout(),
            Self::On(trace) => Ok(trace),
        }
    }
}

impl Outputs {
    /// The console to `console`, the trace to the file `trace`, if any.
    #[must_use]
    pub fn new(console: Box<dyn Write + Send>, trace: Option<&Path>) -> Self {
        let trace = trace.map_or(TraceTo::Nowhere, |path| TraceTo::File(path.to_owned()));
        Self { console, trace, outlets: Vec::new() }
    }

    /// The console to `console`, the trace to `trace`.
    #[must_use]
    pub fn to_outlet(console: Outlet, trace: TraceTo) -> Self {
        Self { outlets: vec![console.clone()], console: Box::new(console), trace }
    }
}

/// How a saved machine is to go on.
pub(crate) struct Onward {
    pub choice: SourceChoice,
    pub time: TimeMode,
    pub khz: Khz,
    /// The stop, if it was in this process.
    pub paused: Option<Paused>,
}

/// A machine.
pub struct Machine {
    /// The vCPUs whose LAPICs are ours: all or none.
    pub(crate) cpus: Vec<Cpu>,
    /// The vCPUs whose LAPICs are KVM's, if it has them: all, then.
    pub(crate) in_kernel: Option<Vec<KvmCpu>>,
    /// Virtual time: who takes the next turn.
    pub(crate) round_robin: RoundRobin,
    pub(crate) shared: Shared,
    /// The guest's trap sites; those in `shared` are the patched ones.
    pub(crate) all_sites: Sites,
    pub(crate) image: String,
    pub(crate) cpuid: Vec<Vec<Leaf>>,
    /// Why this TSC source.
    why: String,
    /// The TSC source that was asked for.
    pub(crate) choice: SourceChoice,
    /// Since when it stands still; none while it runs.
    pub(crate) paused: Option<Paused>,
    /// It ran before: starting it again is a resume, of which the guest is told.
    pub(crate) has_run: bool,
    /// Migrations since it booted, in whatever process.
    pub(crate) migrations: u64,
    /// Those within this process; a restore is none of them.
    pub(crate) migrations_here: u64,
    /// RDTSCs that the guest's trap-site table forgets.
    unlisted: Unlisted,
    /// What has changed since it was saved, if somebody asked for that account.
    pub(crate) changes: Option<Changes>,
    /// Declared last: the vCPUs are closed before the VM whose memory they map.
    pub(crate) vm: Vm,
}

impl Machine {
    /// A machine about to execute the image's first instruction, paused at VM time 0.
    ///
    /// # Errors
    /// [`RunError`].
    pub fn boot(
        env: &HostEnvironment,
        image: &Image,
        options: &BootOptions,
        outputs: Outputs,
    ) -> Result<Self, RunError> {
        if !(1..=MAX_CPUS).contains(&options.cpus) {
            return Err(RunError::Cpus(options.cpus));
        }
        let host_clock = host_clock(env, options.lapic);
        let wanted = options.khz.unwrap_or(host_clock.khz());
        let memory = Arc::new(ram::allocate(options.memory)?);
        let entry = image.load(&memory, &options.cmdline, options.initrd.as_deref())?;
        let clock_for = |chosen: &Chosen| {
            let khz = Clock::new(chosen.source, options.time, host_clock, wanted).possible(wanted);
            Clock::new(chosen.source, options.time, host_clock, khz)
        };
        let (chosen, mut clock, vm, cpus, in_kernel, leaves) = match options.lapic {
            LapicKind::User => first_vm_probe::settle(env, |probe| {
                let BootOptions { source, time, cpus, .. } = *options;
                let guest = Guest { name: image.name(), sites: image.sites(), cpus, stopped: None };
                let chosen = source::choose(probe, guest, source, time, wanted)?;
                let clock = clock_for(&chosen);
                let vm = Vm::new(&env.host, Arc::clone(&memory), chosen.lapics)?;
                let (cpus, leaves) = vcpus::boot(&vm, probe, &chosen, options, clock.khz(), &entry)?;
                Ok((chosen, clock, vm, cpus, None, leaves))
            }),
            LapicKind::Kvm => {
                let chosen = kvm_lapic::choose(env, options.source, options.time, wanted, None, image.name())?;
                let clock = clock_for(&chosen);
                let vm = Vm::new(&env.host, Arc::clone(&memory), chosen.lapics)?;
                let offer = kvm_lapic::offer(env.supported()?, &chosen, options.x2apic, clock.khz(), options.cpus);
                let (cpus, leaves) = kvm_lapic::boot(&vm, env.supported()?, &offer, &entry)?;
                Ok((chosen, clock, vm, Vec::new(), Some(cpus), leaves))
            }
        }?;
        // Without a listed one no source but the host's is possible.
        let unlisted = if image.sites().has(Kind::Rdtsc) { image.unlisted() } else { Unlisted::default() };
        tell_unlisted(&unlisted, chosen.source, image.name());
        chosen.patched.patch(&memory);
        if env.facts()?.tsc_offset {
            clock.with_tsc_offset();
        }
        let moment = clock.moment();
        let mut devices = Devices::new(outputs.console);
        if entry.pc {
            devices = devices.after_firmware(boot::firmware::PIC_VECTORS, moment.vm);
        }
        let (trace, vcpus) = (outputs.trace.begin()?, vcpus(leaves.len()));
        let shared = Shared {
            clock: Mutex::new(clock),
            devices: Mutex::new(devices),
            wall: Mutex::new(WallRegistration::default()),
            memory,
            sites: chosen.patched,
            audit: Mutex::new(TickAudit::new(image.ring(), leaves.len())),
            outlets: outlets(outputs.outlets, &trace, &vcpus),
            trace,
            vcpus,
            stopping: AtomicBool::new(false),
            tsc_stable: AtomicBool::new(true),
            swallow_deadline: env.emulated == Some(EmulatedHost::SwallowDeadline),
            poll: env.poll,
            spin_limit: env.spin_limit,
            settled_down: AtomicBool::new(false),
            known_to_run: Mutex::new(HostInstant::now(host_clock)),
            gap: Mutex::default(),
            lapic: options.lapic,
            costs: Counters::default(),
            warned_msrs: Mutex::default(),
        };
        Ok(Self {
            round_robin: RoundRobin::new(options.seed, cpus.len()),
            cpus,
            in_kernel,
            shared,
            all_sites: image.sites().clone(),
            image: image.name().to_owned(),
            cpuid: leaves,
            why: chosen.why,
            choice: options.source,
            paused: Some(Paused::here(moment, BootTime::now())),
            has_run: false,
            migrations: 0,
            migrations_here: 0,
            unlisted,
            changes: None,
            vm,
        })
    }

    /// A machine as it was saved, paused; `memory` holds the guest's own instructions at trap sites.
    ///
    /// `khz` is the frequency that it will be resumed with.
    ///
    /// # Errors
    /// [`RunError`]: this host cannot run it, or the state is not one a machine can have.
    pub fn from_state(
        env: &HostEnvironment,
        state: &MachineState,
        memory: Arc<GuestRam>,
        choice: SourceChoice,
        time: TimeMode,
        khz: Khz,
        outputs: Outputs,
    ) -> Result<Self, RunError> {
        Self::restored(env, state, memory, Onward { choice, time, khz, paused: None }, outputs)
    }

    /// As [`Self::from_state`].
    pub(crate) fn restored(
        env: &HostEnvironment,
        state: &MachineState,
        memory: Arc<GuestRam>,
        onward: Onward,
        outputs: Outputs,
    ) -> Result<Self, RunError> {
        let Onward { choice, time, khz, paused } = onward;
        let MachineState { machine, clock: saved_clock, cpus: saved_cpus, devices, sites, audit } = state;
        let MachineSection { image, time: saved_time, source: saved_source, order, tsc_stable, migrations, unlisted } =
            machine;
        let in_process = paused.is_some();
        let count = u32::try_from(saved_cpus.count()).unwrap_or(u32::MAX);
        if !(1..=MAX_CPUS).contains(&count) {
            return Err(RunError::Cpus(count));
        }
        let all_sites = Sites::from_state(sites)?;
        all_sites.check(&memory)?;
        let mut moment = saved_clock.moment;
        if (*saved_time, time) == (TimeMode::Virtual, TimeMode::Real) {
            // Virtual time has no wall to measure a downtime by: it begins now.
            moment.wall_ns = wall_ns();
        }
        let paused = paused.unwrap_or_else(|| Paused::saved(moment));
        let stopped = Some(paused.stopped_tsc());
        // The order is the one that real hosts need (CPUID, control registers, LAPIC, TSC, deadline, page), although with
        // our LAPICs only the first three are KVM's: TSC, deadline and page follow in `resume`, together. With KVM's, the
        // LAPIC follows there too.
        let (chosen, vm, cpus, in_kernel) = match saved_cpus {
            CpuStates::User(saved) => first_vm_probe::settle(env, |probe| {
                let guest = Guest { name: image, sites: &all_sites, cpus: count, stopped };
                let chosen = source::choose(probe, guest, choice, time, khz)?;
                saved.iter().try_for_each(|cpu| vcpus::check_features(probe, cpu, &chosen))?;
                let vm = Vm::new(&env.host, Arc::clone(&memory), chosen.lapics)?;
                let cpus = vcpus::restore(&vm, probe, &memory, saved)?;
                Ok((chosen, vm, cpus, None))
            }),
            CpuStates::Kvm(saved) => {
                let chosen = kvm_lapic::choose(env, choice, time, khz, stopped, image)?;
                saved.iter().try_for_each(|cpu| kvm_lapic::check_features(env, cpu, &chosen))?;
                let vm = Vm::new(&env.host, Arc::clone(&memory), chosen.lapics)?;
                let cpus = kvm_lapic::restore(&vm, saved)?;
                Ok((chosen, vm, Vec::new(), Some(cpus)))
            }
        }?;
        // Within the process it was told of already, unless the TSC was the host's until now.
        if !in_process || *saved_source != TscSource::Trapped {
            tell_unlisted(unlisted, chosen.source, image);
        }
        chosen.patched.patch(&memory);
        let host_clock = host_clock(env, saved_cpus.lapic());
        let mut clock = Clock::from_state(chosen.source, time, host_clock, saved_clock);
        if env.facts()?.tsc_offset {
            clock.with_tsc_offset();
        }
        let since = moment.vm;
        let DevicesState { serial, pic, pit, wall } = devices;
        let devices_now = Devices::from_state(serial, pic, pit, outputs.console)
            .ok_or_else(|| RunError::BadState("a device cannot be in its saved state".to_owned()))?;
        let (trace, vcpus) = (outputs.trace.begin()?, vcpus(saved_cpus.count()));
        let shared = Shared {
            clock: Mutex::new(clock),
            devices: Mutex::new(devices_now),
            wall: Mutex::new(WallRegistration::from_state(*wall)),
            memory,
            sites: chosen.patched,
            audit: Mutex::new(TickAudit::from_state(audit, saved_cpus.count(), since, *migrations)),
            outlets: outlets(outputs.outlets, &trace, &vcpus),
            trace,
            vcpus,
            stopping: AtomicBool::new(false),
            tsc_stable: AtomicBool::new(*tsc_stable),
            swallow_deadline: env.emulated == Some(EmulatedHost::SwallowDeadline),
            poll: env.poll,
            spin_limit: env.spin_limit,
            settled_down: AtomicBool::new(false),
            known_to_run: Mutex::new(HostInstant::now(host_clock)),
            gap: Mutex::default(),
            lapic: saved_cpus.lapic(),
            costs: Counters::default(),
            warned_msrs: Mutex::default(),
        };
        Ok(Self {
            round_robin: RoundRobin::from_state(*order, cpus.len()),
            cpus,
            in_kernel,
            shared,
            all_sites,
            image: image.clone(),
            cpuid: saved_cpus.cpuids(),
            why: chosen.why,
            choice,
            paused: Some(paused),
            has_run: true,
            migrations: migrations.saturating_add(1),
            migrations_here: 0,
            unlisted: unlisted.clone(),
            changes: None,
            vm,
        })
    }

    /// Runs until the guest ends, VM time `stop` is reached or somebody waits in `mailbox`. A paused machine is first
    /// resumed without any change.
    ///
    /// # Errors
    /// [`RunError`].
    pub fn run(&mut self, mailbox: &impl Interruptions, stop: Option<VmTime>) -> Result<Outcome, RunError> {
        if self.paused.is_some() {
            self.resume(&super::migrate::Policies::default())?;
        }
        mailbox.ring_at(self.shared.vcpus.first().map(|vcpu_shared| Arc::clone(&vcpu_shared.doorbell)));
        let stopped = self.run_and_renew(mailbox, stop);
        mailbox.ring_at(None);
        let stopped = stopped?;
        if self.shared.has_gap() {
            // While the gap is known: a tick that was handled before it was noticed may have an instant within it.
            lock(&self.shared.audit).read_rings(&self.shared);
        }
        let gap = lock(&self.shared.gap).take();
        match stopped {
            Stop::Reached | Stop::Asked if let Some(gap) = gap => {
                let length = self.stopped_by_host(gap)?;
                Ok(Outcome::HostStopped { length })
            }
            Stop::Reached => Ok(Outcome::Reached),
            Stop::Asked => Ok(Outcome::Requested),
            Stop::Ended(end) => {
                let now = lock(&self.shared.clock).now(0);
                let reason = end.message().unwrap_or_else(|| "done".to_owned());
                self.shared.event(0, now, &Event::End { reason: &reason });
                Ok(Outcome::Ended(end))
            }
        }
    }

    /// Runs, and renews the page in between, while all vCPUs stand still.
    fn run_and_renew(&mut self, mailbox: &impl Interruptions, stop: Option<VmTime>) -> Result<Stop, RunError> {
        loop {
            let (mode, renewal, until) = {
                let clock = lock(&self.shared.clock);
                let renewal = clock.renewal();
                let until =
                    Until { stop: stop.and_then(|stop| clock.least_tsc(stop)), renewal: clock.least_tsc(renewal) };
                (clock.mode(), renewal, until)
            };
            let stopped = match (mode, &mut self.in_kernel) {
                (_, Some(cpus)) => {
                    // Renewing its page is KVM's business.
                    let stopped = sched::real(cpus, &self.shared, mailbox, until.stop, kvm_lapic::run)?;
                    if !self.shared.has_gap() {
                        lock(&self.shared.clock).follow(self.vm.clock()?);
                    }
                    Ok(stopped)
                }
                (TimeMode::Real, None) => sched::real(&mut self.cpus, &self.shared, mailbox, until.first(), sched::run),
                (TimeMode::Virtual, None) => {
                    sched::virtually(&mut self.cpus, &self.shared, mailbox, until, &mut self.round_robin)
                }
            }?;
            if self.shared.has_gap() {
                return Ok(stopped);
            }
            let now = lock(&self.shared.clock).now(0);
            if stopped == Stop::Reached && self.in_kernel.is_none() && now.vm >= renewal {
                self.renew_page(now)?;
            }
            if stopped != Stop::Reached || stop.is_some_and(|stop| now.vm >= stop) {
                return Ok(stopped);
            }
        }
    }

    pub(crate) fn renew_page(&mut self, now: Now) -> Result<(), RunError> {
        let mut clock = lock(&self.shared.clock);
        clock.renew();
        let flags = self.shared.page_flags();
        for Cpu { local, .. } in &mut self.cpus {
            let page = clock.page(local.tsc_adjust);
            local
                .pvclock
                .publish(&Ram(&self.shared.memory), &page, flags, false)
                .map_err(|fault| RunError::BadState(fault.to_string()))?;
        }
        let page = clock.page(0);
        drop(clock);
        self.shared.event(0, now, &Event::Renew { page });
        Ok(())
    }

    /// Everything but RAM, of a paused machine.
    ///
    /// # Errors
    /// If the ioctl fails.
    pub fn state(&mut self, env: &HostEnvironment) -> Result<MachineState, RunError> {
        let Some(Paused { moment, .. }) = self.paused else {
            return Err(RunError::Usage("a machine must be paused before it is saved".to_owned()));
        };
        // Before the clock is locked: a traced tick asks it for the time.
        lock(&self.shared.audit).read_rings(&self.shared);
        for cpu in &mut self.cpus {
            cpu.drain(&self.shared)?;
        }
        for cpu in self.in_kernel.iter_mut().flatten() {
            cpu.drain(&self.shared)?;
        }
        let clock = lock(&self.shared.clock);
        let cpus = match &self.in_kernel {
            None => CpuStates::User(vcpus::states(&mut self.cpus, &self.cpuid, env, &clock)?),
            Some(cpus) => {
                let msrs = env.msrs()?;
                let states = cpus.iter().zip(&self.cpuid).map(|(cpu, cpuid)| {
                    // The MP state first, which `frozen` has read: it may change the rest.
                    let lapic = cpu.frozen()?;
                    Ok(KvmCpuState { cpuid: cpuid.clone(), kvm: cpu.vcpu.state(msrs)?, lapic })
                });
                CpuStates::Kvm(states.collect::<Result<_, RunError>>()?)
            }
        };
        let mut clock_state = clock.state();
        clock_state.moment = moment;
        Ok(MachineState {
            machine: MachineSection {
                image: self.image.clone(),
                time: clock.mode(),
                source: clock.source(),
                order: self.round_robin.state(),
                tsc_stable: self.shared.tsc_stable.load(Ordering::SeqCst),
                migrations: self.migrations,
                unlisted: self.unlisted.clone(),
            },
            clock: clock_state,
            cpus,
            devices: {
                let (serial, pic, pit) = lock(&self.shared.devices).state();
                DevicesState { serial, pic, pit, wall: lock(&self.shared.wall).state() }
            },
            sites: self.all_sites.alive(&self.shared.memory).state(),
            audit: lock(&self.shared.audit).state(),
        })
    }

    /// Where each vCPU is, one line each, for people; nothing of vCPUs whose LAPICs are KVM's.
    ///
    /// # Errors
    /// If the ioctl fails.
    pub fn positions(&mut self) -> Result<Vec<String>, RunError> {
        let mut lines = Vec::new();
        for cpu in &mut self.cpus {
            cpu.drain(&self.shared)?;
            let Cpu { vcpu, local } = cpu;
            let (index, address) = (local.index, vcpu.registers().linear_rip);
            let interrupts = if vcpu.interrupts_enabled() { "on" } else { "off" };
            lines.push(match local.phase {
                Phase::WaitForSipi => format!("cpu {index} waits for a start-up message"),
                Phase::Running if local.halted => {
                    format!("cpu {index} halted before {address:#x}, interrupts {interrupts}")
                }
                Phase::Running => format!("cpu {index} at {address:#x}, interrupts {interrupts}"),
            });
        }
        Ok(lines)
    }

    /// The guest's RAM.
    #[must_use]
    pub fn memory(&self) -> Arc<GuestRam> {
        Arc::clone(&self.shared.memory)
    }

    /// Puts the guest's own instructions at trap sites, for a save: a snapshot can be restored where nothing is patched. The
    /// machine must be paused, and stay so up to [`Self::memory_is_saved`].
    pub fn show_original_code(&self) {
        self.shared.sites.unpatch(&self.shared.memory);
    }

    /// Timer interrupts that entered vCPU number `cpu` so far, in this process.
    #[must_use]
    pub fn timer_interrupts(&self, cpu: usize) -> u64 {
        self.cpus.get(cpu).map_or(0, |cpu| cpu.local.timer_interrupts)
    }

    /// Whether the timer of vCPU number `cpu` is armed.
    #[must_use]
    pub fn has_timer_armed(&self, cpu: usize) -> bool {
        self.cpus.get(cpu).is_some_and(|cpu| cpu.local.apic.next_deadline().is_some())
    }

    /// The header of the tick ring of vCPU number `cpu`, as the guest has it now; none if there is none.
    #[must_use]
    pub fn ring_header(&self, cpu: usize) -> Option<Header> {
        lock(&self.shared.audit).header(&self.shared.memory, cpu)
    }

    /// Ticks that the guest has handled on vCPU number `cpu`.
    #[must_use]
    pub fn ticks_handled(&self, cpu: usize) -> Option<u64> {
        self.ring_header(cpu).map(|header| header.written)
    }

    /// Ticks that the guest will make on vCPU number `cpu`; 0 = without end.
    #[must_use]
    pub fn ticks_expected(&self, cpu: usize) -> Option<u64> {
        self.ring_header(cpu).map(|header| header.expected)
    }

    /// What the vCPUs share.
    #[must_use]
    pub fn shared(&self) -> &Shared {
        &self.shared
    }

    /// The image it was booted from.
    #[must_use]
    pub fn image(&self) -> &str {
        &self.image
    }

    /// Which TSC source, and why, for people.
    #[must_use]
    pub fn source_and_why(&self) -> (TscSource, &str) {
        (lock(&self.shared.clock).source(), &self.why)
    }

    /// Who has the local APICs.
    #[must_use]
    pub fn lapic(&self) -> LapicKind {
        if self.in_kernel.is_some() { LapicKind::Kvm } else { LapicKind::User }
    }

    /// Whether it stands still.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        self.paused.is_some()
    }

    /// Migrations since it booted, in whatever process; the restore that made it is one.
    #[must_use]
    pub fn migrations(&self) -> u64 {
        self.migrations
    }

    /// Migrations within this process; a restore is none.
    #[must_use]
    pub fn migrations_here(&self) -> u64 {
        self.migrations_here
    }
}

/// Warns of RDTSCs that give another TSC than the one that the VMM answers at trap sites.
fn tell_unlisted(unlisted: &Unlisted, source: TscSource, image: &str) {
    if source == TscSource::Trapped && !unlisted.is_empty() {
        let reads = if unlisted.any_is_sure() { "reads" } else { "may read" };
        log::warn!(
            "guest image {image} {reads} the TSC where its trap-site table has no entry, and gets the host's there, not its \
             own: {unlisted}"
        );
    }
}

/// The host's clock for a machine with these local APICs. KVM's kvmclock runs at the true frequency, whatever the host's TSC
/// is taken for.
fn host_clock(env: &HostEnvironment, lapic: LapicKind) -> HostClock {
    match lapic {
        LapicKind::User => env.clock,
        LapicKind::Kvm => env.clock.as_it_is(),
    }
}

/// What the vCPUs have to wait for, and how they are woken.
fn outlets(given: Vec<Outlet>, trace: &Trace, vcpus: &[VcpuShared]) -> Vec<Outlet> {
    // A machine that is stepped waits for nobody: who steps it reads what it traces.
    if given.is_empty() {
        return given;
    }
    let mut all = given;
    // A trace that goes on after a migration is among those that were given.
    let trace = trace.outlet().filter(|trace| !all.iter().any(|given| given.is(trace)));
    all.extend(trace);
    for outlet in &all {
        let bells: Vec<_> = vcpus.iter().map(|vcpu_shared| Arc::clone(&vcpu_shared.doorbell)).collect();
        outlet.on_room(move || bells.iter().for_each(|doorbell| doorbell.ring()));
    }
    all
}

fn vcpus(count: usize) -> Vec<VcpuShared> {
    (0..count).map(|_| VcpuShared::default()).collect()
}
