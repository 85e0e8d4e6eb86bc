//! The dependencies of each room, as a text table.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use crate::Reading;
use crate::circles::Graph;
use crate::rooms;

/// One table for each room. A line has a level, a child, and the children that it depends on. The level is the length
/// of the longest chain of dependencies below, so each line names only lines further down.
#[must_use]
pub fn picture(reading: &Reading<'_>) -> String {
    let tables = reading.table.rooms.keys().map(|room| table(reading, room.get_ref()));
    tables.collect::<Vec<String>>().join("\n")
}

fn table(reading: &Reading<'_>, room: &str) -> String {
    let graph = rooms::graph(&rooms::arrows(reading, room));
    let children: Vec<String> = rooms::children(reading, room).into_keys().collect();
    let levels: BTreeMap<&String, usize> =
        children.iter().map(|child| (child, level(&graph, child, &mut BTreeSet::new()))).collect();
    let width = children.iter().map(String::len).max().unwrap_or_default();
    let mut lines: Vec<&String> = children.iter().collect();
    lines.sort_by_key(|child| (std::cmp::Reverse(levels[*child]), *child));
    let mut text = format!("{room}\n");
    for child in lines {
        let mut targets: Vec<&String> = graph.get(child).into_iter().flat_map(|targets| targets.keys()).collect();
        targets.sort_by_key(|target| (std::cmp::Reverse(levels.get(target)), *target));
        let targets: Vec<&str> = targets.into_iter().map(String::as_str).collect();
        let targets = if targets.is_empty() { "-".to_owned() } else { targets.join(" ") };
        let _ = writeln!(text, "  {} {child:width$}  {targets}", levels[child]);
    }
    text
}

/// The longest way down from here. In a circle, the way ends where it would begin again.
fn level(graph: &Graph, child: &String, above: &mut BTreeSet<String>) -> usize {
    if !above.insert(child.clone()) {
        return 0;
    }
    let targets = graph.get(child).into_iter().flat_map(|targets| targets.keys());
    let level = targets.map(|target| level(graph, target, above) + 1).max().unwrap_or_default();
    above.remove(child);
    level
}
