//! Dependencies within a room: a folder of the table, in which each direct child (file or folder) has a row.

use std::collections::{BTreeMap, BTreeSet};

use crate::Reading;
use crate::circles::{self, Graph};
use crate::finding::{Finding, Place};
use crate::resolve::{End, Route};
use crate::table::{FILE, Row};
use crate::tree::{is_under, parent, stem};

/// A dependency within a room.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Arrow {
    /// The child that depends.
    pub from: String,
    /// The child that it depends on.
    pub to: String,
    /// Where that is written.
    pub place: Place,
    /// In code for tests only.
    pub test: bool,
}

/// All dependencies between what lies directly in the folder `room`.
#[must_use]
pub fn arrows(reading: &Reading<'_>, room: &str) -> BTreeSet<Arrow> {
    let mut arrows = BTreeSet::new();
    for resolved in reading.mentions.0.iter().filter(|resolved| !resolved.repeats_import) {
        let mention = &resolved.mention;
        let Some(from) = child(room, &mention.place.file) else { continue };
        for route in &resolved.routes {
            if let Some(to) = target(reading, room, &from, route) {
                let (place, test) = (mention.place.clone(), mention.test);
                arrows.insert(Arrow { from: from.clone(), to, place, test });
            }
        }
    }
    arrows
}

/// The arrows of a room outside tests, each with its first place.
#[must_use]
pub fn graph(arrows: &BTreeSet<Arrow>) -> Graph {
    let mut graph = Graph::new();
    for arrow in arrows.iter().filter(|arrow| !arrow.test) {
        let targets = graph.entry(arrow.from.clone()).or_default();
        targets.entry(arrow.to.clone()).or_insert_with(|| arrow.place.clone());
    }
    graph
}

/// What lies directly in a room: files by their stem, and folders with Rust files.
#[must_use]
pub fn children(reading: &Reading<'_>, room: &str) -> BTreeMap<String, String> {
    let mut children = BTreeMap::new();
    for (file, _) in reading.tree.rust() {
        if let Some(child) = child(room, file) {
            children.entry(child).or_insert_with(|| file.to_owned());
        }
    }
    children
}

/// Dependencies that the table does not allow, circles, and rows that are missing or say nothing.
pub(crate) fn findings(reading: &Reading<'_>) -> Vec<Finding> {
    let rooms = reading.table.rooms.iter();
    rooms
        .flat_map(|(room, rows)| {
            let rows = rows.iter().map(|(name, row)| (name.get_ref().as_str(), (reading.table.place(name), row)));
            let arrows = arrows(reading, room.get_ref());
            Room { reading, room: room.get_ref(), place: reading.table.place(room), rows: rows.collect(), arrows }
                .findings()
        })
        .collect()
}

struct Room<'a> {
    reading: &'a Reading<'a>,
    room: &'a str,
    place: Place,
    rows: BTreeMap<&'a str, (Place, &'a Row)>,
    arrows: BTreeSet<Arrow>,
}

impl Room<'_> {
    fn findings(&self) -> Vec<Finding> {
        let graph = graph(&self.arrows);
        let mut findings = self.not_allowed();
        findings.extend(self.missing_rows());
        findings.extend(self.empty_rows());
        let what = format!("folders of `{}` depend on each other", self.room);
        let circles = circles::circles(&graph);
        findings.extend(circles.iter().filter_map(|circle| circles::finding(&graph, circle, &what, |_, _| true)));
        findings
    }

    /// One finding for a file and what it may not depend on: the first place.
    fn not_allowed(&self) -> Vec<Finding> {
        let mut first: BTreeMap<(&str, &str), &Arrow> = BTreeMap::new();
        for arrow in &self.arrows {
            let allowed = self.rows.get(arrow.from.as_str()).is_none_or(|(_, row)| row.allows(&arrow.to, arrow.test));
            if !allowed {
                let known = first.entry((&arrow.place.file, &arrow.to)).or_insert(arrow);
                if arrow.place < known.place {
                    *known = arrow;
                }
            }
        }
        let finding = |arrow: &Arrow| {
            let (row, why) = match self.rows.get(arrow.from.as_str()) {
                Some((place, row)) => (place.line, row.why.as_str()),
                None => (self.place.line, ""),
            };
            let what = format!("`{}` may not depend on `{}`: {why}; see {FILE}:{row}", arrow.from, arrow.to);
            Finding { place: arrow.place.clone(), what }
        };
        first.into_values().map(finding).collect()
    }

    fn missing_rows(&self) -> Vec<Finding> {
        let children = children(self.reading, self.room).into_iter();
        let missing = children.filter(|(child, _)| !self.rows.contains_key(child.as_str()));
        let finding = |(child, file): (String, String)| {
            let what = format!("`{child}` has no row under `{}` in {FILE}:{}", self.room, self.place.line);
            Finding { place: Place { file: file.into(), line: 1, column: 1 }, what }
        };
        missing.map(finding).collect()
    }

    /// Rows of what is not there, and allowed dependencies that do not exist.
    fn empty_rows(&self) -> Vec<Finding> {
        let children = children(self.reading, self.room);
        let mut findings = Vec::new();
        for (name, (place, row)) in &self.rows {
            let used = |to: &str, test| {
                self.arrows.iter().any(|arrow| arrow.from == *name && arrow.to == to && arrow.test == test)
            };
            if !children.contains_key(*name) {
                let what = format!("`{}` has no file or folder `{name}`", self.room);
                findings.push(Finding { place: place.clone(), what });
                continue;
            }
            for target in row.may.iter().filter(|target| target.get_ref() != "*") {
                let to = target.get_ref();
                let what = match (used(to, false), used(to, true)) {
                    (true, _) => continue,
                    (false, true) => format!("only tests of `{name}` depend on `{to}`: it belongs into `tests`"),
                    (false, false) => format!("`{name}` may depend on `{to}` and does not any more: remove it"),
                };
                findings.push(Finding { place: self.reading.table.place(target), what });
            }
            for target in &row.tests {
                let to = target.get_ref();
                if !used(to, true) || used(to, false) && row.allows(to, false) {
                    let what = format!("tests of `{name}` need not be allowed to depend on `{to}`: remove it");
                    findings.push(Finding { place: self.reading.table.place(target), what });
                }
            }
        }
        findings
    }
}

/// What a file belongs to in a room: the file or folder that lies directly in it.
fn child(room: &str, file: &str) -> Option<String> {
    if file == format!("{room}.rs") {
        return Some("mod".to_owned());
    }
    let inside = file.strip_prefix(room)?.strip_prefix('/')?;
    let first = inside.split('/').next()?;
    Some(first.strip_suffix(".rs").unwrap_or(first).to_owned())
}

/// Whether a file is the room's own module: what it re-exports is not its own.
fn is_facade(room: &str, file: &str) -> bool {
    file == format!("{room}.rs") || parent(file) == room && matches!(stem(file), "mod" | "lib" | "main")
}

/// The first of the room's children, besides `from`, that a path leads into. A re-export of the room's own module is
/// followed to the child that it comes from.
fn target(reading: &Reading<'_>, room: &str, from: &str, route: &Route) -> Option<String> {
    let files = route.stops.iter().map(|stop| &reading.modules.get(*stop).file);
    let entered = files.filter(|file| is_under(file, room) && ***file != *room && !is_facade(room, file));
    let entered = entered.filter_map(|file| child(room, file)).find(|child| child != from);
    if entered.is_some() {
        return entered;
    }
    let last = reading.modules.get(*route.stops.last()?);
    let own = |file: &str| is_facade(room, file) || file == room;
    let to = match &route.end {
        End::Item(file) if is_facade(room, file) => child(room, file)?,
        // A module that is not there (in a test), or what a macro makes.
        End::Unknown(name) if own(&last.file) => {
            let rows = reading.table.rooms.iter().find(|(other, _)| other.get_ref() == room)?.1;
            let row = rows.keys().find(|row| row.get_ref() == name);
            row.map_or_else(|| child(room, &last.file), |row| Some(row.get_ref().clone()))?
        }
        _ => return None,
    };
    (to != from).then_some(to)
}
