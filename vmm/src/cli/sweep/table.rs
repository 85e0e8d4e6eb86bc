//! A sweep's result on standard output.

use std::time::Duration;

use lab::sweep::{
    Cost, Replay,
    result::{Code, Findings, Inputs, Window},
    verdict::Verdict,
};

use super::recipes;
use crate::cli::{
    text::{Text, plain},
    units::time,
};

/// Windows that are printed at most, so that the summary is one screen; the rest are in the JSON.
const WINDOWS_SHOWN: usize = 8;

pub(super) fn text(findings: &Findings) -> Text {
    let mut out = Text::default();
    let inputs = &findings.inputs;
    out.line(format!(
        "{} \"{}\": {} boundaries from {} to {}, {} points; TSC {}, {}",
        inputs.guest,
        inputs.cmdline,
        findings.extent.boundaries,
        inputs.from,
        inputs.to,
        findings.points.len(),
        inputs.tsc_khz,
        restored_by(inputs)
    ));
    out.line(format!(
        "without a migration: ticks every {}, at most {} late\n",
        time(findings.baseline.period_ns),
        time(findings.baseline.late_ns)
    ));
    let mut table = plain([
        "ratio",
        "on time",
        "woken early",
        "untold",
        "late",
        "unstable",
        "storm",
        "clock stepped",
        "lost",
        "ended",
        "worst late",
    ]);
    for totals in &findings.totals {
        let mut row = vec![format!("×{}", totals.ratio)];
        row.extend(Verdict::ALL.map(|verdict| {
            let count = totals.verdicts.iter().find(|(of, _)| *of == verdict).map_or(0, |(_, count)| *count);
            if count == 0 { "-".to_owned() } else { count.to_string() }
        }));
        row.push(time(totals.worst_late_ns));
        table.add_row(row);
    }
    out.table(table, 1..11);
    for (index, totals) in findings.totals.iter().enumerate() {
        let (ratio, points) = (&totals.ratio, findings.points.len());
        let outcomes = || findings.points.iter().filter_map(|point| point.outcomes.get(index));
        for (what, count) in [
            ("the guest's watchdog marked a clocksource unstable", outcomes().filter(|one| one.unstable).count()),
            ("VMClock gave a wrong time and reported no disruption,", outcomes().filter(|one| one.wrong_time).count()),
        ] {
            if count != 0 {
                out.line(format!("×{ratio}: {what} at {count} of {points} points"));
            }
        }
    }
    if let Some(used) = &findings.inputs.recipe {
        recipes::errors(&mut out, used, &findings.totals);
    }
    if findings.windows.is_empty() {
        return out;
    }
    out.line("");
    let mut table =
        plain(["ratio", "verdict", "points", "number", "worst", "next instruction, at the first and the last point"]);
    for window in findings.windows.iter().take(WINDOWS_SHOWN) {
        let first = findings.code_at(window.first_address);
        let last = findings.code_at(window.last_address).filter(|_| window.first != window.last);
        let place = [first, last].into_iter().flatten().map(instruction).collect::<Vec<_>>().join("\n");
        table.add_row([
            format!("×{}", window.ratio),
            window.verdict.as_str().to_owned(),
            window.points.to_string(),
            format!(
                "{}\n{}",
                numbers(&window.first),
                if last.is_some() { numbers(&window.last) } else { String::new() }
            ),
            worst(window),
            place,
        ]);
    }
    out.table(table, 2..4);
    if findings.windows.len() > WINDOWS_SHOWN {
        out.line(format!(
            "… and {} more windows (--json and --report have all)",
            findings.windows.len() - WINDOWS_SHOWN
        ));
    }
    out
}

/// What decided about TSC, kvmclock and deadline.
fn restored_by(inputs: &Inputs) -> String {
    let Inputs { deadline, downtime, inject, recipe, .. } = inputs;
    match (recipe, inject) {
        (Some(recipe), _) => format!("recipe {}", recipe.name),
        (None, Some(fault)) => {
            format!("deadline {}, downtime {}, inject {fault}", deadline.as_str(), downtime.as_str())
        }
        (None, None) => format!("deadline {}, downtime {}", deadline.as_str(), downtime.as_str()),
    }
}

fn worst(window: &Window) -> String {
    match window.verdict {
        Verdict::Rearmed | Verdict::Storm => format!("{} early wakes", window.most_early_wakes),
        Verdict::ClockStepped => {
            let sign = if window.worst_clock_error_ns < 0 { "-" } else { "+" };
            format!("clock {sign}{}", time(window.worst_clock_error_ns.unsigned_abs()))
        }
        Verdict::Late => format!("{} late", time(window.worst_late_ns.unwrap_or(0))),
        Verdict::OnTime | Verdict::Untold | Verdict::Unstable | Verdict::Lost | Verdict::Ended => String::new(),
    }
}

fn instruction(code: &Code) -> String {
    let place = code.symbol.clone().unwrap_or_else(|| format!("{:#x}", code.address));
    let source = code.source.as_ref().map(|source| format!("  {source}")).unwrap_or_default();
    format!("{place}  {}{source}", code.instruction)
}

/// The point's number, or both numbers of a pair.
pub(super) fn numbers(at: &[u64]) -> String {
    at.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

/// The number of bad points and the worst verdict, in one line.
pub(super) fn in_a_word(findings: &Findings) -> String {
    let bad = |verdict: &&Verdict| verdict.is_bad();
    let outcomes = || findings.points.iter().flat_map(|point| &point.outcomes);
    let counts = Verdict::ALL.iter().filter(bad).filter_map(|verdict| {
        let count = outcomes().filter(|outcome| outcome.verdict == *verdict).count();
        (count != 0).then(|| format!("{count} {}", verdict.as_str()))
    });
    format!("of {} migrations: {}", outcomes().count(), counts.collect::<Vec<_>>().join(", "))
}

/// The outcome of a replayed point.
pub(super) fn replay(replay: &Replay) -> String {
    let outcome = &replay.outcome;
    format!(
        "point {}, ×{}: {}; {} late, {} early wakes, clock error {} ns; next instruction there: {}",
        numbers(&replay.at),
        replay.target.ratio,
        outcome.verdict.as_str(),
        outcome.late_ns.map_or_else(|| "no tick".to_owned(), time),
        outcome.early_wakes,
        outcome.clock_error_ns,
        instruction(&replay.code)
    )
}

/// The rate of migrations, and what host time was spent on.
#[allow(clippy::cast_precision_loss, reason = "three digits for people")]
pub(super) fn cost(findings: &Findings, cost: &Cost) -> String {
    let Cost { tries, elapsed, step, save, run, restore } = *cost;
    let each = |spent: Duration| format!("{:.0} µs", spent.as_secs_f64() * 1e6 / tries.max(1) as f64);
    format!(
        "{} points × {} ratios in {:.2} s: {:.0} points/s; of each worker's time a point took {} step, {} save, {} run, {} \
         restore",
        findings.points.len(),
        findings.inputs.ratios.len(),
        elapsed.as_secs_f64(),
        tries as f64 / elapsed.as_secs_f64().max(1e-9),
        each(step),
        each(save),
        each(run),
        each(restore),
    )
}
