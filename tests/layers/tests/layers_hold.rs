//! The rules of `layers.toml` hold in this checkout.

use std::path::Path;

use layers::Reading;
use layers::table::Table;
use layers::tree::Tree;

fn tree() -> Tree {
    Tree::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")).unwrap()
}

fn table() -> Table {
    Table::parse(include_str!("../layers.toml")).unwrap()
}

// Catches: a dependency or a name where the table does not allow it, a circle, a row that is no longer needed.
#[test]
fn layers_hold() {
    let (tree, table) = (tree(), table());
    let reading = Reading::new(&tree, &table);
    let findings: Vec<String> = reading.findings().iter().map(ToString::to_string).collect();
    assert!(reading.files() > 300, "only {} files were read", reading.files());
    assert!(findings.is_empty(), "{} findings:\n{}", findings.len(), findings.join("\n"));
}

// Catches: a row of the table that finds nothing, because its folder is misspelt or the reading of the sources misses
// it. Every row is broken once, in a file that is added to its folder.
#[test]
fn every_row_finds_its_violation() {
    let table = table();
    let (mut tree, mut wanted) = (tree(), Vec::new());
    for (room, rows) in &table.rooms {
        let room = room.get_ref();
        let inside = room.split_once("src").unwrap().1.replace('/', "::");
        for (name, row) in rows.iter().filter(|(_, row)| !row.is_free()) {
            let file = format!("{room}/{}/planted_import.rs", name.get_ref());
            let others = rows.keys().map(|other| other.get_ref()).filter(|other| *other != name.get_ref());
            let forbidden: Vec<&String> = others.filter(|other| !row.allows(other, false)).collect();
            let import = |other: &&String| match other.as_str() {
                // The room's own module.
                "mod" => format!("use crate{inside}::Planted;\n"),
                other => format!("use crate{inside}::{other}::Planted;\n"),
            };
            let code: String = forbidden.iter().map(import).collect();
            let says = |other| format!("`{}` may not depend on `{other}`: {}", name.get_ref(), row.why);
            wanted.extend(forbidden.iter().map(|other| (file.clone(), says(other))));
            tree = tree.with(&file, &code);
        }
    }
    for (number, row) in table.word.iter().enumerate() {
        let folders = row.looked_for_in.iter().map(|folder| folder.get_ref()).filter(|folder| !folder.ends_with(".rs"));
        for folder in folders {
            let file = format!("{folder}/planted_name_{number}.rs");
            let paths = row.paths.iter().map(|path| format!("use {path}::Planted;\n"));
            let words = row.words.iter().map(|word| format!("planted!({word});\n"));
            tree = tree.with(&file, &paths.chain(words).collect::<String>());
            let names = row.paths.iter().chain(&row.words);
            wanted.extend(names.map(|name| (file.clone(), format!("`{name}`: {}", row.why.get_ref()))));
        }
    }
    let found = Reading::new(&tree, &table).findings();
    let is_found = |(file, what): &&(String, String)| {
        found.iter().any(|finding| *finding.place.file == **file && finding.what.starts_with(what.as_str()))
    };
    let missed: Vec<_> = wanted.iter().filter(|want| !is_found(want)).collect();
    assert!(missed.is_empty(), "{} of {} are not found: {missed:#?}", missed.len(), wanted.len());
}
