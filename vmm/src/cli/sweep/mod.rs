//! `vmm sweep` and `vmm sweep merge`.

mod table;

use std::{
    fs,
    io::{self, IsTerminal, Write},
    path::Path,
    process::ExitCode,
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressStyle};
use nix::sys::signal::{SigSet, Signal};
use serde::Serialize;
use vmm::{
    boot::Image,
    guest_image::GUEST_ELF,
    run::{BootOptions, HostEnvironment, LapicKind, RunError, TimeMode, source::SourceChoice},
    sweep::{
        self, Depth, Options, SweepError, merge,
        result::{Findings, Target},
    },
};

use super::{
    args::OnOff,
    exit::{Failed, Usage},
    sweep_args::{Output, Sweep, SweepCommand},
};

/// `vmm sweep`.
pub fn run(args: &Sweep) -> Result<ExitCode> {
    match &args.command {
        Some(SweepCommand::Merge { files, output }) => merge_files(files, output),
        None if args.point.is_empty() => sweep_stretch(args),
        None => replay(args),
    }
}

fn image(args: &Sweep) -> Result<Image> {
    let image = match &args.guest {
        Some(path) => Image::open(path),
        None => Image::parse("the embedded guest".to_owned(), GUEST_ELF.to_vec()),
    };
    Ok(image.map_err(RunError::from)?)
}

fn options(args: &Sweep) -> Options {
    let native = args.cmdline.split_whitespace().any(|word| word == "clockevent=lapic-deadline");
    Options {
        boot: BootOptions {
            memory: args.memory,
            cmdline: args.cmdline.clone(),
            initrd: None,
            lapic: LapicKind::User,
            time: TimeMode::Virtual,
            source: SourceChoice::Auto,
            khz: Some(args.tsc_khz),
            cpus: args.cpus,
            seed: args.seed,
            x2apic: args.x2apic == OnOff::On,
        },
        khz: args.tsc_khz,
        from: args.from.clone(),
        to: args.to.clone(),
        every: args.every.into(),
        ratios: args.ratio.clone(),
        deadline: args.deadline.into(),
        downtime: args.downtime.into(),
        downtime_length: args.downtime_length,
        fault: args.inject,
        ticks: args.ticks.unwrap_or(if native { 2 } else { 1 }),
        depth: if args.depth == 1 { Depth::One } else { Depth::Two { samples: args.samples } },
        tolerance: args.tolerance,
        patience: args.patience,
        workers: args.workers,
        shard: args.shard,
    }
}

/// Ends a sweep in good order at the first SIGINT or SIGTERM; the second ends the program.
pub static CANCEL: AtomicBool = AtomicBool::new(false);

/// Call before any thread is started: they inherit the mask.
pub fn wait_for_signals() -> Result<()> {
    let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM].into_iter().collect();
    signals.thread_block().context("cannot block signals")?;
    let wait = move || {
        while signals.wait().is_ok() {
            if CANCEL.swap(true, Ordering::SeqCst) {
                std::process::exit(1);
            }
        }
    };
    thread::Builder::new().name("signals".to_owned()).spawn(wait).context("cannot start a thread")?;
    Ok(())
}

fn sweep_stretch(args: &Sweep) -> Result<ExitCode> {
    let (image, options) = (image(args)?, options(args));
    let output = args.output.open()?;
    wait_for_signals()?;
    let env = HostEnvironment::open(None)?;
    let bar = bar();
    let progress = |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    };
    let (findings, cost) = sweep::sweep(&env, &image, &options, &CANCEL, &progress)?;
    bar.finish_and_clear();
    eprintln!("vmm: {}", table::cost(&findings, &cost));
    if !findings.complete {
        eprintln!("vmm: interrupted: the result has the {} points that were tried", findings.points.len());
    }
    output.write(&findings, || table::print(&findings))?;
    verdict(&findings)
}

fn bar() -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} points, {per_sec}, {eta} left");
    let bar = if io::stderr().is_terminal() { ProgressBar::new(0) } else { ProgressBar::hidden() };
    bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

fn verdict(findings: &Findings) -> Result<ExitCode> {
    if !findings.complete {
        return Err(Failed("the sweep was interrupted".to_owned()).into());
    }
    if findings.is_good() { Ok(ExitCode::SUCCESS) } else { Err(Failed(table::in_a_word(findings)).into()) }
}

fn replay(args: &Sweep) -> Result<ExitCode> {
    let (image, options) = (image(args)?, options(args));
    wait_for_signals()?;
    let env = HostEnvironment::open(None)?;
    let ratio = options.ratios.first().ok_or_else(|| Usage("--ratio: name one".to_owned()))?;
    if (args.point.len() == 2) != (options.depth != Depth::One) {
        return Err(Usage("--point K is for --depth 1, --point K,J for --depth 2".to_owned()).into());
    }
    let target = Target { ratio: ratio.text.clone(), tsc_khz: ratio.of(options.khz)? };
    let replay = sweep::replay(&env, &image, &options, &args.point, &target, args.trace.as_deref(), &CANCEL)?;
    if args.output.json.is_some() {
        return Err(Usage("--json is for a sweep; what one point did is in its --trace".to_owned()).into());
    }
    println!("{}", table::replay(&replay));
    if replay.outcome.verdict.is_bad() {
        return Err(Failed(format!("point {}: {}", table::numbers(&replay.at), replay.outcome.verdict.as_str())).into());
    }
    Ok(ExitCode::SUCCESS)
}

fn merge_files(files: &[std::path::PathBuf], output: &Output) -> Result<ExitCode> {
    let shards: Vec<(String, Findings)> = files.iter().map(|path| read(path)).collect::<Result<_>>()?;
    let findings = merge::merge(shards).map_err(|error| Usage(error.to_string()))?;
    output.open()?.write(&findings, || table::print(&findings))?;
    verdict(&findings)
}

fn read(path: &Path) -> Result<(String, Findings)> {
    let name = path.display().to_string();
    let file = fs::File::open(path).map_err(|error| Usage(format!("{name}: {error}")))?;
    let findings = serde_json::from_reader(io::BufReader::new(file))
        .map_err(|error| Usage(format!("{name} is not the result of a sweep: {error}")))?;
    Ok((name, findings))
}

/// Where results go, opened: a file that cannot be written is better told before the work.
pub struct Opened<'a> {
    json: Option<(&'a Path, Box<dyn Write>)>,
}

impl Output {
    /// Opens the files.
    pub fn open(&self) -> Result<Opened<'_>> {
        let open = |path: &'_ Path| -> Result<Box<dyn Write>> {
            if path == Path::new("-") {
                return Ok(Box::new(io::stdout()));
            }
            let file = fs::File::create(path).map_err(|error| Usage(format!("--json {}: {error}", path.display())))?;
            Ok(Box::new(io::BufWriter::new(file)))
        };
        let json = self.json.as_deref().map(|path| open(path).map(|file| (path, file))).transpose()?;
        Ok(Opened { json })
    }
}

impl Opened<'_> {
    /// Writes the result, and prints the table unless the result goes to standard output.
    pub fn write(self, result: &impl Serialize, table: impl FnOnce()) -> Result<()> {
        let quiet = self.json.as_ref().is_some_and(|(path, _)| *path == Path::new("-"));
        if !quiet {
            table();
        }
        if let Some((path, mut file)) = self.json {
            serde_json::to_writer(&mut file, result)
                .map_err(io::Error::from)
                .and_then(|()| file.write_all(b"\n"))
                .and_then(|()| file.flush())
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(())
    }
}

/// What a sweep's error is to the user.
pub fn is_usage(error: &SweepError) -> bool {
    match error {
        SweepError::Usage(_) | SweepError::NoSymbol(_) | SweepError::SeveralSymbols { .. } => true,
        SweepError::TooLong { .. } => true,
        SweepError::Run(_)
        | SweepError::GuestEnded { .. }
        | SweepError::NotBack(_)
        | SweepError::Worker(_)
        | SweepError::Interrupted => false,
    }
}
