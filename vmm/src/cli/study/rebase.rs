//! `vmm study rebase` as text that fits a mail: at most 72 columns.

use lab::study::{
    exact,
    rebase::{Rebase, Row, count::Share},
};

use crate::cli::text::Text;

pub(super) fn text(study: &Rebase) -> Text {
    let mut out = Text::default();
    out.line("A kvmclock page with a new base, counted over all remainders.");
    reads(&mut out, study);
    line(&mut out, study);
    loss(&mut out, study);
    answer(&mut out, study);
    out
}

fn reads(out: &mut Text, study: &Rebase) {
    out.line("\n1. Reads of the new page less those of the old one at the same TSC");
    out.line("   (* is the tsc_shift that KVM chooses, - is never)\n");
    out.line("                           base at any tick,      base a multiple of");
    out.line("                           as KVM has it          2^-shift ticks on");
    out.line("    kHz shift        mul    0 ns  -1 ns  -2 ns     0 ns  -1 ns");
    for row in &study.rows {
        let [any, aligned] = [&row.any_tick, &row.aligned].map(|new| &new.against_old_page);
        let (any, aligned) = (shares(any, &[0, -1, -2]), shares(aligned, &[0, -1]));
        out.line(format!("{} {:#010x} {any}  {aligned}", key(row), row.tsc_to_system_mul));
    }
}

fn line(out: &mut Text, study: &Rebase) {
    out.line("\n2. Reads less the old page's exact line, rounded down\n");
    out.line("               the old page         new base at any tick");
    out.line("    kHz shift    0 ns  -1 ns     0 ns  -1 ns  -2 ns  -3 ns");
    for row in &study.rows {
        let (kept, any) = (shares(&row.kept, &[0, -1]), shares(&row.any_tick.against_line, &[0, -1, -2, -3]));
        out.line(format!("{} {kept}  {any}", key(row)));
    }
}

fn loss(out: &mut Text, study: &Rebase) {
    out.line("\n3. VM time that each new base loses, ns: mean and most; `1 ms` if they");
    out.line("   are exactly that far apart. `chosen`: never so much in total, with");
    out.line("   the best of the last ticks as base and the rest carried. `same`: a");
    out.line("   base so long after the old one is the same page. `drift`: the");
    out.line("   page's rate against the frequency, ns an hour\n");
    out.line("               base at any tick    aligned      chosen   same  drift");
    out.line("    kHz shift  mean  most  1 ms   mean  most                 s   ns/h");
    for row in &study.rows {
        let (any, aligned) = (row.any_tick.loss, row.aligned.loss);
        let each_ms = row.any_tick.loss_each_ms_fs.map_or_else(String::new, |fs| ns(fs, 3));
        out.line(format!(
            "{} {} {} {each_ms:>5}  {} {}  {:>8} {:>6} {:>6}",
            key(row),
            ns(any.mean_fs, 3),
            ns(any.most_fs, 3),
            ns(aligned.mean_fs, 3),
            ns(aligned.most_fs, 3),
            ns(row.look_back.below_fs, 6),
            same(row),
            exact::nearest(row.drift_ps_per_hour.into(), 1000),
        ));
    }
    if let Some(row) = study.rows.first() {
        out.line(format!("\n   `chosen` is among {} ticks.", row.look_back.ticks));
    }
}

fn answer(out: &mut Text, study: &Rebase) {
    if let Some((row, low)) = study.rows.iter().find_map(|row| Some((row, row.lowest?))) {
        out.line("\nWithin 1 ns? Not at any tick, where tsc_shift is negative. At");
        out.line(format!(
            "{} kHz, with the old base at tick 0, a new one at tick {} and a",
            row.tsc_khz, low.base_tick
        ));
        out.line(format!(
            "read at tick {}, the old page shows {} ns and the new one {} ns.",
            low.read_tick, low.old_ns, low.new_ns
        ));
        out.line("With the base a multiple of 2^-shift ticks on: 0 or -1, always.");
    }
    out.line("\nA row alone: vmm study rebase --tsc-khz KHZ --shift N");
    out.line("Proof: docs/study/rebase.md");
}

/// Frequency and shift.
fn key(row: &Row) -> String {
    format!("{:>7} {:>+4}{}", row.tsc_khz, row.tsc_shift, if row.chosen_by_kvm { '*' } else { ' ' })
}

fn shares(shares: &[Share], columns: &[i64]) -> String {
    let cell = |ns: &i64| {
        shares.iter().find(|share| share.ns == *ns).map_or_else(
            || "-".to_owned(),
            |share| {
                let tenths = share.ppm.saturating_add(500) / 1000;
                format!("{}.{}%", tenths / 10, tenths % 10)
            },
        )
    };
    columns.iter().map(|ns| format!("{:>7}", cell(ns))).collect()
}

/// Femtoseconds as nanoseconds with so many decimals, at most 6.
fn ns(fs: u64, decimals: usize) -> String {
    let unit = 10_u64.pow(u32::try_from(decimals).unwrap_or(0));
    let rounded = fs.saturating_mul(unit).saturating_add(500_000) / 1_000_000;
    format!("{}.{:0decimals$}", rounded / unit, rounded % unit)
}

/// After how many seconds a new base is the same page.
fn same(row: &Row) -> String {
    // Milliseconds: ticks / kHz.
    let ms = row.same_page_every_ticks / u64::from(row.tsc_khz);
    format!("{}.{:03}", ms / 1000, ms % 1000)
}

#[cfg(test)]
mod tests {
    use lab::study::rebase::{LOOK_BACK_TICKS, study};

    use super::*;

    // Catches: a line that a mail program breaks.
    #[test]
    fn no_line_has_more_than_72_columns() {
        let all = text(&study(&[], None, LOOK_BACK_TICKS).unwrap()).to_string();
        let long: Vec<&str> = all.lines().filter(|line| line.chars().count() > 72).collect();
        assert!(long.is_empty() && all.lines().count() > 60, "{long:#?}");
    }

    #[test]
    fn femtoseconds_are_rounded() {
        assert_eq!([ns(999_999, 3), ns(1_499, 6), ns(1_500_500, 3), ns(0, 3)], ["1.000", "0.001499", "1.501", "0.000"]);
    }
}
