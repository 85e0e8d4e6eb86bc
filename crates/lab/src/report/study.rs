//! The page of a study.

use super::{
    Cell, Found, Page, Section, Table,
    sweep::{section, tone},
    table::Tone,
    units,
};
use crate::{
    study::{
        Study,
        arithmetic::Arithmetic,
        faults,
        matrix::{self, RATIOS},
    },
    sweep::{result::Findings, verdict::Verdict},
};

/// The page of a study. `sweeps`, with a title each, are those whose points are shown one by one.
#[must_use]
pub fn page(study: &Study, sweeps: &[(String, Findings)], command: &str) -> Page {
    let mut page = Page::new("Study: kvmclock TSC deadlines across a migration", command, found(study));
    if let Some(rows) = &study.matrix {
        page = page.section(matrix_section(rows));
    }
    if let Some(rows) = &study.faults {
        page = page.section(faults_section(rows));
    }
    if let Some(arithmetic) = &study.arithmetic {
        page = page.section(arithmetic_section(arithmetic));
    }
    sweeps.iter().fold(page, |page, (title, findings)| page.section(section(title, findings)))
}

fn found(study: &Study) -> Found {
    let rows = study.matrix.iter().flatten();
    let safe: Vec<String> = rows
        .filter(|row| row.cells.iter().all(|cell| !cell.worst.is_bad()))
        .map(|row| format!("{} under {}", row.clockevent, row.deadline.as_str()))
        .collect();
    let text = match (study.matrix.as_ref().map(Vec::len), safe.len()) {
        (None, _) => "Without the matrix of clockevents and policies.".to_owned(),
        (Some(all), 0) => format!("None of {all} combinations of clockevent and policy bears every migration."),
        (Some(all), some) => format!("{some} of {all} bear every migration: {}.", safe.join("; ")),
    };
    Found { tone: Tone::Good, word: "measured".to_owned(), text }
}

fn matrix_section(rows: &[matrix::Row]) -> Section {
    let header = ["clockevent", "deadline", "points"].map(str::to_owned).into_iter();
    let mut table = Table::new(header.chain(RATIOS.map(|ratio| format!("×{ratio}")))).numeric([2]);
    for row in rows {
        let mut cells: Vec<Cell> =
            vec![Cell::code(&row.clockevent), row.deadline.as_str().into(), units::grouped(row.points).into()];
        cells.extend(row.cells.iter().map(|cell| Cell::verdict(tone(cell.worst), cell_in_a_word(cell, row.points))));
        table.row(cells);
    }
    Section::new("A migration at every instruction of a tick")
        .text(
            "The worst verdict, at how many of the tick's instructions (all, or a number), and by how much at worst. Each row \
             is a sweep.",
        )
        .table(table)
}

fn faults_section(rows: &[faults::Row]) -> Section {
    let mut table =
        Table::new(["fault", "clockevent", "points", "verdicts", "worst late", "what it stands for"]).numeric([2, 4]);
    for row in rows {
        let worst = row.totals.verdicts.iter().map(|(verdict, _)| *verdict).max().unwrap_or(Verdict::OnTime);
        table.row([
            Cell::code(&row.fault),
            Cell::code(&row.clockevent),
            units::grouped(row.points).into(),
            Cell::verdict(tone(worst), fault_in_a_word(row)),
            units::time(row.totals.worst_late_ns).into(),
            Cell::from(row.story.as_str()),
        ]);
    }
    Section::new("A migration whose restore has a fault").table(table)
}

fn arithmetic_section(arithmetic: &Arithmetic) -> Section {
    let header =
        ["frequencies", "wait", "conversion", "early", "over 1 µs", "most", "in ticks", "RMS ns", "RMS ticks", "late"];
    let mut precision = Table::new(header).caption("Precision, against the exact inverse of the page").numeric(3..10);
    for row in &arithmetic.precision {
        precision.row([
            row.frequencies.clone(),
            row.wait.clone(),
            row.conversion.clone(),
            format!("{:.1} %", row.early_share * 100.0),
            format!("{:.1} %", row.over_1us_share * 100.0),
            units::time(row.most_early_ns),
            units::grouped(row.most_early_ticks),
            format!("{:.2}", row.rms_ns),
            format!("{:.2}", row.rms_ticks),
            units::grouped(row.late),
        ]);
    }
    let mut cost = Table::new(["clockevent", "instructions", "divisions", "multiplications", "exits"])
        .caption("Cost of a tick, counted by stepping")
        .numeric(1..5);
    for row in &arithmetic.cost {
        cost.row([
            Cell::code(&row.clockevent),
            units::grouped(row.tick.instructions).into(),
            units::grouped(row.tick.divisions).into(),
            units::grouped(row.tick.multiplications).into(),
            units::grouped(row.tick.operations).into(),
        ]);
    }
    Section::new("Arithmetic").table(precision).table(cost)
}

/// The worst verdict of a cell in a few words; `points` is the number of points in its row.
#[must_use]
pub fn cell_in_a_word(cell: &matrix::Cell, points: u64) -> String {
    let of = |count: u64| if count == points { "all".to_owned() } else { count.to_string() };
    match cell.worst {
        Verdict::OnTime => "ok".to_owned(),
        Verdict::Rearmed => format!("early wakes {}, {}", of(cell.rearmed_points), cell.most_early_wakes),
        Verdict::Late => format!("LATE {}, {}", of(cell.bad_points), units::time(cell.worst_late_ns)),
        Verdict::Lost => format!("LOST {}", of(cell.lost_points)),
        worst @ (Verdict::Untold | Verdict::Unstable | Verdict::Storm | Verdict::ClockStepped | Verdict::Ended) => {
            format!("{} {}", worst.as_str().to_uppercase(), of(cell.bad_points))
        }
    }
}

/// A fault's verdicts, and how many points had them.
#[must_use]
pub fn fault_in_a_word(row: &faults::Row) -> String {
    let verdicts = row.totals.verdicts.iter().map(|(verdict, count)| format!("{} {count}", verdict.as_str()));
    verdicts.collect::<Vec<_>>().join(", ")
}
