//! The results of a run as a page and as test cases.

use lab::report::{
    Cell, Found as Word, Page, Section, Table, Tone,
    cases::{Case, Failure, FailureKind, Suite},
    timeline::Timeline,
    units,
};
use machine::{
    audit::{
        Lateness, Summary, TimerSummary,
        checks::{CheckResult, Verdict},
    },
    session::Report,
};

use super::output;

/// The page of a run.
pub(super) fn page(report: &Report, finish: &str, lost: Option<u64>, verdict: &Verdict, timeline: &Timeline) -> Page {
    let Report { vm_ns, migrations, migrations_here, host_stops, downtimes, guest_stopped, summary, timer, .. } =
        report;
    let mut page = Page::new("A guest and its ticks", output::command_line(), found(report, lost, verdict))
        .fact("VM time", format!("{} ms", units::exact_ms(vm_ns.0)))
        .fact("the run", finish)
        .fact("migrations", units::grouped(*migrations))
        .fact("in this process", units::grouped(*migrations_here))
        .fact("stopped by the host", units::grouped(*host_stops))
        .fact("GUEST_STOPPED set, found cleared", format!("{}, {}", guest_stopped.set, guest_stopped.cleared));
    if downtimes.measured != 0 {
        let error = downtimes.error_ns.map_or_else(|| "error unknown".to_owned(), |ns| format!("±{ns} ns in all"));
        page = page.fact("downtimes measured", format!("{}, {error}", units::grouped(downtimes.measured)));
    }
    if let Some(ticks) = summary {
        let intervals = ticks.interval_ratio.map_or_else(|| "–".to_owned(), |ratio| format!("×{ratio:.3}"));
        page = page.fact("intervals last, since the last", intervals);
        let counts = [
            ("ticks", ticks.ticks),
            ("lost", lost.unwrap_or(0)),
            ("early wakes", ticks.early_wakes),
            ("too early by the host", ticks.early_by_host),
            ("armed late", ticks.armed_late),
            ("clock steps back", ticks.clock_steps_back),
            ("clock errors", ticks.clock_errors),
            ("GUEST_STOPPED seen", ticks.guest_stopped_seen),
        ];
        for (name, count) in counts {
            page = page.fact(name, units::grouped(count));
        }
    }
    page = page.section(Section::new("Checks").table(checks(verdict)));
    if let Some(ticks) = summary {
        page = page.section(Section::new("Ticks").table(lateness(ticks)));
    }
    if let Some(timer) = timer {
        let note = "By the host's account alone, after the instant that the timer was armed for.";
        page = page.section(Section::new("Timer interrupts").table(interrupts(timer)).note(note));
    }
    page.section(timeline.section("Timeline"))
}

fn found(report: &Report, lost: Option<u64>, verdict: &Verdict) -> Word {
    let mut text = match &report.summary {
        Some(ticks) => {
            let late = ticks.late_by_guest.map(|late| units::time(late.worst_ns));
            let late =
                late.map(|late| format!("; the latest was {late} late by the guest's clock")).unwrap_or_default();
            format!(
                "{}, {} lost, {}{late}.",
                units::count(ticks.ticks, "tick"),
                units::grouped(lost.unwrap_or(0)),
                units::count(ticks.early_wakes, "early wake"),
            )
        }
        None => format!("No tick is judged: {}.", report.no_ring),
    };
    for reason in &verdict.reasons {
        text.push_str(&format!(" Failed: {reason}."));
    }
    let (tone, word) = match &report.summary {
        _ if !verdict.pass => (Tone::Bad, "failed"),
        None => (Tone::Costly, "not judged"),
        Some(ticks) if ticks.ticks == 0 => (Tone::Costly, "no ticks"),
        Some(_) => (Tone::Good, "passed"),
    };
    Word { tone, word: word.to_owned(), text }
}

fn checks(verdict: &Verdict) -> Table {
    let mut table = Table::new(["check", "verdict", "what was found"]);
    for (name, found) in &verdict.checks {
        let (tone, word, what) = match found {
            CheckResult::Pass(what) => (Tone::Good, "passed", what),
            CheckResult::Fail(what) => (Tone::Bad, "failed", what),
            CheckResult::NotJudged(what) => (Tone::Costly, "not judged", what),
        };
        table.row([Cell::code(name.as_str()), Cell::verdict(tone, word), what.as_str().into()]);
    }
    table
}

/// How late ticks were, by the guest's clock and by the host's.
fn lateness(ticks: &Summary) -> Table {
    let mut table = Table::new(["lateness", "p50", "p99", "worst"]).numeric(1..4);
    let accounts = [("by the guest", ticks.late_by_guest), ("by the host", ticks.late_by_host)];
    for (account, late) in accounts.into_iter().filter_map(|(account, late)| Some((account, late?))) {
        table.row([account.to_owned()].into_iter().chain(times(late)));
    }
    table
}

fn interrupts(timer: &TimerSummary) -> Table {
    let mut table = Table::new(["interrupts", "early", "late p50", "p99", "worst"]).numeric(0..5);
    let late = timer.late.map_or_else(|| ["–"; 3].map(str::to_owned), times);
    table.row([timer.interrupts, timer.early].map(units::grouped).into_iter().chain(late));
    table
}

fn times(late: Lateness) -> [String; 3] {
    let Lateness { p50_ns, p99_ns, worst_ns } = late;
    [p50_ns, p99_ns, worst_ns].map(units::time)
}

/// The name of the check of the run itself.
const RUN: &str = "run";

/// A case for each check; a check without the data that it needs is skipped. `name` is the command that was run.
pub(super) fn suite(name: &str, verdict: &Verdict, timed_out: bool) -> Suite {
    let case = |(check, found): &(String, CheckResult)| {
        let (failure, remark, skipped) = match found {
            CheckResult::Pass(what) => (None, Some(what.clone()), None),
            CheckResult::Fail(why) => {
                // Of the checks only the run itself has a time limit.
                let kind = if timed_out && check == RUN { FailureKind::TimedOut } else { FailureKind::Check };
                (Some(Failure { message: why.clone(), detail: why.clone(), kind }), None, None)
            }
            CheckResult::NotJudged(why) => (None, None, Some(why.clone())),
        };
        Case { class: name.to_owned(), name: check.clone(), failure, remark, skipped }
    };
    Suite { name: name.to_owned(), cases: verdict.checks.iter().map(case).collect() }
}
