//! Reads the Rust of this repository and checks what may be named where.
//!
//! Four questions, answered by one table ([`table`], the file `layers.toml`) and one reading of the sources:
//!
//! - Which folder depends on which ([`rooms`])? Only where the table says so, and in no circle ([`circles`]).
//! - Which code names KVM, the operating system, host clocks, threads and `unsafe` ([`words`])? Only what is listed.
//! - Does a file contain a path of one developer's machine ([`machine_paths`])?
//! - Is a comment too wide (`widths.rs`)?
//!
//! It is no compiler: types are not inferred and macros are not expanded. A dependency is a *path* in the source: in an
//! import, an expression, a type, a pattern, an attribute or a macro's tokens. Each path is resolved through renames,
//! groups, globs and re-exports to the module that it names. A method call contains no path, so it is not counted.
//!
//! `cargo test -p layers` checks; `cargo run -p layers` prints which folder depends on which.

pub mod circles;
pub mod finding;
pub mod machine_paths;
mod modules;
mod packages;
pub mod picture;
mod read;
mod resolve;
pub mod rooms;
pub mod table;
mod tokens;
pub mod tree;
mod widths;
pub mod words;

#[cfg(test)]
mod tests;

use crate::finding::Finding;
use crate::modules::Modules;
use crate::resolve::Mentions;
use crate::table::Table;
use crate::tree::Tree;

/// A tree that was read once, for all that is asked about it.
pub struct Reading<'a> {
    tree: &'a Tree,
    table: &'a Table,
    modules: Modules,
    mentions: Mentions,
}

impl<'a> Reading<'a> {
    /// Reads every Rust file of `tree` and resolves the paths in it.
    #[must_use]
    pub fn new(tree: &'a Tree, table: &'a Table) -> Self {
        let modules = Modules::read(tree);
        let mentions = Mentions::resolve(&modules);
        Self { tree, table, modules, mentions }
    }

    /// Everything that is wrong, in the order of files and lines.
    #[must_use]
    pub fn findings(&self) -> Vec<Finding> {
        let mut findings = self.modules.unreadable.clone();
        findings.extend(rooms::findings(self));
        findings.extend(circles::findings(self));
        findings.extend(words::findings(self));
        findings.extend(machine_paths::findings(self));
        findings.extend(widths::findings(self));
        findings.sort();
        findings.dedup();
        findings
    }

    /// How many Rust files were read.
    #[must_use]
    pub fn files(&self) -> usize {
        self.tree.rust().count()
    }
}
