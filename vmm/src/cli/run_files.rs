//! The files that a run writes: trace, summary, report, test results.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::BufReader,
    path::{Path, PathBuf},
};

use lab::report::timeline::Timeline;
use machine::{
    Costs, TraceTo,
    audit::{GuestStopped, Summary, TimerSummary, checks::Verdict},
    machine::downtime::Downtimes,
    session::{Finish, Report},
};
use serde::Serialize;
use serde_json::Value;
use tempfile::TempDir;
use vmtime::VmTime;

use super::{
    args::Session,
    exit::{About, Error, OrFailed, Result},
    output::{self, OutFile, Results},
    run_page,
};

/// Version of the summary file's layout.
const SUMMARY_SCHEMA: &str = "vmm-summary/2";

/// The content of the `--summary` file.
#[derive(Debug, Serialize)]
struct SummaryFile<'a> {
    schema: &'static str,
    /// "ended", "stopped", "saved" or "timed out".
    finish: &'static str,
    /// Why the guest ended, if it failed.
    detail: Option<String>,
    verdict: &'a Verdict,
    vm_ns: VmTime,
    /// Since boot, in all processes.
    migrations: u64,
    /// Within this process.
    migrations_here: u64,
    /// How often no vCPU ran for a while, although no pause was requested.
    host_stops: u64,
    /// The downtimes that were measured.
    downtimes: &'a Downtimes,
    /// In this process.
    guest_stopped: &'a GuestStopped,
    /// Null where it is not known.
    wall_error_ns: Option<i64>,
    /// Null where it is not known.
    vmclock_error_ns: Option<i64>,
    /// Whether the guest has a tick ring that can be read; if not, `lost` and all of `ticks` are null.
    judged: bool,
    lost: Option<u64>,
    ticks: Ticks<'a>,
    /// Null where the LAPICs are KVM's.
    timer: Option<&'a TimerSummary>,
    costs: &'a Costs,
    assists: &'a BTreeMap<&'static str, u64>,
}

/// The files, opened.
pub(super) struct Files {
    summary: Option<OutFile>,
    results: Results,
    trace: Option<PathBuf>,
    stdout: bool,
    /// The trace's directory, if only the report needs the trace.
    _temporary: Option<TempDir>,
}

impl Files {
    pub(super) fn open(args: &Session) -> Result<Self> {
        let own = [("summary", &args.summary), ("report", &args.report.report), ("trace", &args.trace)];
        let named = own.into_iter().map(|(flag, path)| (flag, path.as_deref())).chain(args.cases.named());
        let named: Vec<(&str, Option<&Path>)> = named.collect();
        output::distinct(&named)?;
        let stdout = named.into_iter().filter_map(|(_, path)| path).any(output::is_stdout);
        let summary = OutFile::open("summary", args.summary.as_deref())?;
        let results = Results::open(&args.report, &args.cases)?;
        let (trace, temporary) = match &args.trace {
            Some(path) if results.has_report() && !can_be_read_again(path) => {
                let why = format!("--report reads the trace again, and --trace {} is not a file", path.display());
                return Err(Error::usage(why));
            }
            None if results.has_report() => {
                let dir = tempfile::tempdir().or_failed(|| "cannot make a directory for the trace")?;
                (Some(dir.path().join("trace.jsonl")), Some(dir))
            }
            path => (path.clone(), None),
        };
        Ok(Self { summary, results, trace, stdout, _temporary: temporary })
    }

    /// The trace's destination.
    pub(super) fn trace(&self) -> TraceTo {
        match &self.trace {
            None => TraceTo::Nowhere,
            Some(path) if output::is_stdout(path) => TraceTo::Stdout,
            Some(path) => TraceTo::File(path.clone()),
        }
    }

    /// Whether one of them is standard output. Nothing else may be printed there then.
    pub(super) fn use_stdout(&self) -> bool {
        self.stdout
    }

    /// See [`Results::with_error`].
    pub(super) fn with_error<T>(&mut self, name: &str, ended: Result<T>) -> Result<T> {
        self.results.with_error(name, ended)
    }

    /// Writes all files but the trace, which is complete by now. `name` is the command that was run.
    pub(super) fn write(&mut self, name: &str, report: &Report, verdict: &Verdict) -> Result<()> {
        let (finish, detail, ended) = match &report.finish {
            Finish::Ended(end) => ("ended", end.message(), true),
            Finish::Stopped => ("stopped", None, false),
            Finish::Saved => ("saved", None, false),
            Finish::Moved { to, .. } => ("moved", Some(to.to_string()), false),
            Finish::TimedOut { cpus, .. } => ("timed out", Some(cpus.join("; ")), false),
        };
        let lost = report.summary.as_ref().map(|summary| summary.lost(ended));
        let Report {
            vm_ns,
            migrations,
            migrations_here,
            host_stops,
            downtimes,
            guest_stopped,
            wall_error_ns,
            vmclock_error_ns,
            summary,
            timer,
            costs,
            assists,
            finish: _,
            no_ring: _,
            trace: _,
        } = report;
        if let Some(file) = self.summary.take() {
            let content = SummaryFile {
                schema: SUMMARY_SCHEMA,
                finish,
                detail,
                verdict,
                vm_ns: *vm_ns,
                migrations: *migrations,
                migrations_here: *migrations_here,
                host_stops: *host_stops,
                downtimes,
                guest_stopped,
                wall_error_ns: *wall_error_ns,
                vmclock_error_ns: *vmclock_error_ns,
                judged: summary.is_some(),
                lost,
                ticks: summary
                    .as_ref()
                    .map_or_else(Ticks::nulls, |summary| Ok(Ticks::Judged(summary)))
                    .map_err(Error::failed)?,
                timer: timer.as_ref(),
                costs,
                assists,
            };
            let mut text = serde_json::to_vec_pretty(&content).map_err(Error::failed)?;
            text.push(b'\n');
            file.write(&text)?;
        }
        let timeline =
            if self.results.has_report() { read(self.trace.as_deref().into_iter())? } else { Timeline::default() };
        let page = || run_page::page(report, finish, lost, verdict, &timeline);
        let timed_out = matches!(report.finish, Finish::TimedOut { .. });
        self.results.write(page, || run_page::suite(name, verdict, timed_out))
    }
}

/// The numbers of the ticks, for the summary.
#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Ticks<'a> {
    Judged(&'a Summary),
    /// The same fields, all null: a zero would mean that nothing was wrong.
    Nulls(Value),
}

impl Ticks<'_> {
    fn nulls() -> serde_json::Result<Self> {
        let mut fields = serde_json::to_value(Summary::default())?;
        for value in fields.as_object_mut().into_iter().flat_map(|fields| fields.values_mut()) {
            *value = Value::Null;
        }
        Ok(Self::Nulls(fields))
    }
}

fn can_be_read_again(path: &Path) -> bool {
    !output::is_stdout(path) && fs::metadata(path).map_or(true, |meta| meta.is_file())
}

/// Reads traces of one guest, in order.
pub(super) fn read<'a>(traces: impl Iterator<Item = &'a Path>) -> Result<Timeline> {
    let mut timeline = Timeline::default();
    for path in traces {
        let name = || format!("trace {}", path.display());
        timeline.read(BufReader::new(File::open(path).or_failed(name)?)).about(name)?;
    }
    Ok(timeline)
}
