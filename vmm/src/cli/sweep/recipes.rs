//! Recipes on standard output: which there are, and what one loses.

use std::process::ExitCode;

use lab::{
    recipe::{predict, shipped},
    report::units,
    sweep::result::{RecipeUsed, Totals},
};
use vmtime::Khz;

use crate::cli::{
    exit::Result,
    text::{Text, plain},
};

/// `--recipe list`.
pub(super) fn list(khz: Khz) -> Result<ExitCode> {
    let mut out = Text::default();
    let mut table = plain(["recipe", "page ahead of the TSC, 1 vCPU", "4 vCPUs", "what it is"]);
    for recipe in shipped()? {
        let error = |cpus| {
            let errors = predict(&recipe, cpus, khz, khz);
            errors.and_then(|errors| errors.first().map(|ns| nanoseconds(*ns))).unwrap_or_default()
        };
        table.add_row([recipe.name.clone(), error(1), error(4), recipe.about.clone()]);
    }
    out.table(table, 1..3);
    out.print()?;
    Ok(ExitCode::SUCCESS)
}

/// What a recipe must lose, and what it lost.
pub(super) fn errors(out: &mut Text, used: &RecipeUsed, totals: &[Totals]) {
    out.line(format!("\n{}: {}", used.name, used.about));
    // Of a restore into this VMM nothing is measured in the pages.
    if totals.iter().all(|totals| totals.page_errors_ns.is_empty()) {
        return;
    }
    let mut table = plain(["ratio", "vCPUs", "page ahead of the TSC, predicted", "measured"]);
    for (totals, predicted) in totals.iter().zip(&used.predicted_ns) {
        let mut cpu = 0;
        while let Some(measured) = totals.page_errors_ns.get(cpu) {
            let of = |cpu: usize| predicted.as_ref().and_then(|errors| errors.get(cpu)).copied();
            // vCPUs with the same numbers share a row.
            let same = |other: &usize| totals.page_errors_ns.get(*other) == Some(measured) && of(*other) == of(cpu);
            let next = (cpu..).find(|other| !same(other)).unwrap_or(cpu);
            let last = next.saturating_sub(1);
            table.add_row([
                format!("×{}", totals.ratio),
                if last == cpu { cpu.to_string() } else { format!("{cpu} to {last}") },
                of(cpu).map_or_else(|| "its whole uptime".to_owned(), nanoseconds),
                match *measured {
                    None => "no page".to_owned(),
                    Some((least, most)) if least == most => nanoseconds(least),
                    Some((least, most)) => format!("{} to {}", nanoseconds(least), nanoseconds(most)),
                },
            ]);
            cpu = next;
        }
    }
    out.table(table, 2..4);
}

/// Nanoseconds with their sign, in groups of three digits.
fn nanoseconds(ns: i64) -> String {
    let sign = match ns {
        ..0 => "-",
        0 => "",
        1.. => "+",
    };
    format!("{sign}{} ns", units::grouped_by(ns.unsigned_abs(), ','))
}

#[cfg(test)]
mod tests {
    use super::*;

    // Catches: commas in the wrong places, which make another number of it.
    #[test]
    fn nanoseconds_are_grouped() {
        let cases =
            [(0, "0 ns"), (7, "+7 ns"), (-999, "-999 ns"), (1_000, "+1,000 ns"), (-12_345_678, "-12,345,678 ns")];
        for (ns, text) in cases {
            assert_eq!(nanoseconds(ns), text);
        }
    }
}
