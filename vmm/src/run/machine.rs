//! A whole machine: built from an image or from saved state, then run, paused, saved.

use std::{
    io::Write,
    path::Path,
    sync::{Arc, Mutex},
};

use vm_memory::GuestMemoryMmap;

use super::{
    BootOptions, EmulatedHost, HostEnvironment, Outcome, Platform, RunError, TimeMode,
    clock::Clock,
    cpu::{Cpu, Local},
    judge::Judge,
    mailbox::Interruptions,
    platform::{Ram, lock},
    source::{self, Chosen, SourceChoice, TscSource},
    state::{CpuState, DevicesState, MachineSection, MachineState},
    trace::{Event, Trace},
    vcpu_loop,
};
use crate::{
    apic::{self, LocalApic},
    boot::{
        self, Image,
        cpuid::{self, Leaf, Offer},
        sites::Sites,
    },
    devices::Devices,
    kvm::{Vcpu, Vm},
    pvclock::{Registration, WallRegistration},
    time::{Khz, Moment, VmTime},
};

/// Where a machine's output goes.
pub struct Outputs {
    /// What the guest prints.
    pub console: Box<dyn Write + Send>,
    /// What happened.
    pub trace: Trace,
}

impl Outputs {
    /// The console to `console`, the trace to the file `trace`, if any.
    ///
    /// # Errors
    /// If the trace file cannot be created.
    pub fn new(console: Box<dyn Write + Send>, trace: Option<&Path>) -> Result<Self, RunError> {
        Ok(Self { console, trace: trace.map(Trace::to_file).transpose()?.unwrap_or_default() })
    }
}

/// A machine.
pub struct Machine {
    pub(super) cpus: Vec<Cpu>,
    pub(super) platform: Platform,
    /// The guest's trap sites; those in `platform` are the patched ones.
    pub(super) all_sites: Sites,
    pub(super) image: String,
    pub(super) cpuid: Vec<Vec<Leaf>>,
    /// Why this TSC source.
    why: String,
    /// Since when it stands still; none while it runs.
    pub(super) paused: Option<Moment>,
    /// It ran before: starting it again is a resume, of which the guest is told.
    pub(super) has_run: bool,
    /// Restores so far.
    pub(super) migrations: u64,
    /// Declared last: the vCPUs are closed before the VM whose memory they map.
    pub(super) _vm: Vm,
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
        let host_khz = env.clock.khz();
        let wanted = options.khz.unwrap_or(host_khz);
        let chosen = source::choose(env, image.sites(), options.source, options.time, wanted, image.name())?;
        // Without trapping or scaling the guest's frequency is the host's, whatever was stated within tolerance.
        let khz = if chosen.source == TscSource::Host { host_khz } else { wanted };
        let memory = Arc::new(boot::allocate(options.memory)?);
        let entry = image.load(&memory, &options.cmdline, options.initrd.as_deref())?;
        chosen.patched.patch(&memory);

        let config = apic::Config {
            id: 0,
            bsp: true,
            x2apic: options.x2apic && env.facts.x2apic_exits,
            tsc_deadline: chosen.tsc_deadline,
            ns_deadline: true,
        };
        let offer = Offer {
            x2apic: config.x2apic,
            tsc_deadline: config.tsc_deadline,
            ns_deadline: config.ns_deadline,
            tsc_adjust: chosen.source == TscSource::Trapped,
            tsc_khz: khz,
            cpus: 1,
        };
        let leaves = cpuid::leaves(&env.supported, &offer, config.id);
        let vm = Vm::new(&env.host, Arc::clone(&memory), chosen.mwait_in_guest)?;
        let mut vcpu = Vcpu::new(&vm, 0, &leaves)?;
        vcpu.set_flat_32bit_entry(entry.rip, entry.start_info)?;
        let apic = LocalApic::new(config);
        vcpu.drain()?;
        vcpu.set_apic_base(apic.apic_base());
        let local =
            Local { index: 0, apic, pvclock: Registration::default(), tsc_adjust: 0, halted: false, sti_shadow: false };
        let clock = Clock::new(chosen.source, options.time, env.clock, khz);
        let paused = Some(clock.moment());
        let platform = Platform {
            clock: Mutex::new(clock),
            devices: Mutex::new(Devices::new(outputs.console)),
            wall: Mutex::new(WallRegistration::default()),
            memory,
            sites: chosen.patched,
            judge: Mutex::new(Judge::new(image.ring())),
            trace: outputs.trace,
            swallow_deadline: env.emulated == Some(EmulatedHost::SwallowDeadline),
            told: Mutex::default(),
        };
        Ok(Self {
            cpus: vec![Cpu { vcpu, local }],
            platform,
            all_sites: image.sites().clone(),
            image: image.name().to_owned(),
            cpuid: vec![leaves],
            why: chosen.why,
            paused,
            has_run: false,
            migrations: 0,
            _vm: vm,
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
        memory: Arc<GuestMemoryMmap>,
        choice: SourceChoice,
        time: TimeMode,
        khz: Khz,
        outputs: Outputs,
    ) -> Result<Self, RunError> {
        let MachineState { machine, clock: saved_clock, cpus, devices, sites, judge } = state;
        let MachineSection { image, time: _, source: _ } = machine;
        let [cpu] = cpus.as_slice() else {
            return Err(RunError::Cpus(u32::try_from(cpus.len()).unwrap_or(u32::MAX)));
        };
        let all_sites = Sites::from_state(sites)?;
        all_sites.check(&memory)?;
        let chosen = source::choose(env, &all_sites, choice, time, khz, image)?;
        check_features(env, cpu, &chosen)?;
        chosen.patched.patch(&memory);

        // The order is the one that real hosts need (CPUID, control registers, LAPIC, TSC, deadline, page), although
        // here only the first three are KVM's: TSC, deadline and page follow in `resume`, together.
        let CpuState { cpuid, apic_config, kvm, apic: saved_apic, pvclock, tsc_adjust, halted } = cpu;
        let vm = Vm::new(&env.host, Arc::clone(&memory), chosen.mwait_in_guest)?;
        let mut vcpu = Vcpu::new(&vm, 0, cpuid)?;
        vcpu.set_state(kvm)?;
        let apic = LocalApic::from_state(saved_apic, *apic_config).map_err(|e| RunError::BadState(e.to_string()))?;
        let pvclock =
            Registration::from_state(*pvclock, &Ram(&memory)).map_err(|e| RunError::BadState(e.to_string()))?;
        let local = Local { index: 0, apic, pvclock, tsc_adjust: *tsc_adjust, halted: *halted, sti_shadow: false };
        let clock = Clock::from_state(chosen.source, time, env.clock, saved_clock);
        let since = saved_clock.moment.vm;
        let devices_now = Devices::from_state(&devices.serial, outputs.console)
            .ok_or_else(|| RunError::BadState("the serial port's buffer is too long".to_owned()))?;
        let platform = Platform {
            clock: Mutex::new(clock),
            devices: Mutex::new(devices_now),
            wall: Mutex::new(WallRegistration::from_state(devices.wall)),
            memory,
            sites: chosen.patched,
            judge: Mutex::new(Judge::from_state(judge, since)),
            trace: outputs.trace,
            swallow_deadline: env.emulated == Some(EmulatedHost::SwallowDeadline),
            told: Mutex::default(),
        };
        Ok(Self {
            cpus: vec![Cpu { vcpu, local }],
            platform,
            all_sites,
            image: image.clone(),
            cpuid: vec![cpuid.clone()],
            why: chosen.why,
            paused: Some(saved_clock.moment),
            has_run: true,
            migrations: 0,
            _vm: vm,
        })
    }

    /// Runs until the guest ends, VM time `stop` is reached or somebody waits in `mailbox`. A paused machine is first
    /// resumed without any change.
    ///
    /// # Errors
    /// [`RunError`].
    pub fn run(&mut self, mailbox: &impl Interruptions, stop: Option<VmTime>) -> Result<Outcome, RunError> {
        if self.paused.is_some() {
            self.resume(&super::Policies::default())?;
        }
        let stop = match stop {
            Some(at) => lock(&self.platform.clock).least_tsc(at),
            None => None,
        };
        let [cpu] = self.cpus.as_mut_slice() else { return Err(RunError::Cpus(0)) };
        let outcome = vcpu_loop::run(cpu, &self.platform, mailbox, stop)?;
        if let Outcome::Ended(end) = &outcome {
            let now = cpu.local.now(&lock(&self.platform.clock));
            let reason = end.message().unwrap_or_else(|| "done".to_owned());
            self.platform.event(0, now, &Event::End { reason: &reason });
        }
        Ok(outcome)
    }

    /// Everything but RAM, of a paused machine.
    ///
    /// # Errors
    /// If KVM does not tell.
    pub fn state(&mut self, env: &HostEnvironment) -> Result<MachineState, RunError> {
        let Some(moment) = self.paused else {
            return Err(RunError::Usage("a machine must be paused before it is saved".to_owned()));
        };
        // Before the clock is locked: a traced tick asks it for the time.
        lock(&self.platform.judge).read_ring(&self.platform);
        let clock = lock(&self.platform.clock);
        let mut cpus = Vec::new();
        for (Cpu { vcpu, local }, cpuid) in self.cpus.iter_mut().zip(&self.cpuid) {
            vcpu.drain()?;
            // An STI shadow that the VMM tracks is in KVM's events too, or does not outlive the step that made it.
            let Local { index: _, apic, pvclock, tsc_adjust, halted, sti_shadow: _ } = local;
            let mut kvm = vcpu.state(&env.msrs)?;
            // KVM's copy of CR8 is only as fresh as the last entry.
            kvm.system.cr8 = u64::from(apic.cr8());
            cpus.push(CpuState {
                cpuid: cpuid.clone(),
                apic_config: *apic.config(),
                kvm,
                apic: apic.state(clock.now(*tsc_adjust)),
                pvclock: pvclock.state(),
                tsc_adjust: *tsc_adjust,
                halted: *halted,
            });
        }
        let mut clock_state = clock.state();
        clock_state.moment = moment;
        Ok(MachineState {
            machine: MachineSection { image: self.image.clone(), time: clock.mode(), source: clock.source() },
            clock: clock_state,
            cpus,
            devices: DevicesState {
                serial: lock(&self.platform.devices).serial_state(),
                wall: lock(&self.platform.wall).state(),
            },
            sites: self.all_sites.state(),
            judge: lock(&self.platform.judge).state(),
        })
    }

    /// Shows `what` the guest's RAM with its own instructions at trap sites.
    pub fn with_original_code<R>(&self, what: impl FnOnce(&GuestMemoryMmap) -> R) -> R {
        self.platform.sites.unpatch(&self.platform.memory);
        let result = what(&self.platform.memory);
        self.platform.sites.patch(&self.platform.memory);
        result
    }

    /// What the vCPUs share.
    #[must_use]
    pub fn platform(&self) -> &Platform {
        &self.platform
    }

    /// The image it was booted from.
    #[must_use]
    pub fn image(&self) -> &str {
        &self.image
    }

    /// Which TSC source, and why, for people.
    #[must_use]
    pub fn source_and_why(&self) -> (TscSource, &str) {
        (lock(&self.platform.clock).source(), &self.why)
    }

    /// Whether it stands still.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        self.paused.is_some()
    }

    /// Restores in this process so far.
    #[must_use]
    pub fn migrations(&self) -> u64 {
        self.migrations
    }
}

/// Every feature that the guest saw must be here, whether KVM or we provide it.
fn check_features(env: &HostEnvironment, cpu: &CpuState, chosen: &Chosen) -> Result<(), RunError> {
    let mut missing = cpuid::missing(&cpu.cpuid, &env.supported);
    if cpu.apic_config.x2apic && !env.facts.x2apic_exits {
        missing.push("x2apic (its MSRs do not exit on this host)".to_owned());
    }
    if cpu.apic_config.tsc_deadline && !chosen.tsc_deadline {
        missing.push("tsc_deadline_timer (this host swallows its MSR)".to_owned());
    }
    if missing.is_empty() { Ok(()) } else { Err(RunError::MissingFeatures(missing)) }
}
