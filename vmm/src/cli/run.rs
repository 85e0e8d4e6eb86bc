//! Running a guest: from an image or from a snapshot.

use std::{
    io::{self, Write},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, Result};
use vmm::{
    boot::{self, Image},
    run::{BootOptions, HostEnvironment, Machine, Outputs, Policies, TimeMode, judge::Lateness, source::SourceChoice},
    session::{self, Cycle, Finish, Report, SessionError},
    snapshot::{
        self, Pager, SnapshotError,
        machine::{Loaded, Verify as Check},
    },
    time::{Khz, Length, VmTime},
};

use super::{
    args::{DebugExitStatus, OnOff, Restore, Run, Session, Verify},
    exit::{self, Failed},
    run_files::Files,
};

/// `vmm --guest`.
pub fn guest(args: &Run) -> Result<ExitCode> {
    let path = args.guest.as_deref().context("no guest")?;
    let image = Image::open(path).map_err(vmm::run::RunError::from)?;
    let initrd = match &args.initrd {
        Some(path) => Some(boot::read_file("initrd", path).map_err(vmm::run::RunError::from)?),
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
        x2apic: args.x2apic == OnOff::On,
        pv_eoi: args.pv_eoi == OnOff::On,
    };
    let files = Files::open(&args.session)?;
    let outputs = Outputs::new(Box::new(io::stdout()), files.trace());
    let mut machine = Machine::boot(&env, &image, &options, outputs)?;
    // They are in guest memory now.
    drop((image, options));
    if args.session.track_dirty {
        machine.track_changes(None)?;
    }
    session(&env, machine, None, &args.session, None, files)
}

/// `vmm restore`.
pub fn restore(args: &Restore) -> Result<ExitCode> {
    let name = || format!("snapshot {}", args.dir.display());
    let check = match args.verify {
        Verify::Now => Check::First,
        Verify::Background => Check::BeforeUse(last_word(name())),
    };
    let Loaded { state, host, id, memory, pager } = snapshot::machine::load(&args.dir, check).with_context(name)?;
    let mut env = HostEnvironment::open(args.session.emulate_host.map(Into::into))?;
    env.poll = Duration::from_nanos(args.session.poll_ns);
    env.spin_limit = args.session.spin_limit.0;
    if let Some(note) = host {
        env.recall(note);
    }
    let time = args.time.map_or(state.machine.time, TimeMode::from);
    let khz = args.tsc_khz.unwrap_or(state.clock.moment.khz);
    let choice = match args.session.tsc.into() {
        // A trapped TSC goes on from its value; the host's would jump.
        SourceChoice::Auto => state.machine.source.choice_after(),
        fixed @ SourceChoice::Fixed(_) => fixed,
    };
    let files = Files::open(&args.session)?;
    let outputs = Outputs::new(Box::new(io::stdout()), files.trace());
    let mut machine = Machine::from_state(&env, &state, memory, choice, time, khz, outputs).with_context(name)?;
    if args.session.track_dirty {
        machine.track_changes(Some(id))?;
    }
    session(&env, machine, pager.as_ref(), &args.session, Some(khz), files).map_err(|error| match error.downcast() {
        Ok(SessionError::Damaged(error)) => anyhow::Error::new(error).context(name()),
        Ok(error) => error.into(),
        Err(error) => error,
    })
}

/// For damaged memory that keeps every thread waiting that could end the VM in good order.
fn last_word(name: String) -> Box<dyn FnOnce(&SnapshotError) + Send> {
    Box::new(move |error| {
        let error = anyhow::Error::msg(error.to_string()).context(name);
        let _ = io::stderr().write_all(format!("vmm: {}\n", exit::one_line(&error)).as_bytes());
        std::process::exit(exit::USAGE.into());
    })
}

fn session(
    env: &HostEnvironment,
    machine: Machine,
    pager: Option<&Pager>,
    args: &Session,
    khz: Option<Khz>,
    files: Files,
) -> Result<ExitCode> {
    let (source, why) = machine.source_and_why();
    // In one write: standard error has no buffer.
    let _ = io::stderr().write_all(format!("vmm: TSC source {}: {why}\n", source.as_str()).as_bytes());
    let policies = Policies {
        khz,
        deadline: args.deadline.into(),
        downtime: args.downtime.into(),
        downtime_length: args.downtime_length,
        fault: None,
    };
    let options = session::Options {
        api_sock: args.api_sock.clone(),
        paused: args.paused,
        policies,
        save: args.save_at.map(vm_time).zip(args.save_to.clone()),
        migrate: args.migrate_every.map(|every| Cycle { every, khz: args.tsc_khz_cycle.clone() }),
        console: true,
        timeout: args.timeout,
    };
    session::block_signals().context("cannot block signals")?;
    let report = session::run(env, machine, pager, &options)?;
    tell(&report);
    files.write(&report)?;
    match &report.finish {
        Finish::Ended(_) if options.save.is_some() => {
            Err(Failed("the guest ended before --save-at: nothing was saved".to_owned()).into())
        }
        Finish::Ended(end) => Ok(exit::code_of_end(end, args.debug_exit_status == DebugExitStatus::Raw)),
        Finish::Stopped | Finish::Saved => Ok(ExitCode::SUCCESS),
        Finish::TimedOut { after, cpus } => {
            let after = Length(*after);
            let places = if cpus.is_empty() { String::new() } else { format!(": {}", cpus.join("; ")) };
            Err(Failed(format!("the guest has not ended after {after}{places}")).into())
        }
    }
}

fn vm_time(length: Duration) -> VmTime {
    VmTime(u64::try_from(length.as_nanos()).unwrap_or(u64::MAX))
}

fn tell(report: &Report) {
    let Report { finish, summary, costs: _, vm_ns, migrations, host_stops: _ } = report;
    let (late, host) = (&summary.late_by_guest, summary.late_by_host);
    let micros = |ns: u64| Length(Duration::from_nanos(ns / 1000 * 1000)).to_string();
    let by_host = |what: fn(Lateness) -> u64| host.map_or_else(|| "-".to_owned(), |late| micros(what(late)));
    if summary.ticks > 0 {
        eprintln!(
            "vmm: {} ticks, {} lost, {} woken early; late p99 {} worst {} by the guest, p99 {} worst {} by the host; clock \
             steps back {}; migrations {}; VM time {}",
            summary.ticks,
            summary.lost(matches!(finish, Finish::Ended(_))),
            summary.early_wakes,
            micros(late.p99_ns),
            micros(late.worst_ns),
            by_host(|late| late.p99_ns),
            by_host(|late| late.worst_ns),
            summary.clock_steps_back,
            migrations,
            micros(vm_ns.0),
        );
    }
    match finish {
        Finish::Ended(end) => {
            if let Some(message) = end.message() {
                eprintln!("vmm: {message}");
            }
        }
        Finish::Stopped => eprintln!("vmm: stopped"),
        Finish::Saved => eprintln!("vmm: saved"),
        // Said with the exit code.
        Finish::TimedOut { .. } => {}
    }
}
