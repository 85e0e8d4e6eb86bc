//! Circles: files that need each other, in a wider circle than one folder; and the search for circles in general.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::Reading;
use crate::finding::{Finding, Place};
use crate::modules::Kind;
use crate::resolve::End;
use crate::table::Wider;
use crate::tree::{is_under, parent, stem};

/// Nodes, each with the nodes that it depends on and the first place of that dependency.
pub type Graph = BTreeMap<String, BTreeMap<String, Place>>;

/// The circles of a graph: sets of nodes each of which reaches each other.
#[must_use]
pub fn circles(graph: &Graph) -> Vec<BTreeSet<String>> {
    let reach: BTreeMap<&String, BTreeSet<&String>> = graph.keys().map(|node| (node, reachable(graph, node))).collect();
    let mut circles: Vec<BTreeSet<String>> = Vec::new();
    for (node, reached) in &reach {
        let mutual = |other: &&&String| reach.get(**other).is_some_and(|back| back.contains(*node));
        let circle: BTreeSet<String> = reached.iter().filter(mutual).map(|other| (*other).clone()).collect();
        if circle.len() > 1 && !circles.contains(&circle) {
            circles.push(circle);
        }
    }
    circles
}

/// The shortest way round within a circle that takes an edge of this kind. The first node is the last again.
#[must_use]
pub fn way_round(graph: &Graph, circle: &BTreeSet<String>, takes: impl Fn(&str, &str) -> bool) -> Vec<String> {
    let ways = circle.iter().flat_map(|from| {
        let edges = graph.get(from).into_iter().flat_map(|targets| targets.keys());
        let edges = edges.filter(|to| circle.contains(*to) && takes(from, to));
        edges.filter_map(|to| Some([vec![from.clone()], way(graph, to, from)?].concat())).collect::<Vec<_>>()
    });
    ways.min_by_key(Vec::len).unwrap_or_default()
}

/// The shortest way between two nodes, both included.
fn way(graph: &Graph, from: &str, to: &str) -> Option<Vec<String>> {
    let mut queue = VecDeque::from([vec![from.to_owned()]]);
    let mut seen = BTreeSet::new();
    while let Some(way) = queue.pop_front() {
        let last = way.last()?;
        if last == to {
            return Some(way);
        }
        for next in graph.get(last).into_iter().flat_map(|targets| targets.keys()) {
            if seen.insert(next) {
                queue.push_back([way.as_slice(), std::slice::from_ref(next)].concat());
            }
        }
    }
    None
}

/// A circle as a finding: one way round, at the first place on it, and the other nodes in the circle.
pub(crate) fn finding(
    graph: &Graph,
    circle: &BTreeSet<String>,
    what: &str,
    takes: impl Fn(&str, &str) -> bool,
) -> Option<Finding> {
    let way = way_round(graph, circle, takes);
    let place = graph.get(way.first()?)?.get(way.get(1)?)?.clone();
    let others: Vec<&str> = circle.iter().filter(|node| !way.contains(node)).map(String::as_str).collect();
    let others = if others.is_empty() { String::new() } else { format!("; also in it: {}", others.join(", ")) };
    Some(Finding { place, what: format!("{what}: {}{others}", way.join(" -> ")) })
}

/// Circles of files that are wider than one folder, or large, unless the table lets them.
pub(crate) fn findings(reading: &Reading<'_>) -> Vec<Finding> {
    let graph = files(reading);
    let rules = &reading.table.circles;
    let mut used = BTreeSet::new();
    let mut findings = Vec::new();
    for circle in circles(&graph) {
        let homes: BTreeSet<String> = circle.iter().map(|file| home(reading, file)).collect();
        let within = |row: &&Wider| circle.iter().all(|file| is_under(file, row.within.get_ref()));
        if homes.len() == 1 && circle.len() <= rules.at_most {
            continue;
        } else if let Some(row) = rules.wider.iter().find(within) {
            used.insert(row.within.get_ref());
        } else if homes.len() == 1 {
            let what = format!("more than {} files depend on each other", rules.at_most);
            findings.extend(finding(&graph, &circle, &what, |_, _| true));
        } else {
            let what = "files of several folders depend on each other";
            let crosses = |from: &str, to: &str| home(reading, from) != home(reading, to);
            findings.extend(finding(&graph, &circle, what, crosses));
        }
    }
    for row in rules.wider.iter().filter(|row| !used.contains(row.within.get_ref())) {
        let what = format!("no circle within `{}` is that wide any more: remove this row", row.within.get_ref());
        findings.push(Finding { place: reading.table.place(&row.within), what });
    }
    findings
}

fn reachable<'a>(graph: &'a Graph, from: &str) -> BTreeSet<&'a String> {
    let mut reached = BTreeSet::new();
    let mut open: Vec<&String> = graph.get(from).into_iter().flat_map(|targets| targets.keys()).collect();
    while let Some(node) = open.pop() {
        if reached.insert(node) {
            open.extend(graph.get(node).into_iter().flat_map(|targets| targets.keys()));
        }
    }
    reached
}

/// Which file depends on which, followed to the file that defines what is named.
///
/// A test module and what it tests always name each other, so tests are left out. So are re-exports: the file that uses
/// one depends on the definition.
fn files(reading: &Reading<'_>) -> Graph {
    let mut graph = Graph::new();
    for resolved in &reading.mentions.0 {
        let mention = &resolved.mention;
        if mention.test || mention.kind == Kind::Reexport {
            continue;
        }
        for route in &resolved.routes {
            let target = match (&route.end, route.stops.last()) {
                (End::Item(file), _) => file.clone(),
                // `use super::*` needs what is used of it.
                (End::Unknown(_), Some(module)) => reading.modules.get(*module).file.clone(),
                _ => continue,
            };
            if *target != *mention.place.file && target.ends_with(".rs") {
                let targets = graph.entry(mention.place.file.to_string()).or_default();
                targets.entry(target.to_string()).or_insert_with(|| mention.place.clone());
            }
        }
    }
    graph
}

/// The innermost folder that a file belongs to: `a/b.rs` to `a/b` if that is a folder, as `a/b/mod.rs` would.
fn home(reading: &Reading<'_>, file: &str) -> String {
    let folder = file.strip_suffix(".rs").unwrap_or(file);
    let is_folder = !matches!(stem(file), "mod" | "lib" | "main")
        && reading.tree.rust().any(|(other, _)| other != file && is_under(other, folder));
    if is_folder { folder.to_owned() } else { parent(file).to_owned() }
}
