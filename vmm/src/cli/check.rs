//! `vmm check`.

use std::{
    fs::File,
    io::{self, Write},
    process::ExitCode,
    time::Duration,
};

use guest_image::GUEST_ELF;
use lab::{
    check::{
        self, Options,
        console::Console,
        judge,
        result::{Findings, Row, Setup, Verdict},
    },
    recipe::VMCLOCK_KEPT,
    report::cases::{Case, Failure, FailureKind, Suite},
};
use machine::{
    BootOptions, HostEnvironment, LapicKind, RunError, TimeMode,
    boot::{self, Image, find_sites::Kind},
};
use serde::Serialize;

use super::{
    check_args::{Check, Profile},
    clock,
    exit::{Error, Result},
    output::{self, OutFile, ReportFile, Results},
    progress::Progress,
    sites,
    sites_args::SitesFrom,
    sweep::{CANCEL, wait_for_signals},
    text::{LINE_CHARS, Text, printable},
};

/// The name of the command, for results.
const NAME: &str = "vmm check";
/// Columns of the table.
const WIDTH: usize = 96;
/// VM time that Linux has to end.
const LINUX_ENDS_WITHIN: Duration = Duration::from_secs(60);
/// What is late in virtual time.
const LATE: Duration = Duration::from_millis(1);

/// Findings and verdicts, as JSON.
#[derive(Serialize)]
struct Judged<'a> {
    #[serde(flatten)]
    findings: &'a Findings,
    checks: &'a [Row],
}

/// Runs `vmm check`.
pub fn run(args: &Check) -> Result<ExitCode> {
    let own = [("json", args.output.json.as_deref()), ("console", args.console.as_deref())];
    output::distinct(&own.into_iter().chain(args.cases.named()).collect::<Vec<_>>())?;
    let mut files = Files {
        json: OutFile::open("json", args.output.json.as_deref())?,
        results: Results::open(&ReportFile { report: None }, &args.cases)?,
    };
    let name = args.guest.as_ref().map_or_else(|| NAME.to_owned(), |path| format!("{NAME} --guest {}", path.display()));
    let ended = carry_out(args, &name, &mut files);
    files.results.with_error(&name, ended)
}

fn carry_out(args: &Check, name: &str, files: &mut Files) -> Result<ExitCode> {
    if args.inject.as_ref().is_some_and(|fault| fault.name == VMCLOCK_KEPT) {
        return Err(Error::usage(
            "--inject vmclock-kept: the guest of vmm check has no VMClock; vmm sweep --vmclock on shows this fault",
        ));
    }
    let image = image(args)?;
    let options = options(args)?;
    let to: Box<dyn Write + Send> = match &args.console {
        Some(path) => Box::new(
            File::create(path).map_err(|error| Error::usage(format!("--console {}: {error}", path.display())))?,
        ),
        None => Box::new(io::sink()),
    };
    let console = Console::new(to, args.wait_for.clone());
    wait_for_signals()?;
    let mut env = HostEnvironment::open(None)?;
    env.spin_limit = args.spin_limit.0;
    let mut bar = Progress::new("migrations", &args.heartbeat);
    let findings = check::check(&env, &image, &options, &console, &CANCEL, &|done, wanted| bar.at(done, wanted))?;
    bar.finish();
    let rows = judge::judge(&findings);
    files.write(name, &findings, &rows)?;
    let failed: Vec<&str> = rows.iter().filter(|row| row.verdict.fails()).map(|row| row.check).collect();
    if failed.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    let what = format!("{} of {} checks failed: {}", failed.len(), rows.len(), failed.join(", "));
    Err(Error::failed(what))
}

fn image(args: &Check) -> Result<Image> {
    let image = match &args.guest {
        Some(path) => Image::open(path),
        None => Image::parse("the embedded guest".to_owned(), GUEST_ELF.to_vec()),
    };
    let image = image.map_err(RunError::from)?;
    let needed = TimeMode::from(args.time) == TimeMode::Virtual && !image.sites().has(Kind::Rdtsc);
    let sites = args.sites.clone().or_else(|| needed.then_some(SitesFrom::Auto));
    sites::with_sites(image, sites.as_ref())
}

fn options(args: &Check) -> Result<Options> {
    let initrd = args.initrd.as_ref().map(|path| boot::read_initrd(path, args.memory)).transpose();
    let linux = args.profile == Profile::Linux;
    let given =
        args.cmdline.clone().unwrap_or_else(|| clock::usual_cmdline(args.guest.is_some(), args.cpus).to_owned());
    let cmdline = if linux { with_linux_words(&given, args.time.into()) } else { given };
    let late = match (args.late, TimeMode::from(args.time)) {
        (Some(late), _) => late.0,
        (None, TimeMode::Virtual) => Some(LATE),
        (None, TimeMode::Real) => None,
    };
    Ok(Options {
        boot: BootOptions {
            memory: args.memory,
            cmdline,
            initrd: initrd.map_err(RunError::from)?,
            lapic: LapicKind::User,
            time: args.time.into(),
            source: args.tsc.into(),
            khz: args.tsc_khz,
            cpus: args.cpus,
            seed: args.seed,
            cpuid: args.cpuid.clone().unwrap_or_default(),
            x2apic: true,
            pv_eoi: true,
            vmclock: false,
            acpi: machine::AcpiTables::Auto,
        },
        migrations: args.migrations,
        every: args.migrate_every,
        khz_cycle: args.tsc_khz_cycle.clone(),
        policies: clock::with_fault(
            machine::Policies {
                deadline: args.deadline.into(),
                downtime: args.downtime.into(),
                downtime_length: args.downtime_length,
                restorer: None,
            },
            args.inject.as_ref(),
        ),
        inject: args.inject.as_ref().map(|fault| fault.name.clone()),
        wait_for: args.wait_for.clone(),
        within: args.within,
        end_within: args.end_within.unwrap_or(if linux { LINUX_ENDS_WITHIN } else { Duration::ZERO }),
        late,
        linux,
    })
}

/// The command line with the words that Linux needs.
fn with_linux_words(cmdline: &str, time: TimeMode) -> String {
    let words = [
        ("console=", "console=ttyS0", true),
        ("panic=", "panic=-1", true),
        // An RDTSC in a program, that of the vDSO too, returns the host's TSC.
        ("vdso=", "vdso=0", time == TimeMode::Virtual),
    ];
    let mut cmdline = cmdline.to_owned();
    for (begin, word, needed) in words {
        if needed && !cmdline.split_whitespace().any(|given| given.starts_with(begin)) {
            let space = if cmdline.is_empty() { "" } else { " " };
            cmdline = format!("{cmdline}{space}{word}");
        }
    }
    cmdline
}

/// The result files.
struct Files {
    json: Option<OutFile>,
    results: Results,
}

impl Files {
    fn write(&mut self, name: &str, findings: &Findings, rows: &[Row]) -> Result<()> {
        let quiet = self.results.use_stdout() || self.json.as_ref().is_some_and(OutFile::is_stdout);
        if let Some(file) = self.json.take() {
            file.write(&output::json(&Judged { findings, checks: rows })?)?;
        }
        self.results.write_cases(|| suite(name, rows))?;
        if quiet { Ok(()) } else { table(findings, rows).print() }
    }
}

/// A case for each check; one that had nothing to judge is skipped.
fn suite(name: &str, rows: &[Row]) -> Suite {
    let again = format!("the same again: {}", output::command_line());
    let case = |Row { check, verdict, seen }: &Row| {
        let failure =
            || Failure { message: seen.clone(), detail: format!("{seen}\n{again}\n"), kind: FailureKind::Check };
        Case {
            class: name.to_owned(),
            name: (*check).to_owned(),
            failure: verdict.fails().then(failure),
            remark: matches!(verdict, Verdict::Ok | Verdict::Note).then(|| seen.clone()),
            skipped: (*verdict == Verdict::NotJudged).then(|| seen.clone()),
        }
    };
    Suite { name: name.to_owned(), cases: rows.iter().map(case).collect() }
}

fn table(findings: &Findings, rows: &[Row]) -> Text {
    let mut text = Text::default();
    let Setup { tsc_khz, khz_cycle, deadline, downtime, time, cpus, source, fault, .. } = &findings.setup;
    let cycle: Vec<String> = khz_cycle.iter().map(|khz| judge::ghz(*khz)).collect();
    let cpus = if *cpus == 1 { "1 vCPU".to_owned() } else { format!("{cpus} vCPUs") };
    let fault = fault.as_ref().map(|fault| format!("; every restore with the fault {fault}")).unwrap_or_default();
    let heading = format!(
        "TSC {}, after migrations in turn {}. Deadline {deadline}, downtime {downtime}; {time} time, TSC {source}, \
         {cpus}{fault}.",
        judge::ghz(*tsc_khz),
        cycle.join(", "),
    );
    for line in wrapped(&heading, WIDTH) {
        text.line(line);
    }
    text.line("");
    let (first, second) = (width(rows.iter().map(|row| row.check)), width(rows.iter().map(|row| row.verdict.as_str())));
    text.line(format!("{:<first$}{:<second$}what was seen", "check", "verdict"));
    text.line("─".repeat(WIDTH));
    for Row { check, verdict, seen } in rows {
        // A guest's console is quoted in it.
        let seen = wrapped(&printable(seen, LINE_CHARS), WIDTH.saturating_sub(first).saturating_sub(second));
        let mut names = (*check, verdict.as_str());
        for line in seen {
            text.line(format!("{:<first$}{:<second$}{line}", names.0, names.1).trim_end());
            names = ("", "");
        }
    }
    text
}

/// The width of a column, with the space behind it.
fn width<'a>(cells: impl Iterator<Item = &'a str>) -> usize {
    cells.map(|cell| cell.chars().count()).max().unwrap_or(0).max("verdict".len()).saturating_add(2)
}

/// `text` in lines of at most `width` characters, broken at spaces; a longer word has a line of its own.
fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let Some(line) = lines.last_mut() else { break };
        let more = word.chars().count().saturating_add(1);
        if line.is_empty() {
            line.push_str(word);
        } else if line.chars().count().saturating_add(more) <= width {
            line.push(' ');
            line.push_str(word);
        } else {
            lines.push(word.to_owned());
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    // Catches: a word of the user's that is overridden, and one that is added where Linux needs none.
    #[test]
    fn linux_gets_the_words_that_it_lacks() {
        let (real, at_virtual) = (TimeMode::Real, TimeMode::Virtual);
        assert_eq!(with_linux_words("", real), "console=ttyS0 panic=-1");
        assert_eq!(with_linux_words("a", at_virtual), "a console=ttyS0 panic=-1 vdso=0");
        let given = "noxsave vdso=1 panic=5 console=ttyS1,115200";
        assert_eq!(with_linux_words(given, at_virtual), given);
    }

    // Catches: a line that is too long for a terminal, and words that are lost or joined.
    #[test]
    fn a_sentence_is_broken_at_spaces() {
        assert_eq!(wrapped("aa bb  cc dddddddd e", 5), ["aa bb", "cc", "dddddddd", "e"]);
        assert_eq!(wrapped("", 5), [""]);
    }
}
