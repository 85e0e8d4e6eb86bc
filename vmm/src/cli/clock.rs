//! `vmm clock`.

use std::{process::ExitCode, sync::Arc, time::Duration};

use guest_image::GUEST_ELF;
use lab::{
    clock::{self, Options, Stops},
    recipe::{VMCLOCK_KEPT, step::Destination},
    report,
};
use machine::{
    BootOptions, HostEnvironment, Policies, RunError, TimeMode, boot::Image, host::job_control::fork_and_continue,
    policy::restorer::Restorer,
};
use vmtime::DowntimePolicy;

use super::{
    clock_args::Clock,
    exit::{Error, OrFailed, Result},
    output::{self, OutFile},
    progress::Progress,
    sweep::{CANCEL, wait_for_signals},
    sweep_args::Fault,
    text::Text,
};

/// What the embedded guest does by default: ticks without end, each armed with a deadline in guest TSC.
const CMDLINE: &str = "clockevent=kvm-tsc-deadline scenario=idle";
/// The same for several vCPUs: more ticks than any measurement has stops.
const CMDLINE_SMP: &str = "clockevent=kvm-tsc-deadline scenario=smp count=1000000000";

/// Runs `vmm clock`.
pub fn run(args: &Clock) -> Result<ExitCode> {
    // First of all: the process has only this thread yet.
    if args.gaps.is_some()
        && let Some(code) =
            fork_and_continue(args.gap_length).or_failed(|| "cannot start the process that is stopped")?
    {
        return Ok(ExitCode::from(code));
    }
    output::distinct(&[("json", args.output.json.as_deref()), ("report", args.report.report.as_deref())])?;
    let image = match &args.guest {
        Some(path) => Image::open(path),
        None => Image::parse("the embedded guest".to_owned(), GUEST_ELF.to_vec()),
    };
    let image = image.map_err(RunError::from)?;
    if args.inject.as_ref().is_some_and(|fault| fault.name == VMCLOCK_KEPT) {
        return Err(Error::usage(
            "--inject vmclock-kept: the guest of vmm clock has no VMClock; vmm sweep --vmclock on shows this fault",
        ));
    }
    let options = options(args);
    let json = OutFile::open("json", args.output.json.as_deref())?;
    let report = OutFile::open("report", args.report.report.as_deref())?;
    wait_for_signals()?;
    let env = HostEnvironment::open(None)?;
    let mut bar = Progress::new("stops", &args.heartbeat);
    let findings = clock::measure(&env, &image, &options, &CANCEL, &|done, wanted| bar.at(done, wanted))?;
    bar.finish();
    let quiet = [&json, &report].into_iter().flatten().any(OutFile::is_stdout);
    let failed = args.fail_on.failed(&findings);
    if let Some(file) = json {
        file.write(&output::json(&findings)?)?;
    }
    if let Some(file) = report {
        file.write(report::clock::page(&findings, &failed, &output::command_line()).render().as_bytes())?;
    }
    if !quiet {
        Text::from(clock::text::text(&findings)).print()?;
    }
    if !findings.complete {
        return Err(Error::failed(format!("interrupted after {} of {} stops", findings.made(), findings.setup.wanted)));
    }
    if failed.is_empty() { Ok(ExitCode::SUCCESS) } else { Err(Error::failed(failed.join("; "))) }
}

fn options(args: &Clock) -> Options {
    let usual = usual_cmdline(args.guest.is_some(), args.cpus);
    let (stops, count) = match (args.migrations, args.pauses, args.gaps) {
        (_, _, Some(gaps)) => (Stops::Gaps(args.gap_length), gaps),
        (_, Some(pauses), None) => (Stops::Pauses(args.pause_length), pauses),
        (migrations, None, None) => {
            (if args.in_place { Stops::InPlace } else { Stops::Migrations }, migrations.unwrap_or(100))
        }
    };
    Options {
        boot: BootOptions {
            memory: args.memory,
            cmdline: args.cmdline.clone().unwrap_or_else(|| usual.to_owned()),
            initrd: None,
            lapic: args.lapic.into(),
            time: TimeMode::from(args.time),
            source: args.tsc.into(),
            khz: args.tsc_khz,
            cpus: args.cpus,
            seed: args.seed,
            cpuid: machine::boot::cpuid_changes::CpuidChanges::default(),
            x2apic: true,
            pv_eoi: true,
            vmclock: false,
            acpi: machine::AcpiTables::Auto,
        },
        stops,
        count,
        every: args.every,
        khz_cycle: args.tsc_khz_cycle.clone(),
        policies: policies(args),
        inject: args.inject.as_ref().map(|fault| fault.name.clone()),
    }
}

/// The command line of a guest that is given none.
pub(super) fn usual_cmdline(own_guest: bool, cpus: u32) -> &'static str {
    match (own_guest, cpus) {
        (true, _) => "",
        (false, 1) => CMDLINE,
        (false, _) => CMDLINE_SMP,
    }
}

/// How the guest is resumed.
fn policies(args: &Clock) -> Policies {
    let given = Policies {
        deadline: args.deadline.into(),
        downtime: args.downtime.into(),
        downtime_length: args.downtime_length,
        restorer: None,
    };
    with_fault(given, args.inject.as_ref())
}

/// Policies under which each resume has this fault.
pub(super) fn with_fault(given: Policies, fault: Option<&Fault>) -> Policies {
    let Some(Fault { recipe, .. }) = fault else { return given };
    let restorer: Option<Arc<dyn Restorer>> = Some(Arc::new(recipe.clone()));
    match recipe.destination {
        // The clocks count on while the host is stopped.
        Destination::Same => Policies {
            downtime: DowntimePolicy::CatchUp,
            downtime_length: Some(Duration::from_nanos(recipe.hosts.downtime_ns)),
            restorer,
            ..given
        },
        Destination::Kvm | Destination::Vmm => Policies { restorer, ..given },
    }
}
