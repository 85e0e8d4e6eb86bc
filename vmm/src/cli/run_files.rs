//! What a run leaves: trace, summary, report.

use std::{
    fs::{self, File},
    io::BufReader,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde::Serialize;
use tempfile::TempDir;
use vmm::{
    report::{Found, Page, Section, Table, Tone, timeline::Timeline, units},
    run::{
        Costs,
        judge::{Lateness, Summary},
    },
    session::{Finish, Report},
    time::VmTime,
};

use super::{
    args::Session,
    exit::Usage,
    output::{self, OutFile},
};

/// Version of the summary file's layout.
const SUMMARY_SCHEMA: &str = "vmm-summary/1";

/// What `--summary` writes.
#[derive(Debug, Serialize)]
struct SummaryFile<'a> {
    schema: &'static str,
    /// "ended", "stopped", "saved" or "timed out".
    finish: &'static str,
    /// Why the guest ended, if not in good order.
    detail: Option<String>,
    vm_ns: VmTime,
    migrations: u64,
    /// How often no vCPU ran for a while, although nobody had asked for that.
    host_stops: u64,
    lost: u64,
    ticks: &'a Summary,
    costs: &'a Costs,
}

/// The files, opened.
pub(super) struct Files {
    summary: Option<OutFile>,
    report: Option<OutFile>,
    trace: Option<PathBuf>,
    /// Where the trace is that only the report needs.
    _temporary: Option<TempDir>,
}

impl Files {
    pub(super) fn open(args: &Session) -> Result<Self> {
        let named = [("summary", &args.summary), ("report", &args.report.report), ("trace", &args.trace)];
        output::distinct(&named.map(|(flag, path)| (flag, path.as_deref())))?;
        let summary = OutFile::open("summary", args.summary.as_deref())?;
        let report = OutFile::open("report", args.report.report.as_deref())?;
        let (trace, temporary) = match &args.trace {
            Some(path) if report.is_some() && fs::metadata(path).is_ok_and(|meta| !meta.is_file()) => {
                let why = format!("--report reads the trace again, and --trace {} is not a file", path.display());
                return Err(Usage(why).into());
            }
            None if report.is_some() => {
                let dir = tempfile::tempdir().context("cannot make a directory for the trace")?;
                (Some(dir.path().join("trace.jsonl")), Some(dir))
            }
            path => (path.clone(), None),
        };
        Ok(Self { summary, report, trace, _temporary: temporary })
    }

    /// Where to trace.
    pub(super) fn trace(&self) -> Option<&Path> {
        self.trace.as_deref()
    }

    /// Writes summary and report; the trace is complete.
    pub(super) fn write(self, report: &Report) -> Result<()> {
        let (finish, detail, ended) = match &report.finish {
            Finish::Ended(end) => ("ended", end.message(), true),
            Finish::Stopped => ("stopped", None, false),
            Finish::Saved => ("saved", None, false),
            Finish::TimedOut { cpus, .. } => ("timed out", Some(cpus.join("; ")), false),
        };
        let lost = report.summary.lost(ended);
        let Report { vm_ns, migrations, host_stops, summary: ticks, costs, finish: _ } = report;
        if let Some(file) = self.summary {
            let content = SummaryFile {
                schema: SUMMARY_SCHEMA,
                finish,
                detail: detail.clone(),
                vm_ns: *vm_ns,
                migrations: *migrations,
                host_stops: *host_stops,
                lost,
                ticks,
                costs,
            };
            let mut text = serde_json::to_vec_pretty(&content)?;
            text.push(b'\n');
            file.write(&text)?;
        }
        let Some(file) = self.report else { return Ok(()) };
        let timeline = read(self.trace.as_deref().into_iter())?;
        let intervals = ticks.interval_ratio.map_or_else(|| "–".to_owned(), |ratio| format!("×{ratio:.3}"));
        let mut page =
            Page::new("A guest and its ticks", output::command_line(), found(detail.as_deref(), lost, ticks))
                .fact("VM time", format!("{} ms", units::exact_ms(vm_ns.0)))
                .fact("the run", finish)
                .fact("migrations", units::grouped(*migrations))
                .fact("stopped by the host", units::grouped(*host_stops))
                .fact("intervals last, since the last", intervals);
        let counts = [
            ("ticks", ticks.ticks),
            ("lost", lost),
            ("early wakes", ticks.early_wakes),
            ("too early by the host", ticks.early_by_host),
            ("clock steps back", ticks.clock_steps_back),
            ("GUEST_STOPPED seen", ticks.guest_stopped_seen),
        ];
        for (name, count) in counts {
            page = page.fact(name, units::grouped(count));
        }
        let timeline = timeline.section("Timeline");
        let page = page.section(Section::new("Ticks").table(lateness(ticks))).section(timeline);
        file.write(page.render().as_bytes())
    }
}

/// Reads traces of one guest, in order.
pub(super) fn read<'a>(traces: impl Iterator<Item = &'a Path>) -> Result<Timeline> {
    let mut timeline = Timeline::default();
    for path in traces {
        let name = || format!("trace {}", path.display());
        timeline.read(BufReader::new(File::open(path).with_context(name)?)).with_context(name)?;
    }
    Ok(timeline)
}

fn found(detail: Option<&str>, lost: u64, ticks: &Summary) -> Found {
    let late = units::time(ticks.late_by_guest.worst_ns);
    let mut text = format!(
        "{}, {} lost, {}; the latest was {late} late by the guest's clock.",
        units::count(ticks.ticks, "tick"),
        units::grouped(lost),
        units::count(ticks.early_wakes, "early wake"),
    );
    if ticks.clock_steps_back != 0 {
        text.push_str(&format!(" The clock stepped back {} times.", units::grouped(ticks.clock_steps_back)));
    }
    let (tone, word) = match detail {
        Some(detail) => {
            text.push_str(&format!(" {detail}."));
            (Tone::Bad, "failed")
        }
        None if lost != 0 => (Tone::Bad, "ticks lost"),
        None if ticks.clock_steps_back != 0 => (Tone::Bad, "clock stepped back"),
        None if ticks.ticks == 0 => (Tone::Good, "no ticks"),
        None => (Tone::Good, "every tick came"),
    };
    Found { tone, word: word.to_owned(), text }
}

/// How late ticks were, by either account.
fn lateness(ticks: &Summary) -> Table {
    let mut table = Table::new(["lateness", "p50", "p99", "worst"]).numeric(1..4);
    let accounts = [("by the guest", Some(ticks.late_by_guest)), ("by the host", ticks.late_by_host)];
    for (account, late) in accounts.into_iter().filter_map(|(account, late)| Some((account, late?))) {
        let Lateness { p50_ns, p99_ns, worst_ns } = late;
        table.row([account.to_owned()].into_iter().chain([p50_ns, p99_ns, worst_ns].map(units::time)));
    }
    table
}
