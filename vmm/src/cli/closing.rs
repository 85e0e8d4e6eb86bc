//! The last line that a run prints.

use std::time::Duration;

use machine::{
    audit::{GuestStopped, Lateness, Summary, TimerSummary, checks::Verdict},
    live::Figures,
    session::{Finish, Report},
};
use vmtime::Length;

/// Sums up the ticks or, for a guest without a tick ring, the timer interrupts. None for a guest that failed before its
/// first tick.
pub(super) fn line(report: &Report, verdict: &Verdict) -> Option<String> {
    let Report { finish, summary, no_ring, timer, vm_ns, migrations, guest_stopped, .. } = report;
    let something = match summary {
        Some(summary) => summary.ticks != 0 || summary.malformed != 0,
        None => timer.is_some_and(|timer| timer.interrupts != 0),
    };
    let ended = matches!(finish, Finish::Ended(_));
    let what = match summary {
        Some(summary) => ticks(summary, ended),
        None => format!("ticks not judged: {no_ring}{}", timer.as_ref().map(interrupts).unwrap_or_default()),
    };
    let stopped = match guest_stopped {
        GuestStopped { never_cleared: 0, .. } => String::new(),
        GuestStopped { in_resumes, .. } => format!("; GUEST_STOPPED never cleared in {in_resumes} resumes"),
    };
    let word = if verdict.pass { "passed" } else { "failed" };
    (something || verdict.pass)
        .then(|| format!("{what}; migrations {migrations}{stopped}; VM time {}; {word}", micros(vm_ns.0)))
}

/// What a move came to.
pub(super) fn moved(figures: &Figures) -> String {
    let Figures { rounds, bytes, pages, last_pages, total_ns, downtime_ns } = figures;
    format!(
        "{pages} pages in {rounds} rounds, {last_pages} of them while the guest was stopped; {bytes} bytes in {}, stopped \
         for {}",
        micros(*total_ns),
        micros(*downtime_ns)
    )
}

fn ticks(summary: &Summary, ended: bool) -> String {
    let Summary { ticks, early_wakes, clock_steps_back, .. } = summary;
    format!(
        "{ticks} ticks, {} lost, {early_wakes} woken early; late {} by the guest, {} by the host; clock steps back \
         {clock_steps_back}",
        summary.lost(ended),
        late(summary.late_by_guest),
        late(summary.late_by_host),
    )
}

fn interrupts(timer: &TimerSummary) -> String {
    let TimerSummary { interrupts, early, late: by_host } = timer;
    format!("; {interrupts} timer interrupts, {early} early; late {} by the host", late(*by_host))
}

fn late(late: Option<Lateness>) -> String {
    late.map_or_else(
        || "p99 - worst -".to_owned(),
        |Lateness { p99_ns, worst_ns, .. }| format!("p99 {} worst {}", micros(p99_ns), micros(worst_ns)),
    )
}

/// Formats a time, to the microsecond.
fn micros(ns: u64) -> String {
    Length(Duration::from_nanos(ns / 1000 * 1000)).to_string()
}
