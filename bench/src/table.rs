//! Writes the table, for a terminal and for a page.

use crate::{
    row::{Check, Series},
    spread::Spread,
    suite::{Results, RowResult},
};

/// A line of the table: one target of a row, or why the row has none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Line {
    what: String,
    measured: String,
    number: String,
    target: String,
    verdict: String,
}

/// One word for a line.
fn verdict(check: &Check) -> String {
    let missed = check.values.iter().filter(|value| !check.bound.holds(**value)).count();
    match (check.required, missed) {
        (true, 0) => "met".to_owned(),
        (true, missed) if check.values.len() > 1 => format!("MISSED in {missed} of {}", check.values.len()),
        (true, _) => "MISSED".to_owned(),
        (false, 0) => "reached".to_owned(),
        (false, _) => "not reached".to_owned(),
    }
}

/// The median of the runs, with the least and the greatest if they differ.
fn number(check: &Check) -> String {
    let Some(Spread { median, .. }) = Spread::of(&check.values) else { return "–".to_owned() };
    let least = check.values.iter().copied().fold(f64::INFINITY, f64::min);
    let most = check.values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let [median, least, most] = [median, least, most].map(|value| check.unit.show(value));
    if least == most { median } else { format!("{median} ({least} … {most})") }
}

/// A series' name, and its median with quartiles.
fn series(series: &Series) -> String {
    let Some(Spread { median, low, high }) = Spread::of(&series.samples) else {
        return format!("{}: –", series.who);
    };
    let [median, low, high] = [median, low, high].map(|value| series.unit.show(value));
    if low == high {
        format!("{}: {median}", series.who)
    } else {
        format!("{}: {median} ({low} … {high})", series.who)
    }
}

/// The lines of a row: a column with a series in each line, beside the checks.
fn lines(row: &RowResult) -> Vec<Line> {
    let what = row.what.clone();
    if let Some(skipped) = &row.skipped {
        let verdict = if skipped.missed { "MISSED" } else { "not measured" };
        let measured = format!("skipped: {}", skipped.why);
        return vec![Line { what, measured, verdict: verdict.to_owned(), ..Line::default() }];
    }
    let mut lines = vec![Line::default(); row.series.len().max(row.checks.len()).max(1)];
    for (line, of) in lines.iter_mut().zip(&row.series) {
        line.measured = series(of);
    }
    for (line, check) in lines.iter_mut().zip(&row.checks) {
        line.number = format!("{}: {}", check.name, number(check));
        line.target = check.bound.show(check.unit);
        line.verdict = verdict(check);
    }
    if let Some(first) = lines.first_mut() {
        first.what = what;
    }
    lines
}

const HEADINGS: [&str; 5] =
    ["what", "number: median of runs (least … most)", "target", "", "measured: median (quartiles)"];

fn cells(line: Line) -> [String; 5] {
    let Line { what, measured, number, target, verdict } = line;
    [what, number, target, verdict, measured]
}

/// The table for a terminal: columns aligned, with notes below.
#[must_use]
pub fn text(results: &Results) -> String {
    let mut rows = vec![HEADINGS.map(str::to_owned)];
    rows.extend(results.rows.iter().flat_map(lines).map(cells));
    let mut widths = [0; 5];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    let mut out = String::new();
    for row in rows {
        let padded: Vec<String> = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        out.push_str(padded.join("   ").trim_end());
        out.push('\n');
    }
    for row in &results.rows {
        for note in &row.notes {
            out.push_str(&format!("{}: {note}\n", row.id));
        }
    }
    out
}

/// The table for a page, as Markdown: one row for each row, with its checks and series on lines within the cells.
#[must_use]
pub fn markdown(results: &Results) -> String {
    let mut out = String::from(
        "| what | number: median of runs (least … most) | target | | measured: median (quartiles) |\n|---|---|---|---|---|\n",
    );
    for row in &results.rows {
        let columns = lines(row).into_iter().map(cells).fold([const { Vec::new() }; 5], |mut columns, line| {
            // The cells of a check are aligned line by line; the column of series is independent of them.
            let [what, number, target, verdict, measured] = &mut columns;
            let [cell, checked @ .., measured_now] = line;
            if !cell.is_empty() {
                what.push(cell);
            }
            if checked.iter().any(|cell| !cell.is_empty()) {
                for (column, cell) in [number, target, verdict].into_iter().zip(checked) {
                    column.push(cell);
                }
            }
            if !measured_now.is_empty() {
                measured.push(measured_now);
            }
            columns
        });
        let columns = columns.map(|column| column.join("<br>").replace('|', "\\|"));
        out.push_str(&format!("| {} |\n", columns.join(" | ")));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{row::Bound, unit::Unit};

    fn row(values: &[f64], required: bool) -> RowResult {
        let check = Check {
            name: "a by b".into(),
            unit: Unit::Ratio,
            bound: Bound::AtMost(1.0),
            required,
            values: values.into(),
        };
        let series = Series { who: "a".into(), unit: Unit::Ns, samples: vec![1000.0, 1000.0] };
        let (series, checks) = (vec![series], vec![check]);
        RowResult { id: "r".into(), what: "thing".into(), skipped: None, series, checks, notes: Vec::new() }
    }

    #[test]
    fn a_line_shows_what_was_met_and_how_often_not() {
        let line = lines(&row(&[0.9, 1.2, 0.8], true)).remove(0);
        assert_eq!(line.verdict, "MISSED in 1 of 3");
        assert_eq!(line.number, "a by b: ×0.90 (×0.80 … ×1.20)");
        assert_eq!(line.measured, "a: 1.00 µs");
        assert_eq!(lines(&row(&[0.9], true)).remove(0).verdict, "met");
        assert_eq!(lines(&row(&[1.1], false)).remove(0).verdict, "not reached");
    }
}
