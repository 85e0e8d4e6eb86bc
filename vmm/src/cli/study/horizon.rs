//! `vmm study horizon` as text that fits a mail: at most 72 columns.

use std::fmt::Write;

use lab::study::horizon::Horizon;

use crate::cli::{text::Text, units::time};

/// Columns of a line.
const WIDTH: usize = 72;
/// Columns of a formula's name.
const NAME: usize = 13;
/// Frequencies that fit beside each other.
const COLUMNS: usize = 4;

pub(super) fn text(study: &Horizon) -> Text {
    let mut out = Text::default();
    out.line(format!("What each formula is off by after {} days of VM time. Columns: TSC", study.days));
    out.line(format!("frequency in kHz. Negative: behind. Scaling host: {} kHz.", study.host_khz));
    for (block, frequencies) in study.tsc_khz.chunks(COLUMNS).enumerate() {
        let mut header = format!("\n{:NAME$}", "formula");
        for khz in frequencies {
            let _ = write!(header, "{khz:>14}"); // to a String: cannot fail
        }
        out.line(header);
        for row in &study.rows {
            let drifts = row.drift_ps.iter().skip(block * COLUMNS).take(COLUMNS);
            out.line(format!(
                "{:NAME$}{}",
                row.formula,
                drifts.map(|ps| format!("{:>14}", signed(*ps))).collect::<String>()
            ));
        }
    }
    out.line("");
    for row in &study.rows {
        wrapped(&mut out, &row.formula, &row.what);
        wrapped(&mut out, "", &row.source);
    }
    out.line("\nA row alone: vmm study horizon --formula NAME");
    out.line("More: docs/study/horizon.md");
    out
}

/// Picoseconds, with their sign.
fn signed(ps: i64) -> String {
    let ns = ps.unsigned_abs().saturating_add(500) / 1000;
    match ns {
        0 => "0".to_owned(),
        _ => format!("{}{}", if ps < 0 { '-' } else { '+' }, time(ns)),
    }
}

/// Words in lines of at most [`WIDTH`] columns, beside a name.
fn wrapped(out: &mut Text, name: &str, words: &str) {
    let mut line = format!("{name:NAME$}");
    let mut begun = false;
    for word in words.split(' ') {
        if begun && line.chars().count() + 1 + word.chars().count() > WIDTH {
            out.line(line.trim_end());
            line = " ".repeat(NAME);
            begun = false;
        }
        if begun {
            line.push(' ');
        }
        line.push_str(word);
        begun = true;
    }
    out.line(line);
}

#[cfg(test)]
mod tests {
    use lab::study::horizon::study;
    use vmtime::Khz;

    use super::*;

    // Catches: a line that a mail program breaks, or a frequency that is left out.
    #[test]
    fn no_line_has_more_than_72_columns() {
        let six: Vec<Khz> = (1..=6).map(|ghz| Khz::new(ghz * 1_000_000).unwrap()).collect();
        for khz in [&[][..], &six] {
            let all = text(&study(&[], khz, None, 36_525).unwrap()).to_string();
            let long: Vec<&str> = all.lines().filter(|line| line.chars().count() > WIDTH).collect();
            assert!(long.is_empty(), "{long:#?}");
            assert!(khz.iter().all(|khz| all.contains(&khz.get().to_string())), "{all}");
        }
    }

    // Catches: a drift without its sign.
    #[test]
    fn drifts_have_signs() {
        assert_eq!([-1_500, 499, 2_000_000].map(signed), ["-2ns", "0", "+2.0µs"]);
    }
}
