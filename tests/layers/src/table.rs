//! The rules, as `layers.toml` has them.

use std::collections::BTreeMap;

use serde::Deserialize;
use toml::Spanned;

use crate::finding::Place;

/// Where the table is, from the top of the tree.
pub const FILE: &str = "tests/layers/layers.toml";

/// The whole table.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Table {
    /// Folders, each with what lies directly in it and what that may depend on.
    pub rooms: BTreeMap<Spanned<String>, BTreeMap<Spanned<String>, Row>>,
    /// Which files may depend on each other in a circle.
    pub circles: Circles,
    /// Names that only some folders may use.
    #[serde(default)]
    pub word: Vec<Word>,
    /// The top-level folders with which a path of one developer's machine begins.
    pub machine_paths: MachinePaths,
    #[serde(skip)]
    text: String,
}

/// A file or folder of a room.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Row {
    /// What it may depend on; `["*"]` is everything.
    pub may: Vec<Spanned<String>>,
    /// What only its tests may depend on, besides.
    #[serde(default)]
    pub tests: Vec<Spanned<String>>,
    /// Why just these.
    pub why: String,
}

/// Which files may depend on each other in a circle.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Circles {
    /// How many files of one folder.
    pub at_most: usize,
    /// Where a circle may be wider than that.
    #[serde(default)]
    pub wider: Vec<Wider>,
}

/// Top-level folders of a machine.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachinePaths {
    /// Their names.
    pub folders: Vec<String>,
}

/// A folder in which files of several folders may be in a circle.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wider {
    /// The folder.
    pub within: Spanned<String>,
    /// Why.
    pub why: String,
}

/// Names and where they may stand.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Word {
    /// Paths as they are without renames: `std::thread` is all that begins so.
    #[serde(default)]
    pub paths: Vec<String>,
    /// Words of the language, and names of lints.
    #[serde(default)]
    pub words: Vec<String>,
    /// Files and folders that may.
    #[serde(default)]
    pub only_in: Vec<Spanned<String>>,
    /// Files and folders in which it is looked for.
    pub looked_for_in: Vec<Spanned<String>>,
    /// Whether code for tests may.
    #[serde(default)]
    pub tests_may: bool,
    /// Why no other file may.
    pub why: Spanned<String>,
}

impl Row {
    /// Whether this may depend on `target`.
    #[must_use]
    pub fn allows(&self, target: &str, in_tests: bool) -> bool {
        let named = |list: &[Spanned<String>]| list.iter().any(|name| name.get_ref() == target);
        self.is_free() || named(&self.may) || (in_tests && named(&self.tests))
    }

    /// Whether this may depend on everything.
    #[must_use]
    pub fn is_free(&self) -> bool {
        self.may.iter().any(|name| name.get_ref() == "*")
    }
}

impl Table {
    /// Reads a table.
    ///
    /// # Errors
    ///
    /// If it is no TOML, or has a key that is not known.
    pub fn parse(text: &str) -> Result<Self, toml::de::Error> {
        let table: Self = toml::from_str(text)?;
        Ok(Self { text: text.to_owned(), ..table })
    }

    /// Where something of the table stands.
    #[must_use]
    pub fn place<T>(&self, part: &Spanned<T>) -> Place {
        let before = self.text.get(..part.span().start).unwrap_or_default();
        let line_start = before.rfind('\n').map_or(0, |at| at + 1);
        Place { file: FILE.into(), line: before.matches('\n').count() + 1, column: before.len() - line_start + 1 }
    }
}
