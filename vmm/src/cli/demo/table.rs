//! The demonstration's table on standard output.

use machine::{TimeMode, audit::Lateness};

use super::{BASE_KHZ, COUNT, HZ, Row, verdict::Verdict};
use crate::cli::{
    text::{Text, plain},
    units::time,
};

pub(super) fn text(rows: &[Row], time: TimeMode) -> Text {
    let mut out = Text::default();
    out.line(format!(
        "A guest with a {HZ} Hz tick boots on a {:.1} GHz TSC, is saved in mid-tick ({} time, deadline policy rescale, \
         downtime\nfrozen) and restored in another process on the same, a slower and a faster TSC. {COUNT} ticks each; \
         lateness is VM time, after\nthe migration, p99/worst, by the guest's clock and by the host's.\n",
        f64::from(BASE_KHZ) / 1e6,
        time.as_str(),
    ));
    let mut table = plain([
        "clockevent",
        "TSC, GHz",
        "ticks",
        "lost",
        "early\nwakes",
        "late (guest)",
        "late (host)",
        "interval\nlasts",
        "clock\nback",
        "verdict",
    ]);
    let mut last = "";
    for row in rows {
        let name = if row.clockevent == last { "" } else { row.clockevent };
        last = row.clockevent;
        let after = &row.after;
        table.add_row([
            name.replace(" conversion=", " "),
            format!("{:.1} → {:.1}", f64::from(BASE_KHZ) / 1e6, f64::from(row.tsc_khz) / 1e6),
            row.ticks.to_string(),
            row.lost.to_string(),
            after.early_wakes.to_string(),
            after.late_by_guest.map_or_else(|| "-".to_owned(), lateness),
            after.late_by_host.map_or_else(|| "-".to_owned(), lateness),
            after.interval_ratio.map_or_else(|| "-".to_owned(), |ratio| format!("×{ratio:.2}")),
            after.clock_steps_back.to_string(),
            verdict(&row.verdict),
        ]);
    }
    out.table(table, 2..9);
    out.line(
        "\nlapic-deadline keeps using the TSC frequency that it read at boot: after a migration every interval it arms lasts\n\
         f1/f2 of what was asked (on a faster TSC it is woken early and arms again, and again). The kvmclock devices take\n\
         the new frequency from the page."
    );
    out
}

fn lateness(late: Lateness) -> String {
    format!("{}/{}", time(late.p99_ns), time(late.worst_ns))
}

pub(super) fn verdict(verdict: &Verdict) -> String {
    match verdict {
        Verdict::Good => "ok".to_owned(),
        Verdict::WrongAsExpected { interval_ratio } if *interval_ratio > 1.0 => "WRONG: late".to_owned(),
        Verdict::WrongAsExpected { .. } => "WRONG: early".to_owned(),
        Verdict::Unexpected { reason } => format!("UNEXPECTED: {reason}"),
    }
}
