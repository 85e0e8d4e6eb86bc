//! The demonstration as a page and as test cases.

use lab::report::{
    Cell, Found, Page, Section, Table, Tone,
    cases::{Case, Failure, FailureKind, Suite},
    timeline::HOW_TO_READ,
    units,
};
use machine::{TimeMode, audit::Lateness};

use super::{BASE_KHZ, CLOCKEVENTS, COUNT, HZ, Row, SAVE_AT, table, verdict::Verdict};
use crate::cli::output;

pub(super) fn page(rows: &[Row], time: TimeMode) -> Page {
    let unexpected = rows.iter().filter(|row| !row.verdict.as_expected()).count();
    let wrong = rows.iter().filter(|row| matches!(row.verdict, Verdict::WrongAsExpected { .. })).count();
    let (tone, word) = if unexpected == 0 { (Tone::Good, "as expected") } else { (Tone::Bad, "unexpected") };
    let text = format!(
        "Of {} migrations {wrong} make ticks late or wake the guest early, as a clockevent must that keeps using the TSC \
         frequency it read at boot; {unexpected} went otherwise than they must.",
        rows.len(),
    );
    let found = Found { tone, word: word.to_owned(), text };
    let title = "What a migration to another TSC frequency does to a guest's timer";
    let page = Page::new(title, output::command_line(), found)
        .fact("time", time.as_str())
        .fact("TSC at boot", ghz(BASE_KHZ))
        .fact("tick", format!("{HZ} Hz, {COUNT} ticks"))
        .fact("saved at", SAVE_AT)
        .fact("deadline policy", "rescale")
        .fact("downtime", "freeze")
        .section(Section::new("Every clockevent, every frequency").table(overview(rows)).note(
            "Lateness is VM time after the migration, p99 and worst. An interval lasts so many times what was asked.",
        ));
    let page = CLOCKEVENTS.iter().fold(page, |page, clockevent| {
        let of = rows.iter().filter(|row| row.clockevent == *clockevent);
        let charts = of.filter_map(|row| Some(row.timeline.as_ref()?.overview_chart(&arrow(row)))).collect();
        let section = Section::new(*clockevent);
        let section = if *clockevent == CLOCKEVENTS[0] { section.text(HOW_TO_READ) } else { section };
        page.section(section.charts(charts))
    });
    let first = rows.iter().filter(|row| row.clockevent == CLOCKEVENTS[0]);
    let pages = first.filter_map(|row| Some((arrow(row), row.timeline.as_ref()?)));
    page.section(pages.fold(Section::new(format!("The page, with {}", CLOCKEVENTS[0])), |section, (to, timeline)| {
        section.text(to).table(timeline.page_table())
    }))
}

fn overview(rows: &[Row]) -> Table {
    let header = ["clockevent", "TSC", "verdict", "ticks", "lost", "early wakes", "late (guest)", "late (host)"];
    let mut shown = Table::new(header.into_iter().chain(["interval lasts", "clock back"])).numeric(3..10);
    for row in rows {
        let after = &row.after;
        shown.row([
            Cell::code(row.clockevent.replace(" conversion=", " ")),
            arrow(row).into(),
            Cell::verdict(tone(&row.verdict), table::verdict(&row.verdict)),
            units::grouped(row.ticks).into(),
            units::grouped(row.lost).into(),
            units::grouped(after.early_wakes).into(),
            after.late_by_guest.map_or_else(|| "–".to_owned(), lateness).into(),
            after.late_by_host.map_or_else(|| "–".to_owned(), lateness).into(),
            after.interval_ratio.map_or_else(|| "–".to_owned(), |ratio| format!("×{ratio:.2}")).into(),
            units::grouped(after.clock_steps_back).into(),
        ]);
    }
    shown
}

/// A case for each row, which fails if the row is not as expected. A row of the native clockevent that is good after a
/// migration to another frequency fails, too.
pub(super) fn suite(rows: &[Row]) -> Suite {
    let case = |row: &Row| {
        let word = table::verdict(&row.verdict);
        let failure = match &row.verdict {
            Verdict::Unexpected { reason } => {
                Some(Failure { message: reason.clone(), detail: details(row), kind: FailureKind::Check })
            }
            Verdict::Good | Verdict::WrongAsExpected { .. } => None,
        };
        let wrong = matches!(row.verdict, Verdict::WrongAsExpected { .. });
        let remark = wrong.then(|| format!("{word}, as it must be: {}", details(row)));
        let name = format!("{} TSC, {}", row.tsc, arrow(row));
        Case { class: row.clockevent.to_owned(), name, failure, remark, skipped: None }
    };
    Suite { name: "vmm demonstration".to_owned(), cases: rows.iter().map(case).collect() }
}

fn details(row: &Row) -> String {
    let after = &row.after;
    format!(
        "{} ticks, {} lost, {} early wakes, worst late {} by the guest, intervals last {} of what was asked",
        row.ticks,
        row.lost,
        after.early_wakes,
        after.late_by_guest.map_or_else(|| "–".to_owned(), |late| units::time(late.worst_ns)),
        after.interval_ratio.map_or_else(|| "–".to_owned(), |ratio| format!("×{ratio:.3}")),
    )
}

fn tone(verdict: &Verdict) -> Tone {
    match verdict {
        Verdict::Good => Tone::Good,
        Verdict::WrongAsExpected { interval_ratio } if *interval_ratio < 1.0 => Tone::Costly,
        Verdict::WrongAsExpected { .. } | Verdict::Unexpected { .. } => Tone::Bad,
    }
}

fn arrow(row: &Row) -> String {
    format!("{:.1} → {}", f64::from(BASE_KHZ) / 1e6, ghz(row.tsc_khz))
}

fn ghz(khz: u32) -> String {
    format!("{:.1} GHz", f64::from(khz) / 1e6)
}

fn lateness(late: Lateness) -> String {
    [late.p99_ns, late.worst_ns].map(units::time).join(", ")
}
