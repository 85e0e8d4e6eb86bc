//! `vmm sweep` and `vmm sweep merge`.

mod recipes;
mod table;

use std::{
    io,
    path::Path,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use guest_image::GUEST_ELF;
use lab::{
    recipe::{Recipe, VMCLOCK_KEPT, step::Destination},
    report::{self, cases::Suite},
    sweep::{
        self, Depth, Options, Ratio, merge,
        result::{Findings, Target},
    },
};
use machine::{
    BootOptions, HostEnvironment, LapicKind, RunError, TimeMode, TraceTo,
    boot::{self, Image},
    config::source::SourceChoice,
    host::regular_file,
};
use nix::sys::signal::{SigSet, Signal};

use super::{
    args::OnOff,
    exit::{Error, OrFailed, Result},
    output::{self, CaseFiles, OutFile, ReportFile, Results},
    progress::Progress,
    sites,
    sweep_args::{Output, Sweep, SweepCommand},
    text::Text,
};

/// `vmm sweep`.
pub fn run(args: &Sweep) -> Result<ExitCode> {
    match &args.command {
        Some(SweepCommand::Merge { files, output, report, cases }) => merge_files(files, output, report, cases),
        None if args.recipe.as_deref() == Some("list") => recipes::list(args.tsc_khz),
        None if args.point.is_empty() => sweep_stretch(args),
        None => replay(args),
    }
}

fn image(args: &Sweep) -> Result<Image> {
    let image = match &args.guest {
        Some(path) => Image::open(path),
        None => Image::parse("the embedded guest".to_owned(), GUEST_ELF.to_vec()),
    };
    sites::with_sites(image.map_err(RunError::from)?, args.sites.as_ref())
}

fn options(args: &Sweep, image: &Image) -> Result<Options> {
    let blind = args.inject.as_ref().is_some_and(|fault| fault.name == VMCLOCK_KEPT) && args.vmclock == OnOff::Off;
    if blind {
        return Err(Error::usage(
            "--inject vmclock-kept: only a guest that has VMClock and looks at it can notice; give it --vmclock on, and the \
             embedded guest --cmdline vmclock=on",
        ));
    }
    let recipe = match &args.inject {
        Some(fault) => Some(fault.recipe.clone()),
        None => args.recipe.as_deref().map(Recipe::named_or_file).transpose()?,
    };
    let recipe = recipe.map(Arc::new);
    // The error of `lapic-deadline` is in what it arms after the migration, and the watchdog's check comes after its
    // tick.
    let second = ["clockevent=lapic-deadline", "scenario=watchdog"];
    let two = image.ring().is_none() || args.cmdline.split_whitespace().any(|word| second.contains(&word));
    let initrd = args.initrd.as_ref().map(|path| boot::read_initrd(path, args.memory)).transpose();
    Ok(Options {
        boot: BootOptions {
            memory: args.memory,
            cmdline: args.cmdline.clone(),
            initrd: initrd.map_err(RunError::from)?,
            lapic: LapicKind::User,
            time: TimeMode::Virtual,
            source: SourceChoice::Auto,
            khz: Some(args.tsc_khz),
            cpus: args.cpus,
            seed: args.seed,
            cpuid: args.cpuid.clone().unwrap_or_default(),
            x2apic: args.x2apic == OnOff::On,
            pv_eoi: true,
            vmclock: args.vmclock == OnOff::On,
            acpi: machine::AcpiTables::Auto,
        },
        khz: args.tsc_khz,
        from: args.from.clone(),
        to: args.to.clone(),
        every: args.every.into(),
        ratios: ratios(args, recipe.as_deref()),
        deadline: args.deadline.into(),
        downtime: args.downtime.into(),
        downtime_length: args.downtime_length,
        recipe,
        inject: args.inject.as_ref().map(|fault| fault.name.clone()),
        ticks: args.ticks.unwrap_or(if two { 2 } else { 1 }),
        depth: if args.depth == 1 { Depth::One } else { Depth::Two { samples: args.samples } },
        tolerance: args.tolerance,
        patience: args.patience,
        workers: args.workers,
        shard: args.shard,
    })
}

/// The frequencies to migrate to.
fn ratios(args: &Sweep, recipe: Option<&Recipe>) -> Vec<Ratio> {
    if !args.ratio.is_empty() {
        return args.ratio.clone();
    }
    let usual: &[&str] = match recipe.map(|recipe| recipe.destination) {
        None | Some(Destination::Vmm) => &["0.5", "2"],
        Some(Destination::Kvm | Destination::Same) => &["1"],
    };
    usual.iter().filter_map(|text| text.parse().ok()).collect()
}

/// Ends a sweep in good order at the first SIGINT or SIGTERM; the second ends the program.
pub static CANCEL: AtomicBool = AtomicBool::new(false);

/// Call before any thread is started: they inherit the mask.
pub fn wait_for_signals() -> Result<()> {
    let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM].into_iter().collect();
    signals.thread_block().or_failed(|| "cannot block signals")?;
    let wait = move || {
        // Some programs signal both the process and its group: two signals in short order count as one.
        const ONE_WISH: Duration = Duration::from_secs(1);
        let mut first = None;
        while signals.wait().is_ok() {
            CANCEL.store(true, Ordering::SeqCst);
            if first.get_or_insert_with(Instant::now).elapsed() > ONE_WISH {
                std::process::exit(1);
            }
        }
    };
    thread::Builder::new().name("signals".to_owned()).spawn(wait).or_failed(|| "cannot start a thread")?;
    Ok(())
}

fn sweep_stretch(args: &Sweep) -> Result<ExitCode> {
    let mut files = Files::open(&args.output, &args.report, &args.cases)?;
    let ended = carry_out(args, &mut files);
    files.results.with_error("vmm sweep", ended)
}

fn carry_out(args: &Sweep, files: &mut Files) -> Result<ExitCode> {
    let image = image(args)?;
    let options = options(args, &image)?;
    wait_for_signals()?;
    let env = HostEnvironment::open(args.emulate_host.map(Into::into))?;
    let mut bar = Progress::new("points", &args.heartbeat);
    let progress = |done, total| bar.at(done, total);
    let (findings, cost) = sweep::sweep(&env, &image, &options, &CANCEL, &progress)?;
    bar.finish();
    machine::say!("vmm: {}", table::cost(&findings, &cost));
    if !findings.complete {
        machine::say!("vmm: interrupted: the result has the {} points that were tried", findings.points.len());
    }
    files.write(&findings)?;
    verdict(&findings)
}

fn verdict(findings: &Findings) -> Result<ExitCode> {
    if !findings.complete {
        return Err(Error::failed("the sweep was interrupted"));
    }
    if findings.is_good() { Ok(ExitCode::SUCCESS) } else { Err(Error::failed(table::in_a_word(findings))) }
}

fn replay(args: &Sweep) -> Result<ExitCode> {
    let files = [("json", args.output.json.as_deref()), ("report", args.report.report.as_deref())];
    if let Some((flag, _)) = files.into_iter().chain(args.cases.named()).find(|(_, path)| path.is_some()) {
        let why = format!("--{flag} is for a whole sweep: with --point, what that one point did is in its --trace");
        return Err(Error::usage(why));
    }
    if args.ratio.len() > 1 {
        return Err(Error::usage(format!("--point tries one ratio, and --ratio names {}: name one", args.ratio.len())));
    }
    let image = image(args)?;
    let options = options(args, &image)?;
    wait_for_signals()?;
    let env = HostEnvironment::open(args.emulate_host.map(Into::into))?;
    let ratio = options.ratios.first().ok_or_else(|| Error::usage("--ratio: name one"))?;
    if (args.point.len() == 2) != (options.depth != Depth::One) {
        return Err(Error::usage("--point K is for --depth 1, --point K,J for --depth 2"));
    }
    let target = Target { ratio: ratio.text.clone(), tsc_khz: ratio.of(options.khz)? };
    let (trace, quiet) = match &args.trace {
        Some(path) if output::is_stdout(path) => (TraceTo::Stdout, true),
        Some(path) => (TraceTo::File(path.clone()), false),
        None => (TraceTo::Nowhere, false),
    };
    let replay = sweep::replay(&env, &image, &options, &args.point, &target, trace, &CANCEL)?;
    if !quiet {
        let mut text = Text::default();
        text.line(table::replay(&replay));
        text.print()?;
    }
    if replay.outcome.verdict.is_bad() {
        return Err(Error::failed(format!(
            "point {}: {}",
            table::numbers(&replay.at),
            replay.outcome.verdict.as_str()
        )));
    }
    Ok(ExitCode::SUCCESS)
}

/// Limit for a result file. That of a sweep with a million points has some MiB.
const MAX_RESULT_BYTES: u64 = 256 << 20;

fn merge_files(
    files: &[std::path::PathBuf],
    output: &Output,
    report: &ReportFile,
    cases: &CaseFiles,
) -> Result<ExitCode> {
    let mut results = Files::open(output, report, cases)?;
    let shards: Vec<(String, Findings)> = files.iter().map(|path| read(path)).collect::<Result<_>>()?;
    let findings = merge::merge(shards)?;
    results.write(&findings)?;
    verdict(&findings)
}

fn read(path: &Path) -> Result<(String, Findings)> {
    let name = path.display().to_string();
    let (file, bytes) = regular_file::open_regular(path).map_err(|error| Error::usage(format!("{name}: {error}")))?;
    if bytes > MAX_RESULT_BYTES {
        return Err(Error::usage(format!("{name}: larger than {MAX_RESULT_BYTES} bytes, which no result is")));
    }
    let findings = serde_json::from_reader(io::BufReader::new(file))
        .map_err(|error| Error::usage(format!("{name} is not the result of a sweep: {error}")))?;
    Ok((name, findings))
}

/// The result files of a sweep.
struct Files {
    json: Option<OutFile>,
    results: Results,
}

impl Files {
    fn open(output: &Output, report: &ReportFile, cases: &CaseFiles) -> Result<Self> {
        let own = [("json", output.json.as_deref()), ("report", report.report.as_deref())];
        output::distinct(&own.into_iter().chain(cases.named()).collect::<Vec<_>>())?;
        Ok(Self { json: OutFile::open("json", output.json.as_deref())?, results: Results::open(report, cases)? })
    }

    /// Writes all results; the table goes to standard output unless another result does.
    fn write(&mut self, findings: &Findings) -> Result<()> {
        let quiet = self.results.use_stdout() || self.json.as_ref().is_some_and(OutFile::is_stdout);
        if let Some(file) = self.json.take() {
            file.write(&output::json(findings)?)?;
        }
        let page = || report::sweep::page(findings, &output::command_line());
        self.results.write(page, || Suite::of_sweep(findings))?;
        // The table is last: a closed pipe at standard output must not keep the files from being written.
        if quiet { Ok(()) } else { table::text(findings).print() }
    }
}
