//! The findings of a sweep, as a page or a section of one.

use super::{
    Cell, Chart, Found, Heat, Page, Section, Table, Tone,
    chart::{Axis, Look},
    heat::{at, words},
    page::of,
    units,
};
use crate::sweep::{
    result::{Findings, Window},
    verdict::{Outcome, Verdict},
};

/// The text above the charts.
const CHARTS: &str = "How late the latest tick was that followed, for a migration at each point of the stretch. The y axis is \
     logarithmic beyond 1 µs; shaded is what counts as late, or as early.";
/// The text above the heat map.
const HEAT: &str = "Each row is an instruction boundary: the guest was migrated before that instruction, to each of the \
     frequencies, and judged by the ticks that followed. Rows alike are folded; open them with a click.";
/// Windows in the table at most. The heat map shows all.
const WINDOWS_SHOWN: usize = 40;

/// The page of one sweep; `command` is the command that makes it again.
#[must_use]
pub fn page(findings: &Findings, command: &str) -> Page {
    let inputs = &findings.inputs;
    let extent = &findings.extent;
    let cmdline = if inputs.cmdline.is_empty() { "(empty)" } else { &inputs.cmdline };
    let mut page = Page::new(format!("Sweep: {cmdline}"), command, found(findings))
        .fact("guest", format!("{}, CRC-32 {:08x}", inputs.guest, inputs.guest_crc32))
        .fact("stretch", format!("{} to {}", inputs.from, inputs.to))
        .fact("boundaries", units::grouped(extent.boundaries))
        .fact("points", units::grouped(u64::try_from(findings.points.len()).unwrap_or(u64::MAX)))
        .fact("TSC at boot", inputs.tsc_khz.to_string())
        .fact("deadline policy", inputs.deadline.as_str())
        .fact("downtime", format!("{}, {}", inputs.downtime.as_str(), units::time(inputs.downtime_ns)))
        .fact("vCPUs", inputs.cpus.to_string());
    if let Some(fault) = &inputs.inject {
        page = page.fact("injected fault", fault.as_str());
    }
    if inputs.depth > 1 {
        page = page.fact("migrations a point", inputs.depth.to_string());
    }
    if let Some(shard) = findings.shard {
        page = page.fact("shard", format!("{} of {}", shard.index, shard.count));
    }
    page.section(section("What came of it", findings))
}

/// The result in a sentence: how many migrations harmed the guest, and the worst verdict.
#[must_use]
pub fn found(findings: &Findings) -> Found {
    let outcomes = || findings.points.iter().flat_map(|point| &point.outcomes);
    let all = count(outcomes());
    let bad = count(outcomes().filter(|outcome| outcome.verdict.is_bad()));
    let woken = count(outcomes().filter(|outcome| outcome.verdict == Verdict::Rearmed));
    let worst = outcomes().map(|outcome| outcome.verdict).max().unwrap_or(Verdict::OnTime);
    let late = outcomes().filter_map(|outcome| outcome.late_ns).max().unwrap_or(0);
    let (tone, word) = match (findings.complete, bad, woken) {
        (false, _, _) => (Tone::Bad, "interrupted"),
        (true, 0, 0) => (Tone::Good, "on time"),
        (true, 0, _) => (Tone::Costly, "woken early"),
        (true, _, _) => (Tone::Bad, "failed"),
    };
    let mut text = match bad {
        0 => format!("None of {} harmed the guest", units::count(all, "migration")),
        _ => format!("{} harmed the guest; at worst: {}", of(bad, all, "migration"), words(worst)),
    };
    if woken != 0 {
        text.push_str(&format!("; {} cost it early wakes", units::grouped(woken)));
    }
    text.push_str(&format!(
        ". The latest tick was {} late; without a migration {} is usual.",
        units::time(late),
        units::time(findings.baseline.late_ns)
    ));
    Found { tone, word: word.to_owned(), text }
}

/// The tables, the charts and the heat map of one sweep.
#[must_use]
pub fn section(title: &str, findings: &Findings) -> Section {
    let section = Section::new(title)
        .table(totals(findings))
        .text(CHARTS)
        .charts(charts(findings))
        .text(HEAT)
        .heat(Heat::from(findings));
    if findings.windows.is_empty() {
        return section;
    }
    let section = section.table(windows(findings));
    match findings.windows.len().saturating_sub(WINDOWS_SHOWN) {
        0 => section,
        more => section.note(format!("{more} more windows are in the map and in --json.")),
    }
}

fn count<T>(items: impl Iterator<Item = T>) -> u64 {
    u64::try_from(items.count()).unwrap_or(u64::MAX)
}

/// How good a verdict is.
#[must_use]
pub fn tone(verdict: Verdict) -> Tone {
    match verdict {
        Verdict::OnTime => Tone::Good,
        Verdict::Rearmed => Tone::Costly,
        _ if verdict.is_bad() => Tone::Bad,
        _ => Tone::Costly,
    }
}

fn totals(findings: &Findings) -> Table {
    let header =
        ["TSC", "on time", "woken early", "untold", "late", "unstable", "storm", "clock stepped", "lost", "ended"];
    let mut table = Table::new(header.into_iter().chain(["worst late", "most early wakes"]))
        .caption("Points by verdict, for each frequency")
        .numeric(1..12);
    for totals in &findings.totals {
        let mut row: Vec<Cell> = vec![format!("×{}", totals.ratio).into()];
        row.extend(Verdict::ALL.map(|verdict| {
            let count = totals.verdicts.iter().find(|(of, _)| *of == verdict).map_or(0, |(_, count)| *count);
            match (count, tone(verdict)) {
                (0, _) => "–".into(),
                (count, Tone::Good) => units::grouped(count).into(),
                (count, tone) => Cell::verdict(tone, units::grouped(count)),
            }
        }));
        row.extend([units::time(totals.worst_late_ns).into(), units::grouped(totals.most_early_wakes).into()]);
        table.row(row);
    }
    table
}

fn windows(findings: &Findings) -> Table {
    let mut table =
        Table::new(["TSC", "verdict", "points", "numbers", "worst", "first instruction", "last instruction"])
            .caption("Windows: neighbouring points with one verdict other than on time")
            .numeric([2, 3]);
    for window in findings.windows.iter().take(WINDOWS_SHOWN) {
        let place = |address| Cell::code(instruction(findings, address));
        let numbers = if window.first == window.last {
            at(&window.first)
        } else {
            format!("{}–{}", at(&window.first), at(&window.last))
        };
        table.row([
            format!("×{}", window.ratio).into(),
            Cell::verdict(tone(window.verdict), words(window.verdict)),
            units::grouped(window.points).into(),
            numbers.into(),
            worst(window).into(),
            place(window.first_address),
            place(window.last_address),
        ]);
    }
    table
}

/// An instruction, then its source line and function: the instruction is first, since names of functions are long.
fn instruction(findings: &Findings, address: u64) -> String {
    let Some(code) = findings.code_at(address) else { return format!("{address:#x}") };
    let parts = [Some(&code.instruction), code.source.as_ref(), code.symbol.as_ref()];
    parts.into_iter().flatten().map(String::as_str).collect::<Vec<_>>().join("  ")
}

/// The function, instruction and source line at `address`, in one line.
pub(super) fn place(findings: &Findings, address: u64) -> String {
    let Some(code) = findings.code_at(address) else { return format!("{address:#x}") };
    let symbol = code.symbol.clone().unwrap_or_else(|| format!("{address:#x}"));
    let source = code.source.as_ref().map(|source| format!("  {source}")).unwrap_or_default();
    format!("{symbol}  {}{source}", code.instruction)
}

/// The worst number of a window; empty where the verdict has none.
pub(super) fn worst(window: &Window) -> String {
    match window.verdict {
        Verdict::Rearmed | Verdict::Storm => units::count(window.most_early_wakes, "early wake"),
        Verdict::ClockStepped => format!("clock {:+} ns", window.worst_clock_error_ns),
        Verdict::Late => format!("{} late", units::time(window.worst_late_ns.unwrap_or(0))),
        Verdict::OnTime | Verdict::Untold | Verdict::Unstable | Verdict::Lost | Verdict::Ended => String::new(),
    }
}

/// A chart for each frequency: lateness by point.
fn charts(findings: &Findings) -> Vec<Chart> {
    let single = findings.inputs.depth == 1;
    let late_ns = findings.baseline.late_ns.saturating_add(findings.inputs.tolerance_ns);
    let chart = |(index, target): (usize, &crate::sweep::result::Target)| {
        let outcomes = findings.points.iter().enumerate().filter_map(|(number, point)| {
            let x = point.at.first().filter(|_| single).copied();
            Some((x.or_else(|| u64::try_from(number).ok())?, point.outcomes.get(index)?))
        });
        let mut series: [Vec<(u64, i64)>; Verdict::ALL.len()] = Default::default();
        for (x, outcome) in outcomes {
            let place = Verdict::ALL.iter().position(|verdict| *verdict == outcome.verdict);
            if let Some(points) = place.and_then(|place| series.get_mut(place)) {
                points.push((x, lateness(outcome, findings.inputs.patience_ns)));
            }
        }
        let title = format!("×{} ({})", target.ratio, target.tsc_khz);
        let chart = Chart::new(title, Axis::Number).late_from(late_ns);
        Verdict::ALL
            .iter()
            .zip(series)
            .fold(chart, |chart, (verdict, points)| chart.series(words(*verdict), look(*verdict), points))
    };
    findings.inputs.ratios.iter().enumerate().map(chart).collect()
}

/// Lateness to draw. A tick that did not come is drawn as late as the run waited for it.
fn lateness(outcome: &Outcome, patience_ns: u64) -> i64 {
    let late_ns = match outcome.verdict {
        Verdict::Storm | Verdict::Lost | Verdict::Ended => patience_ns,
        _ => outcome.late_ns.unwrap_or(0),
    };
    i64::try_from(late_ns).unwrap_or(i64::MAX)
}

const fn look(verdict: Verdict) -> Look {
    match verdict {
        Verdict::OnTime => Look::Good,
        Verdict::Rearmed => Look::Early,
        Verdict::Late => Look::Late,
        Verdict::Storm => Look::Storm,
        Verdict::Untold | Verdict::Unstable | Verdict::ClockStepped => Look::Clock,
        Verdict::Lost | Verdict::Ended => Look::Fatal,
    }
}

#[cfg(test)]
pub(super) mod samples {
    //! A made-up sweep: six points of three instructions in two functions, two frequencies.

    use serde_json::json;

    use crate::sweep::result::Findings;

    /// Points 2 and 3 are late at ×0.5, point 5 is woken early at ×2. One symbol is markup.
    pub(crate) fn findings() -> Findings {
        let outcome = |verdict: &str, early: u64, late: u64| json!({"verdict": verdict, "early_wakes": early, "late_ns": late, "clock_error_ns": -1});
        let point = |at: u64| {
            let slow = if matches!(at, 2 | 3) { outcome("late", 0, 9_999_963) } else { outcome("on-time", 0, 1_963) };
            let fast = if at == 5 { outcome("rearmed", 3, 2_963) } else { outcome("on-time", 0, 1_963) };
            let address = ["0x100200", "0x100202", "0x100300"][usize::try_from(at / 2).unwrap()];
            json!({"at": [at], "cpu": 0, "address": address, "halted": false, "vm_ns": 30_000 + at, "outcomes": [slow, fast]})
        };
        let code = |address: &str, symbol: &str| json!({"address": address, "symbol": symbol, "bytes": "90", "instruction": "nop", "source": "a.rs:1"});
        let window = |ratio: &str, verdict: &str, first: u64, last: u64, address: &str| {
            json!({"ratio": ratio, "verdict": verdict, "first": [first], "last": [last], "points": last - first + 1,
                "first_address": address, "last_address": address, "worst_late_ns": 9_999_963, "most_early_wakes": 3,
                "worst_clock_error_ns": -1})
        };
        let findings = json!({
            "schema": "vmm-sweep/1",
            "inputs": {"guest": "a guest", "guest_crc32": 7, "cmdline": "clockevent=x", "memory": 16_777_216, "cpus": 1,
                "seed": 0, "x2apic": true, "tsc_khz": 2_600_000, "from": "tick:3", "to": "one tick later",
                "every": "instruction", "ratios": [{"ratio": "0.5", "tsc_khz": 1_300_000}, {"ratio": "2", "tsc_khz": 5_200_000}],
                "deadline": "rescale", "downtime": "freeze", "downtime_ns": 0, "inject": null, "ticks": 1, "depth": 1,
                "samples": null, "tolerance_ns": 10_000, "patience_ns": 300_000_000},
            "shard": null,
            "complete": true,
            "extent": {"boundaries": 6, "points": 6, "operations": 4, "from_vm_ns": 1, "to_vm_ns": 2},
            "baseline": {"late_ns": 1_964, "early_wakes": 0, "period_ns": 10_000_000},
            "totals": [
                {"ratio": "0.5", "verdicts": [["on-time", 4], ["late", 2]], "worst_late_ns": 9_999_963, "most_early_wakes": 0},
                {"ratio": "2", "verdicts": [["on-time", 5], ["rearmed", 1]], "worst_late_ns": 2_963, "most_early_wakes": 3}],
            "windows": [window("0.5", "late", 2, 3, "0x100202"), window("2", "rearmed", 5, 5, "0x100300")],
            "code": [code("0x100200", "f</script><b>&"), code("0x100202", "f</script><b>&+0x2"), code("0x100300", "g")],
            "points": (0..6).map(point).collect::<Vec<_>>(),
        });
        serde_json::from_value(findings).unwrap()
    }
}

#[cfg(test)]
mod tests {
    use super::{samples::findings, *};

    #[test]
    fn the_summary_names_the_worst_verdict() {
        let mut findings = findings();
        let summary = found(&findings);
        assert_eq!(summary.tone, Tone::Bad);
        let text = summary.text;
        assert!(text.starts_with("2 of 12 migrations harmed the guest; at worst: late; 1 cost"), "{text}");
        findings.points.drain(2..=3);
        assert_eq!(found(&findings).tone, Tone::Costly);
        findings.complete = false;
        assert_eq!(found(&findings).word, "interrupted");
    }

    #[test]
    fn every_outcome_is_a_point_of_its_frequencys_chart() {
        let html = page(&findings(), "vmm sweep").render();
        assert_eq!(html.matches("<figure class=\"chart\" data-points=\"6\">").count(), 2);
        assert!(html.contains("f&lt;/script&gt;&lt;b&gt;&amp;+0x2") && !html.contains("<b>"));
    }

    #[test]
    fn a_lost_tick_is_as_late_as_it_was_waited_for() {
        let mut outcome = findings().points[0].outcomes[0].clone();
        (outcome.verdict, outcome.late_ns) = (Verdict::Lost, None);
        assert_eq!(lateness(&outcome, 77), 77);
    }
}
