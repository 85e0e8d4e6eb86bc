//! Groups neighbouring points with the same verdict into windows, and counts verdicts.

use super::{
    result::{Point, Target, Totals, Window},
    verdict::{Outcome, Verdict},
};

/// The windows of all ratios, in order of ratio, then of points.
pub(super) fn windows(ratios: &[Target], points: &[Point]) -> Vec<Window> {
    let mut windows: Vec<Window> = Vec::new();
    for (index, Target { ratio, .. }) in ratios.iter().enumerate() {
        let mut open: Option<Window> = None;
        let mut previous: Option<&Point> = None;
        for point in points {
            let Some(outcome) = point.outcomes.get(index) else { continue };
            let follows = previous.is_some_and(|before| neighbours(before, point));
            previous = Some(point);
            match &mut open {
                Some(window) if follows && window.verdict == outcome.verdict => extend(window, point, outcome),
                _ => {
                    windows.extend(open.take());
                    open = (outcome.verdict != Verdict::OnTime).then(|| begin(ratio, point, outcome));
                }
            }
        }
        windows.extend(open);
    }
    windows
}

/// Whether two points that follow each other in the list are neighbours. Two pairs are if their first points are equal.
fn neighbours(before: &Point, after: &Point) -> bool {
    match (before.at.as_slice(), after.at.as_slice()) {
        ([_], [_]) => true,
        ([a, _], [b, _]) => a == b,
        _ => false,
    }
}

fn begin(ratio: &str, point: &Point, outcome: &Outcome) -> Window {
    Window {
        ratio: ratio.to_owned(),
        verdict: outcome.verdict,
        first: point.at.clone(),
        last: point.at.clone(),
        points: 1,
        first_address: point.address,
        last_address: point.address,
        worst_late_ns: outcome.late_ns,
        most_early_wakes: outcome.early_wakes,
        worst_clock_error_ns: outcome.clock_error_ns,
    }
}

fn extend(window: &mut Window, point: &Point, outcome: &Outcome) {
    window.last.clone_from(&point.at);
    window.last_address = point.address;
    window.points = window.points.saturating_add(1);
    window.worst_late_ns = window.worst_late_ns.max(outcome.late_ns);
    window.most_early_wakes = window.most_early_wakes.max(outcome.early_wakes);
    if outcome.clock_error_ns.unsigned_abs() > window.worst_clock_error_ns.unsigned_abs() {
        window.worst_clock_error_ns = outcome.clock_error_ns;
    }
}

/// The counts for each ratio.
pub(super) fn totals(ratios: &[Target], points: &[Point]) -> Vec<Totals> {
    let of = |(index, target): (usize, &Target)| {
        let outcomes = || points.iter().filter_map(|point| point.outcomes.get(index));
        let count = |verdict: Verdict| {
            u64::try_from(outcomes().filter(|outcome| outcome.verdict == verdict).count()).unwrap_or(u64::MAX)
        };
        Totals {
            ratio: target.ratio.clone(),
            verdicts: Verdict::ALL
                .map(|verdict| (verdict, count(verdict)))
                .into_iter()
                .filter(|(_, n)| *n != 0)
                .collect(),
            worst_late_ns: outcomes().filter_map(|outcome| outcome.late_ns).max().unwrap_or(0),
            most_early_wakes: outcomes().map(|outcome| outcome.early_wakes).max().unwrap_or(0),
            page_errors_ns: page_errors(outcomes()),
        }
    };
    ratios.iter().enumerate().map(of).collect()
}

/// The least and the most error of each vCPU's page.
fn page_errors<'a>(outcomes: impl Iterator<Item = &'a Outcome>) -> Vec<Option<(i64, i64)>> {
    let mut bounds: Vec<Option<(i64, i64)>> = Vec::new();
    for outcome in outcomes {
        bounds.resize(bounds.len().max(outcome.page_errors_ns.len()), None);
        for (bound, error) in bounds.iter_mut().zip(&outcome.page_errors_ns) {
            let Some(error) = *error else { continue };
            *bound = Some(bound.map_or((error, error), |(least, most)| (least.min(error), most.max(error))));
        }
    }
    bounds
}

#[cfg(test)]
mod tests {
    use vmtime::Khz;

    use super::*;

    fn target(ratio: &str) -> Target {
        Target { ratio: ratio.to_owned(), tsc_khz: Khz::new(1_000_000).unwrap() }
    }

    fn point(at: &[u64], verdicts: &[Verdict]) -> Point {
        let outcome = |verdict: &Verdict| Outcome {
            verdict: *verdict,
            early_wakes: 0,
            late_ns: Some(at.iter().sum()),
            clock_error_ns: 0,
            page_errors_ns: vec![Some(i64::try_from(at[0]).unwrap()), None],
            unstable: false,
            wrong_time: false,
            ended: None,
        };
        Point {
            at: at.to_vec(),
            cpu: 0,
            address: at[0] * 16,
            halted: false,
            vm_ns: 0,
            outcomes: verdicts.iter().map(outcome).collect(),
        }
    }

    #[test]
    fn neighbours_with_one_verdict_are_one_window() {
        use Verdict::{Late, Lost, OnTime};
        let ratios = [target("0.5"), target("2")];
        let points = [
            point(&[0], &[OnTime, Late]),
            point(&[3], &[Late, Late]),
            point(&[6], &[Late, OnTime]),
            point(&[9], &[Lost, Late]),
        ];
        let found = windows(&ratios, &points);
        let brief: Vec<_> = found
            .iter()
            .map(|w| (w.ratio.as_str(), w.verdict, w.first[0], w.last[0], w.points, w.worst_late_ns))
            .collect();
        assert_eq!(
            brief,
            [
                ("0.5", Late, 3, 6, 2, Some(6)),
                ("0.5", Lost, 9, 9, 1, Some(9)),
                ("2", Late, 0, 3, 2, Some(3)),
                ("2", Late, 9, 9, 1, Some(9)),
            ]
        );
        assert_eq!(found[0].last_address, 96);
        let counted = totals(&ratios, &points);
        assert_eq!(counted[0].verdicts, [(OnTime, 1), (Late, 2), (Lost, 1)]);
        assert_eq!(counted[1].worst_late_ns, 9);
        assert_eq!(counted[1].page_errors_ns, [Some((0, 9)), None]);
    }

    #[test]
    fn pairs_with_another_first_point_are_another_window() {
        let ratios = [target("2")];
        let points =
            [point(&[1, 5], &[Verdict::Late]), point(&[1, 7], &[Verdict::Late]), point(&[2, 0], &[Verdict::Late])];
        let found = windows(&ratios, &points);
        assert_eq!(found.iter().map(|w| w.points).collect::<Vec<_>>(), [2, 1]);
    }
}
