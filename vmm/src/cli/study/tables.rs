//! The study's tables, as Markdown.

use comfy_table::{Table, presets::ASCII_MARKDOWN};
use lab::{
    report::study::{cell_in_a_word, fault_in_a_word},
    study::{
        Study,
        arithmetic::Arithmetic,
        faults,
        matrix::{RATIOS, Row},
    },
};

use crate::cli::{text::Text, units::time};

pub(super) fn text(study: &Study) -> Text {
    let mut out = Text::default();
    if let Some(arithmetic) = &study.arithmetic {
        precision(&mut out, arithmetic);
        cost(&mut out, arithmetic);
    }
    if let Some(rows) = &study.matrix {
        matrix(&mut out, rows);
    }
    if let Some(rows) = &study.faults {
        faults(&mut out, rows);
    }
    out
}

fn precision(out: &mut Text, arithmetic: &Arithmetic) {
    out.line("## Precision\n");
    out.line(format!(
        "{} random waits for each TSC frequency; against the exact inverse of the page.\n",
        arithmetic.samples
    ));
    let mut table = markdown([
        "frequencies",
        "wait",
        "conversion",
        "early",
        "over 1 µs",
        "most",
        "in ticks",
        "RMS",
        "in ticks",
        "late",
    ]);
    for row in &arithmetic.precision {
        table.add_row([
            row.frequencies.clone(),
            row.wait.clone(),
            row.conversion.clone(),
            format!("{:.1} %", row.early_share * 100.0),
            format!("{:.1} %", row.over_1us_share * 100.0),
            time(row.most_early_ns),
            row.most_early_ticks.to_string(),
            if row.rms_ns < 1e3 { format!("{:.2} ns", row.rms_ns) } else { format!("{:.1} µs", row.rms_ns / 1e3) },
            format!("{:.2}", row.rms_ticks),
            row.late.to_string(),
        ]);
    }
    out.table(table, 3..10);
}

fn cost(out: &mut Text, arithmetic: &Arithmetic) {
    out.line("\n## Cost of a tick, counted by stepping\n");
    let mut table = markdown(["clockevent", "instructions", "divisions", "multiplications", "exits"]);
    for row in &arithmetic.cost {
        table.add_row([
            row.clockevent.clone(),
            row.tick.instructions.to_string(),
            row.tick.divisions.to_string(),
            row.tick.multiplications.to_string(),
            row.tick.operations.to_string(),
        ]);
    }
    out.table(table, 1..5);
}

fn matrix(out: &mut Text, rows: &[Row]) {
    out.line("\n## A migration at every instruction of a tick\n");
    out.line("A cell: the worst verdict, at how many of the tick's instructions (`all` or a number), and by how much at worst. \
         `ok` = every tick in time.\n");
    let mut header = vec!["clockevent".to_owned(), "deadline".to_owned(), "points".to_owned()];
    header.extend(RATIOS.map(|ratio| format!("×{ratio}")));
    let mut table = Table::new();
    table.load_style(ASCII_MARKDOWN);
    table.set_header(header);
    for row in rows {
        let mut line = vec![row.clockevent.clone(), row.deadline.as_str().to_owned(), row.points.to_string()];
        line.extend(row.cells.iter().map(|cell| cell_in_a_word(cell, row.points)));
        table.add_row(line);
    }
    out.table(table, 2..3);
}

fn faults(out: &mut Text, rows: &[faults::Row]) {
    out.line("\n## A migration to ×0.5 whose restore has a fault\n");
    let mut table = markdown(["fault", "clockevent", "points", "verdicts", "worst late"]);
    for row in rows {
        table.add_row([
            row.fault.clone(),
            row.clockevent.clone(),
            row.points.to_string(),
            fault_in_a_word(row),
            time(row.totals.worst_late_ns),
        ]);
    }
    out.table(table, 2..3);
}

fn markdown<const N: usize>(header: [&str; N]) -> Table {
    let mut table = Table::new();
    table.load_style(ASCII_MARKDOWN);
    table.set_header(header);
    table
}
