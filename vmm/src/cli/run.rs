//! Runs a guest, from an image or from a snapshot.

use std::{io, path::Path, process::ExitCode, time::Duration};

use machine::{
    BootOptions, End, HostEnvironment, Machine, Outputs, Policies, TimeMode,
    audit::checks::Evidence,
    blame::Blamed,
    boot::{self, Image},
    config::source::SourceChoice,
    devices::GuestExit,
    output::{AT_END, FinishLimit, Outlet, Sink, WhenFull},
    session::{self, Cycle, Finish, Report, SessionError},
    snapshot::{
        self, Pager, SnapshotError,
        machine::{Loaded, MemoryFiles, Verify as Check},
    },
};
use vmtime::{Length, VmTime};

use super::{
    args::{ConsoleFull, DebugExitStatus, OnOff, Restore, Run, Session, Verify},
    closing,
    exit::{self, About, Codes, Error, OrFailed, Result},
    run_files::Files,
    sites,
    text::{LINE_CHARS, printable},
};

/// Runs `vmm --guest`.
pub fn guest(args: &Run) -> Result<ExitCode> {
    let path = args.guest.as_deref().ok_or_else(|| Error::failed("no guest"))?;
    let name = format!("vmm --guest {}", path.display());
    let mut files = Files::open(&args.session)?;
    let ended = boot(args, path, &name, &mut files);
    files.with_error(&name, ended)
}

fn boot(args: &Run, path: &Path, name: &str, files: &mut Files) -> Result<ExitCode> {
    let image = Image::open(path).map_err(machine::RunError::from)?;
    let image = sites::with_sites(image, args.sites.as_ref())?;
    let initrd = match &args.initrd {
        Some(path) => Some(boot::read_initrd(path, args.memory).map_err(machine::RunError::from)?),
        None => None,
    };
    let mut env = HostEnvironment::open(args.session.emulate_host.map(Into::into))?;
    env.poll = Duration::from_nanos(args.session.poll_ns);
    env.spin_limit = args.session.spin_limit.0;
    let options = BootOptions {
        memory: args.memory,
        cmdline: args.cmdline.clone().unwrap_or_default(),
        initrd,
        lapic: args.lapic.into(),
        time: args.time.map_or(TimeMode::Real, TimeMode::from),
        source: args.session.tsc.into(),
        khz: args.tsc_khz,
        cpus: args.cpus,
        seed: args.seed,
        cpuid: args.cpuid.clone().unwrap_or_default(),
        x2apic: args.x2apic == OnOff::On,
        pv_eoi: args.pv_eoi == OnOff::On,
        vmclock: args.vmclock == OnOff::On,
        acpi: args.acpi.into(),
    };
    let console = console(&args.session, files);
    let outputs = Outputs::to_outlet(console.clone(), files.trace());
    let mut machine = Machine::boot(&env, &image, &options, outputs)?;
    // They are in guest memory now.
    drop((image, options));
    if args.session.track_dirty {
        machine.track_changes(None)?;
    }
    let destinations = Destinations { name, files, console };
    session(&env, machine, None, &args.session, destinations, || Ok(()))
}

/// Runs `vmm restore`.
pub fn restore(args: &Restore) -> Result<ExitCode> {
    let name = format!("vmm restore {}", args.dir.display());
    let mut files = Files::open(&args.session)?;
    let ended = load_and_go_on(args, &name, &mut files);
    files.with_error(&name, ended)
}

fn load_and_go_on(args: &Restore, command: &str, files: &mut Files) -> Result<ExitCode> {
    let name = || format!("snapshot {}", args.dir.display());
    let check = match args.verify {
        Verify::Now => Check::First,
        Verify::Background => Check::BeforeUse(exit_on_damage(name())),
    };
    let Loaded { state, host, id, memory, files: memory_files, pager } =
        snapshot::machine::load(&args.dir, check).about(name)?;
    let mut env = HostEnvironment::open(args.session.emulate_host.map(Into::into))?;
    env.poll = Duration::from_nanos(args.session.poll_ns);
    env.spin_limit = args.session.spin_limit.0;
    if let Some(note) = host {
        env.use_fingerprint(note);
    }
    let time = args.time.map_or(state.machine.time, TimeMode::from);
    let khz = args.tsc_khz.unwrap_or(state.clock.moment.khz);
    let choice = match args.session.tsc.into() {
        // A trapped TSC must stay trapped: it continues from its saved value, the host's TSC would jump.
        SourceChoice::Auto => state.machine.source.choice_after(),
        fixed @ SourceChoice::Fixed(_) => fixed,
    };
    let console = console(&args.session, files);
    let outputs = Outputs::to_outlet(console.clone(), files.trace());
    let mut machine = Machine::from_state(&env, &state, memory, choice, time, khz, outputs).about(name)?;
    if args.session.track_dirty {
        machine.track_changes(Some(id))?;
    }
    let source = Source { name: name(), files: memory_files, pager };
    let destinations = Destinations { name: command, files, console };
    session(&env, machine, Some(&source), &args.session, destinations, || Ok(()))
}

/// The snapshot that a VM runs from.
pub(super) struct Source {
    name: String,
    files: MemoryFiles,
    pager: Option<Pager>,
}

impl Source {
    /// Returns the session's result. If damaged snapshot files are the cause of its failure, they are the error.
    fn check(&self, report: Result<Report, SessionError>) -> Result<Report> {
        if let Err(SessionError::Damaged(error)) = report {
            return Err(Error::from(error).about(&self.name));
        }
        let lost = report.as_ref().err().and_then(|error| match error {
            SessionError::Run(error) | SessionError::Snapshot(SnapshotError::Run(error)) if error.is_lost_memory() => {
                Some(error.to_string())
            }
            _ => None,
        });
        self.files.check(lost).about(|| &self.name)?;
        Ok(report?)
    }
}

/// Ends the process if the snapshot's memory is damaged. The vCPU threads may then wait for memory that never comes, so
/// that the VM cannot be shut down.
fn exit_on_damage(name: String) -> Box<dyn FnOnce(&SnapshotError) + Send> {
    Box::new(move |error| {
        let error = Error::new(error.blame(), error).about(name);
        machine::say!("vmm: {}", error.one_line());
        let _ = machine::output::stderr().finish(AT_END);
        std::process::exit(exit::code(error.blame()).into());
    })
}

/// The destinations of a session's console and results.
pub(super) struct Destinations<'a> {
    /// The command that was run, for results.
    pub(super) name: &'a str,
    pub(super) files: &'a mut Files,
    pub(super) console: Outlet,
}

/// Runs a machine to its end. `before` is called when all is ready, and before the guest runs.
pub(super) fn session(
    env: &HostEnvironment,
    machine: Machine,
    restored: Option<&Source>,
    args: &Session,
    destinations: Destinations<'_>,
    before: impl FnOnce() -> std::result::Result<(), SessionError>,
) -> Result<ExitCode> {
    let Destinations { name, files, console } = destinations;
    let raw = args.debug_exit_status == DebugExitStatus::Raw;
    if raw && args.cases.exit_codes != Codes::Vmm {
        return Err(Error::usage("--exit-codes and --debug-exit-status raw: both say what the exit code is, name one"));
    }
    let (source, why) = machine.source_and_why();
    machine::say!("vmm: TSC source {}: {}", source.as_str(), printable(why, LINE_CHARS));
    machine.check_downtime(args.downtime.into())?;
    let policies = Policies {
        deadline: args.deadline.into(),
        downtime: args.downtime.into(),
        downtime_length: args.downtime_length,
        restorer: None,
    };
    let options = session::Options {
        api_sock: args.api_sock.clone(),
        paused: args.paused,
        policies,
        save: args.save_at.map(vm_time).zip(args.save_to.clone()),
        migrate: args.migrate_every.map(|every| Cycle { every, khz: args.tsc_khz_cycle.clone() }),
        console: true,
        timeout: args.timeout,
        heartbeat: args.heartbeat.interval(),
    };
    session::block_signals().or_failed(|| "cannot block signals")?;
    let report = session::run_after(env, machine, restored.and_then(|source| source.pager.as_ref()), &options, before);
    finish_console(&console, report.as_ref().map_or(AT_END, |report| report.finish.finish_limit()));
    let report = match restored {
        Some(source) => source.check(report)?,
        None => report?,
    };
    let failed = failed(&report, options.save.is_some());
    let checks = args.fail_on.clone().unwrap_or_default();
    let verdict = checks.verdict(&Evidence {
        ticks: report.summary.as_ref(),
        timer: report.timer.as_ref(),
        guest_stopped: report.guest_stopped,
        wall_error_ns: report.wall_error_ns,
        vmclock_error_ns: report.vmclock_error_ns,
        no_ring: &report.no_ring,
        // Ticks that a crashed guest did not make are not lost ones: `failed` reports the crash.
        ended: matches!(report.finish, Finish::Ended(_)) && failed.is_none(),
        failed: failed.as_deref(),
    });
    if let Some(line) = closing::line(&report, &verdict) {
        machine::say!("vmm: {line}");
    }
    match &report.finish {
        Finish::Stopped => machine::say!("vmm: stopped"),
        Finish::Saved => machine::say!("vmm: saved"),
        Finish::Moved { to, figures } => machine::say!("vmm: moved to {to}: {}", closing::moved(figures)),
        // `failed` holds how it ended.
        Finish::Ended(_) | Finish::TimedOut { .. } => {}
    }
    files.write(name, &report, &verdict)?;
    // A failed trace is reported only now, after the other results are written.
    report.trace?;
    match &report.finish {
        // With --debug-exit-status raw the guest's own status is the exit status, whatever the checks found.
        Finish::Ended(end @ End::Guest(GuestExit::Debug(_))) if raw && options.save.is_none() => {
            verdict.reasons.iter().for_each(|reason| machine::say!("vmm: {reason}"));
            Ok(exit::code_of_end(end, raw))
        }
        _ if verdict.pass => Ok(ExitCode::SUCCESS),
        _ => Err(Error::failed(verdict.reasons.join("; "))),
    }
}

/// Why the run failed, apart from its ticks; none if it did not.
fn failed(report: &Report, was_to_save: bool) -> Option<String> {
    match &report.finish {
        Finish::Ended(end) => {
            let message = end.message();
            let early = was_to_save.then(|| "the guest ended before --save-at: nothing was saved".to_owned());
            let both: Vec<String> = message.into_iter().chain(early).collect();
            (!both.is_empty()).then(|| both.join("; "))
        }
        Finish::Stopped | Finish::Saved | Finish::Moved { .. } => None,
        Finish::TimedOut { after, cpus } => {
            let after = Length(*after);
            let places = if cpus.is_empty() { String::new() } else { format!(": {}", cpus.join("; ")) };
            Some(format!("the guest has not ended after {after}{places}"))
        }
    }
}

/// Size of the console's buffer, for a slow reader.
const CONSOLE_BYTES: usize = 1 << 20;

/// The guest's console: standard output, or standard error if a result is there.
pub(super) fn console(args: &Session, files: &Files) -> Outlet {
    let when_full = match args.console_full {
        ConsoleFull::Wait => WhenFull::Wait,
        ConsoleFull::Drop => WhenFull::Drop,
    };
    let sink = if files.use_stdout() { Sink::inherited(io::stderr()) } else { Sink::inherited(io::stdout()) };
    sink.map_or_else(Outlet::closed, |sink| Outlet::new(sink, CONSOLE_BYTES, when_full))
}

/// Writes the rest of the console's output, and reports how much is lost. A reader that closed its end is no error.
fn finish_console(console: &Outlet, limit: FinishLimit) {
    if let Err(error) = console.finish(limit)
        && error.kind() == io::ErrorKind::TimedOut
    {
        machine::say!("vmm: the end of the console's output is lost: {error}");
    }
    if console.dropped() > 0 {
        machine::say!(
            "vmm: {} bytes of the console's output were dropped, because they were not read",
            console.dropped()
        );
    }
}

fn vm_time(length: Duration) -> VmTime {
    VmTime(u64::try_from(length.as_nanos()).unwrap_or(u64::MAX))
}
