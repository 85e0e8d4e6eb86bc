//! Builds a machine: boots it from an image, or restores it from saved state.

use std::sync::{Arc, atomic::AtomicBool};

use guest_abi::sites::Kind;
use kvm_pv::WallRegistration;
use vmtime::{Khz, Moment};

use super::{
    Machine,
    audit::{GuestStoppedAudit, TickAudit},
    clock::Clock,
    config::{
        BootOptions, EmulatedHost, HostEnvironment, LapicKind, TimeMode,
        source::{Chosen, SourceChoice, TscSource},
    },
    downtime::Downtimes,
    error::RunError,
    instant::{HostInstant, Wall, wall_at},
    limits::MAX_CPUS,
    lock::Ranked,
    outputs::{self, Outputs},
    paused::Paused,
    record::{assists::Assists, counters::Counters, trace::Trace},
    sched::round_robin::RoundRobin,
    shared::{Shared, VcpuShared},
    state::{DevicesState, MachineSection, MachineState},
    vcpus::{NewVm, Vcpus, Wanted},
};
use crate::{
    boot::{self, Image, acpi::Hardware, cpuid, sites::Sites, unlisted::Unlisted},
    devices::Devices,
    host::clock::HostClock,
    mem::ram::{self, GuestRam},
    output::Outlet,
};

/// How a saved machine is to continue.
pub(crate) struct Continuation {
    pub choice: SourceChoice,
    pub time: TimeMode,
    pub khz: Khz,
    /// The stop, if it was in this process.
    pub paused: Option<Paused>,
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
        let BootOptions { cpus, lapic, vmclock, .. } = *options;
        let hardware = Hardware { cpus, ioapic: lapic == LapicKind::User, vmclock };
        let acpi = boot::acpi::provide(&memory, hardware, options.acpi.exist(image.ring().is_some(), vmclock));
        let acpi = acpi.map_err(|error| RunError::BadState(format!("the ACPI tables do not fit in RAM: {error}")))?;
        let entry = image.load(&memory, &options.cmdline, options.initrd.as_deref(), &acpi)?;
        let clock_for = |chosen: &Chosen| {
            let khz = Clock::new(chosen.source, options.time, host_clock, wanted).achievable_khz(wanted);
            Clock::new(chosen.source, options.time, host_clock, khz)
        };
        let khz = |chosen: &Chosen| clock_for(chosen).khz();
        let new = Vcpus::boot(env, image, options, &memory, &entry, (wanted, khz))?;
        let NewVm { chosen, vcpus, cpuids, vm } = new;
        let mut clock = clock_for(&chosen);
        let source = chosen.source;
        // Without a listed RDTSC the source cannot be `trapped`, so unlisted ones do no harm.
        let unlisted = if image.sites().has(Kind::Rdtsc) { image.unlisted() } else { Unlisted::default() };
        warn_of_unlisted(&unlisted, chosen.source, image.name());
        chosen.patched.patch(&memory);
        if env.facts()?.tsc_offset {
            clock.set_tsc_settable();
        }
        let now = HostInstant::now(host_clock);
        let moment = clock.moment(now);
        let mut devices = Devices::new(outputs.console);
        if entry.pc {
            devices = devices.after_firmware(boot::firmware::PIC_VECTORS, moment.vm);
        }
        let parts = Parts {
            clock,
            devices,
            wall: WallRegistration::default(),
            memory,
            sites: chosen.patched,
            audit: TickAudit::new(image.ring(), cpuids.len()),
            trace: outputs.trace.begin()?,
            outlets: outputs.outlets,
            cpus: cpuids.len(),
            // Without the flag user programs ask the kernel for the time, and it reads the TSC at a site. An RDTSC of
            // their own would return the host's TSC.
            tsc_stable: !image.sites().are_found() || source != TscSource::Trapped,
            lapic: options.lapic,
        };
        Ok(Self {
            round_robin: RoundRobin::new(options.seed, vcpus.user().len()),
            vcpus,
            shared: parts.into_shared(env),
            all_sites: image.sites().clone(),
            unpatched: Sites::default(),
            image: image.name().to_owned(),
            cpuid: cpuids,
            why: chosen.why,
            choice: options.source,
            paused: Some(Paused::here(moment, now)),
            resumed: None,
            has_run: false,
            migrations: 0,
            migrations_here: 0,
            downtimes: Downtimes::NONE,
            guest_stopped: GuestStoppedAudit::default(),
            unlisted,
            changes: None,
            vm,
        })
    }

    /// A machine as it was saved, paused; `memory` holds the guest's own instructions at trap sites.
    ///
    /// `khz` is the TSC frequency with which [`Self::resume`] continues: the source of the TSC depends on it.
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
        Self::restored(env, state, memory, Continuation { choice, time, khz, paused: None }, outputs)
    }

    /// As [`Self::from_state`].
    pub(crate) fn restored(
        env: &HostEnvironment,
        state: &MachineState,
        memory: Arc<GuestRam>,
        continuation: Continuation,
        outputs: Outputs,
    ) -> Result<Self, RunError> {
        let Continuation { choice, time, khz, paused } = continuation;
        let MachineState { machine, clock: saved_clock, cpus: saved_cpus, devices, sites, audit } = state;
        let MachineSection {
            image,
            time: saved_time,
            source: saved_source,
            order,
            tsc_stable,
            migrations,
            unlisted,
            found_sites,
        } = machine;
        let unlisted = Unlisted::from_state(unlisted);
        let in_process = paused.is_some();
        let count = u32::try_from(saved_cpus.count()).unwrap_or(u32::MAX);
        if !(1..=MAX_CPUS).contains(&count) {
            return Err(RunError::Cpus(count));
        }
        let all_sites = Sites::from_state(sites)?.found(*found_sites);
        all_sites.check(&memory)?;
        let mut moment = saved_clock.moment;
        if (*saved_time, time) == (TimeMode::Virtual, TimeMode::Real) {
            // The machine was saved in virtual time, which has no wall clock. So the downtime begins now.
            let Wall { ns, tai_offset_s, error_ns } = wall_at(env.clock, HostInstant::now(env.clock));
            moment = Moment { wall_ns: ns, tai_offset_s, wall_error_ns: error_ns, ..moment };
        }
        let paused = paused.unwrap_or_else(|| Paused::saved(moment)).with_khz(khz);
        let stopped = paused.stopped_tsc(env.clock);
        let wanted = Wanted { image, sites: &all_sites, choice, time, khz, stopped };
        let NewVm { chosen, vcpus, cpuids, vm } = Vcpus::restore(env, saved_cpus, &memory, wanted)?;
        cpuid::check_vmclock(&cpuids).map_err(RunError::BadState)?;
        // A migration within the process has warned before, unless the TSC was not trapped until now.
        if !in_process || *saved_source != TscSource::Trapped {
            warn_of_unlisted(&unlisted, chosen.source, image);
        }
        chosen.patched.patch(&memory);
        let source = chosen.source;
        let host_clock = host_clock(env, saved_cpus.lapic());
        let mut clock = Clock::from_state(chosen.source, time, host_clock, saved_clock);
        if env.facts()?.tsc_offset {
            clock.set_tsc_settable();
        }
        let since = moment.vm;
        let DevicesState { serial, pic, pit, ioapic, rtc, wall } = devices;
        let devices_now = Devices::from_state(&(serial.clone(), *pic, *ioapic, *pit, *rtc), outputs.console)
            .ok_or_else(|| RunError::BadState("a device cannot be in its saved state".to_owned()))?;
        let parts = Parts {
            clock,
            devices: devices_now,
            wall: WallRegistration::from_state(*wall),
            memory,
            sites: chosen.patched,
            audit: TickAudit::from_state(audit, saved_cpus.count(), since),
            trace: outputs.trace.begin()?,
            outlets: outputs.outlets,
            cpus: saved_cpus.count(),
            // A host that did not trap the TSC may have told user programs that they may read it.
            tsc_stable: *tsc_stable && (!found_sites || source != TscSource::Trapped),
            lapic: saved_cpus.lapic(),
        };
        Ok(Self {
            round_robin: RoundRobin::from_state(*order, vcpus.user().len()),
            vcpus,
            shared: parts.into_shared(env),
            all_sites,
            unpatched: Sites::default(),
            image: image.clone(),
            cpuid: cpuids,
            why: chosen.why,
            choice,
            paused: Some(paused),
            resumed: None,
            has_run: true,
            migrations: migrations.saturating_add(1),
            migrations_here: 0,
            downtimes: Downtimes::NONE,
            guest_stopped: GuestStoppedAudit::default(),
            unlisted,
            changes: None,
            vm,
        })
    }
}

/// Logs a warning if the guest has RDTSC instructions that are no trap sites while the VMM emulates RDTSC: they return
/// the host's TSC.
fn warn_of_unlisted(unlisted: &Unlisted, source: TscSource, image: &str) {
    if source == TscSource::Trapped && !unlisted.is_empty() {
        let reads = if unlisted.any_is_sure() { "reads" } else { "may read" };
        log::warn!(
            "guest image {image} {reads} the TSC where its trap-site table has no entry, and gets the host's there, \
             not its own: {unlisted}"
        );
    }
}

/// The host's clock for a machine with these local APICs. KVM's kvmclock runs at the host's true frequency, so with it
/// an assumed one is not used.
fn host_clock(env: &HostEnvironment, lapic: LapicKind) -> HostClock {
    match lapic {
        LapicKind::User => env.clock,
        LapicKind::Kvm => env.clock.as_it_is(),
    }
}

/// The parts of [`Shared`] that depend on the machine, and neither on the host nor begin empty.
struct Parts {
    clock: Clock,
    devices: Devices,
    wall: WallRegistration,
    memory: Arc<GuestRam>,
    sites: Sites,
    audit: TickAudit,
    trace: Trace,
    outlets: Vec<Outlet>,
    cpus: usize,
    tsc_stable: bool,
    lapic: LapicKind,
}

impl Parts {
    fn into_shared(self, env: &HostEnvironment) -> Shared {
        let Self { clock, devices, wall, memory, sites, audit, trace, outlets, cpus, tsc_stable, lapic } = self;
        let vcpus: Vec<VcpuShared> = (0..cpus).map(|_| VcpuShared::default()).collect();
        Shared {
            audit: Ranked::new(audit),
            last_known_running: Ranked::new(HostInstant::now(clock.host())),
            clock: Ranked::new(clock),
            devices: Ranked::new(devices),
            wall: Ranked::new(wall),
            gap: Ranked::default(),
            warned_msrs: Ranked::default(),
            memory,
            sites,
            outlets: outputs::outlets(outlets, &trace, &vcpus),
            trace,
            vcpus,
            stopping: AtomicBool::new(false),
            tsc_stable: AtomicBool::new(tsc_stable),
            swallow_deadline: env.emulated == Some(EmulatedHost::SwallowDeadline),
            poll: env.poll,
            spin_limit: env.spin_limit,
            start_pages_released: AtomicBool::new(false),
            lapic,
            costs: Counters::default(),
            assists: Assists::default(),
            user_syscall: Arc::clone(&env.user_syscall),
        }
    }
}
