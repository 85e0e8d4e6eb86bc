//! A sweep as test cases: one for each frequency and function.

use std::collections::BTreeMap;

use super::{Case, Failure, FailureKind, Suite};
use crate::{
    report::{
        heat::{at, function, words},
        sweep::place,
        units,
    },
    sweep::{
        result::{Findings, Point},
        verdict::{Outcome, Verdict},
    },
};

/// Windows that a failure lists at most.
const WINDOWS_NAMED: usize = 20;

/// Neighbouring points of one function with the same bad verdict.
struct Run<'a> {
    verdict: Verdict,
    first: &'a Point,
    last: &'a Point,
    points: u64,
    late_ns: Option<u64>,
    clock_error_ns: i64,
}

/// The points of one case, collected while the sweep's points are read in order.
#[derive(Default)]
struct Group<'a> {
    points: u64,
    bad: u64,
    rearmed: u64,
    worst: Option<Verdict>,
    runs: Vec<Run<'a>>,
    more_runs: u64,
    /// Index of the last bad point in the list of all points, and its verdict.
    last_bad: Option<(usize, Verdict)>,
}

impl Suite {
    /// One case for each frequency and function, in order of addresses; it fails if any point in the function harmed
    /// the guest. An interrupted sweep has one more case, which fails.
    #[must_use]
    pub fn of_sweep(findings: &Findings) -> Self {
        let mut groups: BTreeMap<(usize, u64), (&str, Group<'_>)> = BTreeMap::new();
        let starts = function_starts(findings);
        for (number, point) in findings.points.iter().enumerate() {
            let name = function(findings.code_at(point.address)).0;
            let start = starts.get(name).copied().unwrap_or(point.address);
            for (ratio, outcome) in point.outcomes.iter().enumerate() {
                groups.entry((ratio, start)).or_insert_with(|| (name, Group::default())).1.add(number, point, outcome);
            }
        }
        let ratio = |index: usize| findings.inputs.ratios.get(index).map(|target| target.ratio.as_str()).unwrap_or("?");
        let mut cases: Vec<Case> = groups
            .into_iter()
            .map(|((index, _), (name, group))| group.case(format!("×{}", ratio(index)), name, findings))
            .collect();
        if !findings.complete {
            let message = "the sweep was interrupted: not every point was tried".to_owned();
            cases.push(Case {
                class: "sweep".to_owned(),
                name: "every point was tried".to_owned(),
                failure: Some(Failure { detail: message.clone(), message, kind: FailureKind::Error }),
                remark: None,
                skipped: None,
            });
        }
        Self { name: format!("vmm sweep {}", findings.inputs.cmdline), cases }
    }
}

/// The lowest address of each function that the sweep met.
fn function_starts(findings: &Findings) -> BTreeMap<&str, u64> {
    let mut starts = BTreeMap::new();
    for code in &findings.code {
        starts.entry(function(Some(code)).0).or_insert(code.address);
    }
    starts
}

impl<'a> Group<'a> {
    fn add(&mut self, number: usize, point: &'a Point, outcome: &Outcome) {
        self.points = self.points.saturating_add(1);
        self.rearmed = self.rearmed.saturating_add(u64::from(outcome.verdict == Verdict::Rearmed));
        if !outcome.verdict.is_bad() {
            return;
        }
        self.bad = self.bad.saturating_add(1);
        self.worst = self.worst.max(Some(outcome.verdict));
        let goes_on = self
            .last_bad
            .is_some_and(|(last, verdict)| last.checked_add(1) == Some(number) && verdict == outcome.verdict);
        self.last_bad = Some((number, outcome.verdict));
        if goes_on && self.more_runs == 0 {
            if let Some(run) = self.runs.last_mut() {
                run.last = point;
                run.points = run.points.saturating_add(1);
                run.late_ns = run.late_ns.max(outcome.late_ns);
                if outcome.clock_error_ns.unsigned_abs() > run.clock_error_ns.unsigned_abs() {
                    run.clock_error_ns = outcome.clock_error_ns;
                }
            }
        } else if !goes_on && self.runs.len() < WINDOWS_NAMED {
            self.runs.push(Run {
                verdict: outcome.verdict,
                first: point,
                last: point,
                points: 1,
                late_ns: outcome.late_ns,
                clock_error_ns: outcome.clock_error_ns,
            });
        } else if !goes_on {
            self.more_runs = self.more_runs.saturating_add(1);
        }
    }

    fn case(self, class: String, name: &str, findings: &Findings) -> Case {
        let failure = self.worst.map(|worst| {
            let mut detail: String = self.runs.iter().map(|run| run.line(findings)).collect();
            if self.more_runs != 0 {
                detail.push_str(&format!("and {}\n", units::count(self.more_runs, "more window")));
            }
            let message = format!("{} of {} points: at worst {}", self.bad, self.points, words(worst));
            Failure { message, detail, kind: FailureKind::Check }
        });
        let remark = (failure.is_none() && self.rearmed != 0)
            .then(|| format!("{} of {} points: woken early, armed again", self.rearmed, self.points));
        Case { class, name: name.to_owned(), failure, remark, skipped: None }
    }
}

impl Run<'_> {
    fn line(&self, findings: &Findings) -> String {
        let worst = match self.verdict {
            Verdict::Late => format!(", worst {} late", units::time(self.late_ns.unwrap_or(0))),
            Verdict::ClockStepped => format!(", worst clock error {} ns", self.clock_error_ns),
            _ => String::new(),
        };
        format!(
            "{} at points {} to {} ({}){worst}\n  first: {}\n  last:  {}\n",
            words(self.verdict),
            at(&self.first.at),
            at(&self.last.at),
            self.points,
            place(findings, self.first.address),
            place(findings, self.last.address),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::sweep::samples::findings;

    #[test]
    fn a_case_for_each_frequency_and_function() {
        let suite = Suite::of_sweep(&findings());
        let cases: Vec<_> =
            suite.cases.iter().map(|case| (case.class.as_str(), case.name.as_str(), case.failure.is_some())).collect();
        let f = "f</script><b>&";
        assert_eq!(cases, [("×0.5", f, true), ("×0.5", "g", false), ("×2", f, false), ("×2", "g", false)]);
        assert_eq!(suite.failures(), 1);
        let failure = suite.cases[0].failure.as_ref().unwrap();
        assert_eq!(failure.message, "2 of 4 points: at worst late");
        assert!(failure.detail.starts_with("late at points 2 to 3 (2), worst 10.0ms late\n"), "{}", failure.detail);
        assert_eq!(suite.cases[3].remark.as_deref(), Some("1 of 2 points: woken early, armed again"));
    }

    #[test]
    fn windows_that_are_not_neighbours_stay_separate_and_their_number_is_bounded() {
        let mut findings = findings();
        let (good, bad) = (findings.points[0].clone(), findings.points[2].clone());
        findings.points = (0..100).map(|at| if at % 2 == 0 { good.clone() } else { bad.clone() }).collect();
        let suite = Suite::of_sweep(&findings);
        let failure = suite.cases[0].failure.as_ref().unwrap();
        assert_eq!(failure.detail.matches("first:").count(), WINDOWS_NAMED);
        assert!(failure.detail.ends_with("and 30 more windows\n"), "{}", failure.detail);
    }

    #[test]
    fn an_interrupted_sweep_fails() {
        let mut findings = findings();
        findings.points.truncate(1);
        findings.complete = false;
        assert_eq!(Suite::of_sweep(&findings).failures(), 1);
    }
}
