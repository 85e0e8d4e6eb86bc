//! The demonstration: shows what a migration to another TSC frequency does to every kind of timer.
//!
//! For every clockevent the embedded guest runs in one `vmm` process, which saves it in mid-tick; then three other
//! processes restore that snapshot, at the same, a slower and a faster TSC, and let it run to its end. All of it uses
//! the public command line, so that users can repeat each line of the table by hand.

mod report;
mod table;
mod verdict;

use std::{
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
};

use guest_image::GUEST_ELF;
use lab::report::timeline::Timeline;
use machine::{TimeMode, audit::Summary, blame::Blame};
use serde::{Deserialize, Serialize};
use verdict::Verdict;

use super::{
    args::Run,
    exit::{Error, OrFailed, Result},
    output::{self, Results},
    progress::Progress,
    run_files::read as read_traces,
    text::Text,
};

/// The frequency the guest boots with.
const BASE_KHZ: u32 = 2_600_000;
/// The frequencies it is restored with, and their names.
const TARGETS: [(&str, u32); 3] = [("same", BASE_KHZ), ("slower", BASE_KHZ / 2), ("faster", BASE_KHZ * 2)];
/// The clockevents, as the guest's command line names them.
const CLOCKEVENTS: [&str; 6] = [
    "lapic-deadline",
    "kvm-tsc-deadline conversion=split",
    "kvm-tsc-deadline conversion=mult",
    "kvm-tsc-deadline conversion=exact",
    "kvm-ns-deadline",
    "lapic-oneshot",
];
/// Ticks a second, ticks in all, and when to save: in the middle of the 50th interval, with a deadline in flight.
const HZ: u32 = 100;
const COUNT: u32 = 100;
const SAVE_AT: &str = "505ms";

/// The part of a child process's `--summary` file that is used.
#[derive(Debug, Deserialize)]
struct SummaryFile {
    lost: u64,
    ticks: Summary,
}

/// One line of the table.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    clockevent: &'static str,
    /// "same", "slower" or "faster".
    tsc: &'static str,
    tsc_khz: u32,
    /// Ticks before and after the migration.
    ticks: u64,
    lost: u64,
    /// Summary of the ticks after the migration; the fields below are about them, too.
    after: Summary,
    verdict: Verdict,
    /// The traces of both processes; only for a report.
    #[serde(skip)]
    timeline: Option<Timeline>,
}

/// The output of `--json`.
#[derive(Debug, Serialize)]
struct Json<'a> {
    schema: &'static str,
    time: &'static str,
    booted_at_khz: u32,
    hz: u32,
    rows: &'a [Row],
    /// Whether every line is as expected.
    ok: bool,
}

/// Runs `vmm` without a guest.
pub fn run(args: &Run) -> Result<ExitCode> {
    let time = args.time.map_or(TimeMode::Virtual, TimeMode::from);
    let report = ("report", args.session.report.report.as_deref());
    output::distinct(&[report].into_iter().chain(args.session.cases.named()).collect::<Vec<_>>())?;
    let mut results = Results::open(&args.session.report, &args.session.cases)?;
    if args.json && results.use_stdout() {
        return Err(Error::usage("--json is on standard output: give the others a file"));
    }
    let ended = demonstrate(args, time, &mut results);
    results.with_error("vmm demonstration", ended)
}

fn demonstrate(args: &Run, time: TimeMode, results: &mut Results) -> Result<ExitCode> {
    let work = tempfile::tempdir().or_failed(|| "cannot make a directory for the snapshots")?;
    let guest = work.path().join("guest.bin");
    std::fs::write(&guest, GUEST_ELF).or_failed(|| format!("cannot write {}", guest.display()))?;

    let mut progress = Progress::new("VMs", &args.session.heartbeat);
    let steps = u64::try_from(CLOCKEVENTS.len() * (1 + TARGETS.len())).unwrap_or(0);
    let mut done = 0;
    let mut step = || {
        done += 1;
        progress.at(done, steps);
    };
    let mut rows = Vec::new();
    for clockevent in CLOCKEVENTS {
        if progress.is_shown() {
            progress.say(clockevent);
        } else {
            machine::say!("vmm: {clockevent}: run, save, restore at the same, a slower and a faster TSC");
        }
        let dir = work.path().join("snapshot");
        // Traces are only written for a report.
        let traces = results.has_report().then(|| ["booted", "restored"].map(|name| work.path().join(name)));
        let [booted, restored] =
            [0, 1].map(|which| traces.as_ref().and_then(|traces| traces.get(which)).map(PathBuf::as_path));
        let before = boot_and_save(&guest, &dir, clockevent, time, booted, args)?;
        step();
        for (tsc, khz) in TARGETS {
            let after = restore(&dir, khz, work.path(), restored, args)?;
            let timeline =
                traces.as_ref().map(|traces| read_traces(traces.iter().map(PathBuf::as_path))).transpose()?;
            rows.push(Row {
                clockevent,
                tsc,
                tsc_khz: khz,
                ticks: before.ticks.ticks + after.ticks.ticks,
                lost: before.lost + after.lost,
                verdict: verdict::check(clockevent, khz, time, before.lost + after.lost, &after.ticks),
                after: after.ticks,
                timeline,
            });
            step();
        }
        std::fs::remove_dir_all(&dir).or_failed(|| format!("cannot remove {}", dir.display()))?;
    }
    progress.finish();

    let ok = rows.iter().all(|row| row.verdict.as_expected());
    if args.json {
        let json = Json { schema: "vmm-demo/1", time: time.as_str(), booted_at_khz: BASE_KHZ, hz: HZ, rows: &rows, ok };
        Text::json(&json)?.print()?;
    } else if !results.use_stdout() {
        table::text(&rows, time).print()?;
    }
    results.write(|| report::page(&rows, time), || report::suite(&rows))?;
    if ok { Ok(ExitCode::SUCCESS) } else { Err(Error::failed("the demonstration did not go as it should")) }
}

fn boot_and_save(
    guest: &Path,
    dir: &Path,
    clockevent: &str,
    time: TimeMode,
    trace: Option<&Path>,
    args: &Run,
) -> Result<SummaryFile> {
    let cmdline = format!("clockevent={clockevent} hz={HZ} count={COUNT}");
    let khz = BASE_KHZ.to_string();
    let summary = dir.with_extension("json");
    let mut command = Command::new(std::env::current_exe().or_failed(|| "cannot find this program")?);
    command.arg("--guest").arg(guest).args(["--cmdline", &cmdline, "--memory", "16M"]);
    command.args(["--time", time.as_str(), "--tsc", "trapped", "--tsc-khz", &khz]);
    command.args(["--save-at", SAVE_AT, "--save-to"]).arg(dir);
    child(command, &summary, trace, args)
}

fn restore(dir: &Path, khz: u32, work: &Path, trace: Option<&Path>, args: &Run) -> Result<SummaryFile> {
    let summary = work.join("restored.json");
    let mut command = Command::new(std::env::current_exe().or_failed(|| "cannot find this program")?);
    command.arg("restore").arg(dir).args(["--tsc", "trapped", "--tsc-khz", &khz.to_string()]);
    child(command, &summary, trace, args)
}

/// Runs a `vmm` and reads its summary.
fn child(mut command: Command, summary: &Path, trace: Option<&Path>, args: &Run) -> Result<SummaryFile> {
    if let Some(host) = args.session.emulate_host {
        command.args(["--emulate-host", host.as_str()]);
    }
    if let Some(trace) = trace {
        command.arg("--trace").arg(trace);
    }
    // The child checks nothing: its ticks are compared with what is expected, here.
    command.args(["--fail-on", "none", "--summary"]).arg(summary).stdin(Stdio::null());
    let output = command.output().or_failed(|| "cannot start this program again")?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        let last = stderr.lines().last().unwrap_or("no message").trim_start_matches("vmm: ").to_owned();
        let cannot = output.status.code() == Some(Blame::Host.exit_code().into());
        return Err(Error::new(if cannot { Blame::Host } else { Blame::Run }, last));
    }
    let text = std::fs::read_to_string(summary).or_failed(|| format!("cannot read {}", summary.display()))?;
    serde_json::from_str(&text).or_failed(|| format!("cannot understand {}", summary.display()))
}
