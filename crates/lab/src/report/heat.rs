//! The heat map: the outcome of a migration at each instruction boundary to each frequency.
//!
//! Most rows of a long sweep equal their neighbours. So the page shows a run of rows with the same verdicts as one row,
//! which the reader can open; the page's script then makes the rows from this data. To keep the data small, addresses
//! and outcomes are in lists of their own, and rows hold indices into them.

use std::collections::HashMap;

use maud::{Markup, html};
use serde::Serialize;

use super::embed;
use crate::sweep::{
    result::{Code, Findings, Point},
    verdict::{Outcome, Verdict},
};

/// A heat map of a sweep.
#[derive(Clone, Debug, Serialize)]
pub struct Heat {
    ratios: Vec<String>,
    code: Vec<Instruction>,
    outcomes: Vec<OutcomeTuple>,
    rows: Vec<Row>,
}

#[derive(Clone, Debug, Serialize)]
struct Instruction {
    address: String,
    function: String,
    offset: String,
    text: String,
    source: String,
}

/// An outcome: its verdict, early wakes, lateness, clock error, and why the guest ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
struct OutcomeTuple(&'static str, u64, Option<u64>, i64, Option<String>);

/// The point, its index in `code`, its vCPU, whether that had halted, and the indices of its outcomes in `outcomes`.
#[derive(Clone, Debug, Serialize)]
struct Row(String, usize, u32, bool, Vec<usize>);

impl From<&Findings> for Heat {
    fn from(findings: &Findings) -> Self {
        let mut code = Interner::default();
        let mut outcomes = Interner::default();
        let mut row = |point: &Point| {
            let indices = point.outcomes.iter().map(|outcome| outcomes.index(outcome_tuple(outcome))).collect();
            Row(at(&point.at), code.index(point.address), point.cpu, point.halted, indices)
        };
        let rows = findings.points.iter().map(&mut row).collect();
        Self {
            ratios: findings.inputs.ratios.iter().map(|target| target.ratio.clone()).collect(),
            code: code.list.into_iter().map(|address| instruction(address, findings.code_at(address))).collect(),
            outcomes: outcomes.list,
            rows,
        }
    }
}

/// The point's number, or both numbers of a pair.
pub(super) fn at(numbers: &[u64]) -> String {
    numbers.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

/// The function that `code` is in, and how far into it.
pub(super) fn function(code: Option<&Code>) -> (&str, &str) {
    let symbol = code.and_then(|code| code.symbol.as_deref()).unwrap_or("(no symbol)");
    match symbol.rsplit_once("+0x") {
        Some((function, _)) => (function, symbol.get(function.len()..).unwrap_or_default()),
        None => (symbol, ""),
    }
}

/// The letter that stands for a verdict in a cell of the map.
pub(super) const fn letter(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::OnTime => "·",
        Verdict::Rearmed => "E",
        Verdict::Untold => "U",
        Verdict::Late => "L",
        Verdict::Unstable => "W",
        Verdict::Storm => "S",
        Verdict::ClockStepped => "C",
        Verdict::Lost => "N",
        Verdict::Ended => "X",
    }
}

/// A verdict in words.
pub(super) const fn words(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::OnTime => "on time",
        Verdict::Rearmed => "woken early, armed again",
        Verdict::Untold => "not told that it was stopped",
        Verdict::Late => "late",
        Verdict::Unstable => "clocksource marked unstable",
        Verdict::Storm => "storm of early wakes",
        Verdict::ClockStepped => "clock stepped",
        Verdict::Lost => "no tick: lost",
        Verdict::Ended => "guest ended",
    }
}

fn outcome_tuple(outcome: &Outcome) -> OutcomeTuple {
    let Outcome { verdict, early_wakes, late_ns, clock_error_ns, page_errors_ns: _, unstable: _, wrong_time: _, ended } =
        outcome;
    OutcomeTuple(verdict.as_str(), *early_wakes, *late_ns, *clock_error_ns, ended.clone())
}

fn instruction(address: u64, code: Option<&Code>) -> Instruction {
    let (function, offset) = function(code);
    Instruction {
        address: format!("{address:#x}"),
        function: function.to_owned(),
        offset: offset.to_owned(),
        text: code.map(|code| code.instruction.clone()).unwrap_or_default(),
        source: code.and_then(|code| code.source.clone()).unwrap_or_default(),
    }
}

/// Distinct values in the order in which they were first seen, with the index of each.
struct Interner<T> {
    list: Vec<T>,
    indices: HashMap<T, usize>,
}

impl<T> Default for Interner<T> {
    fn default() -> Self {
        Self { list: Vec::new(), indices: HashMap::new() }
    }
}

impl<T: Clone + Eq + std::hash::Hash> Interner<T> {
    fn index(&mut self, value: T) -> usize {
        *self.indices.entry(value).or_insert_with_key(|value| {
            self.list.push(value.clone());
            self.list.len() - 1
        })
    }
}

impl Heat {
    pub(super) fn render(&self) -> Markup {
        html! {
            figure.heat data-points=(self.rows.len()) {
                ul.legend { @for verdict in Verdict::ALL {
                    li { span.cell.{"v-" (verdict.as_str())} { (letter(verdict)) } " " (words(verdict)) }
                } }
                div.scroll.tall tabindex="0" role="region" aria-label="verdicts by instruction and ratio" {
                    table.map {
                        thead { tr {
                            th.n scope="col" { "point" }
                            @for ratio in &self.ratios { th scope="col" { "×" (ratio) } }
                            th.asm scope="col" { "next instruction" }
                            th scope="col" { "source" }
                        } }
                    }
                }
                (embed::json(self))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::sweep::samples::findings;

    #[test]
    fn functions_and_offsets() {
        let code = |symbol: Option<&str>| Code {
            address: 0,
            symbol: symbol.map(str::to_owned),
            bytes: String::new(),
            instruction: String::new(),
            source: None,
        };
        assert_eq!(function(Some(&code(Some("a::b+0x1f")))), ("a::b", "+0x1f"));
        assert_eq!(function(Some(&code(Some("a::b")))), ("a::b", ""));
        assert_eq!(function(Some(&code(None))), ("(no symbol)", ""));
    }

    #[test]
    fn letters_differ() {
        let letters: std::collections::BTreeSet<_> = Verdict::ALL.map(letter).into();
        assert_eq!(letters.len(), Verdict::ALL.len());
    }

    #[test]
    fn every_point_is_a_row_and_each_instruction_is_listed_once() {
        let heat = Heat::from(&findings());
        assert_eq!((heat.rows.len(), heat.ratios.len()), (6, 2));
        assert!(heat.rows.iter().all(|row| row.4.len() == 2));
        assert_eq!(heat.code.len(), 3);
        let html = heat.render().into_string();
        assert!(!html.contains("</script><b>"), "{html}");
    }
}
