//! Names that only some folders may use: KVM, the operating system, host clocks, threads, `unsafe`.

use std::collections::{BTreeMap, BTreeSet};

use crate::Reading;
use crate::finding::{Finding, Place};
use crate::table::{FILE, Word};
use crate::tree::is_under;

/// Names where they may not stand, and rows of the table that say nothing.
pub(crate) fn findings(reading: &Reading<'_>) -> Vec<Finding> {
    reading.table.word.iter().flat_map(|row| Check { reading, row }.findings()).collect()
}

struct Check<'a> {
    reading: &'a Reading<'a>,
    row: &'a Word,
}

impl Check<'_> {
    fn findings(&self) -> Vec<Finding> {
        // One finding for a name in a file: the first place. An import and ten uses of it are one thing to mend.
        let mut first: BTreeMap<(String, String), Place> = BTreeMap::new();
        let mut used: BTreeSet<&str> = BTreeSet::new();
        for (name, place, test) in self.uses() {
            if !self.row.looked_for_in.iter().any(|folder| is_under(&place.file, folder.get_ref())) {
                continue;
            }
            let allowed = self.row.only_in.iter().find(|folder| is_under(&place.file, folder.get_ref()));
            if let Some(folder) = allowed {
                used.insert(folder.get_ref());
            } else if !(test && self.row.tests_may) {
                let key = (place.file.to_string(), name);
                let known = first.entry(key).or_insert_with(|| place.clone());
                if place < *known {
                    *known = place;
                }
            }
        }
        let row = self.reading.table.place(&self.row.why);
        let why = self.row.why.get_ref();
        let named = first.into_iter().map(|((_, name), place)| {
            let what = format!("`{name}`: {why}; see {FILE}:{}", row.line);
            Finding { place, what }
        });
        named.chain(self.empty_rows(&used)).collect()
    }

    /// What is named, where, and whether in code for tests.
    fn uses(&self) -> Vec<(String, Place, bool)> {
        let mut uses = Vec::new();
        for word in &self.reading.modules.words {
            if self.row.words.contains(&word.word) {
                uses.push((word.word.clone(), word.place.clone(), word.test));
            }
        }
        let paths: Vec<Vec<&str>> = self.row.paths.iter().map(|path| path.split("::").collect()).collect();
        for resolved in self.reading.mentions.0.iter().filter(|resolved| !resolved.repeats_import) {
            for route in &resolved.routes {
                let begins = |path: &&Vec<&str>| {
                    path.len() <= route.name.len() && path.iter().zip(&route.name).all(|(want, name)| want == name)
                };
                if let Some(path) = paths.iter().find(begins) {
                    let mention = &resolved.mention;
                    uses.push((path.join("::"), mention.place.clone(), mention.test));
                }
            }
        }
        uses
    }

    /// Folders of the row that are not there, or that no longer use what they may.
    fn empty_rows(&self, used: &BTreeSet<&str>) -> Vec<Finding> {
        let mut findings = Vec::new();
        let names = [self.row.words.as_slice(), self.row.paths.as_slice()].concat().join("`, `");
        for folder in &self.row.looked_for_in {
            if !self.reading.tree.rust().any(|(file, _)| is_under(file, folder.get_ref())) {
                let what = format!("`{}` has no Rust file in which to look for `{names}`", folder.get_ref());
                findings.push(Finding { place: self.reading.table.place(folder), what });
            }
        }
        for folder in self.row.only_in.iter().filter(|folder| !used.contains(folder.get_ref().as_str())) {
            let what = format!("`{}` may use `{names}` and does not any more: remove it", folder.get_ref());
            findings.push(Finding { place: self.reading.table.place(folder), what });
        }
        findings
    }
}
