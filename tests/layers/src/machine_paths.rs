//! Absolute paths of one developer's machine, such as a home directory, in any text file.

use regex::Regex;

use crate::Reading;
use crate::finding::{Finding, Place};

/// Lines that contain such a path.
pub(crate) fn findings(reading: &Reading<'_>) -> Vec<Finding> {
    let folders = &reading.table.machine_paths.folders;
    if folders.is_empty() {
        return Vec::new();
    }
    // Not in the middle of another path or of an address.
    let pattern = format!(r"(^|[^[:word:].~-])(?<path>/({})/[[:word:].-])", folders.join("|"));
    let pattern = Regex::new(&pattern).expect("folder names are no regular expressions");
    let mut findings = Vec::new();
    for (file, text) in reading.tree.all() {
        for (number, line) in text.lines().enumerate() {
            if let Some(path) = pattern.captures(line).and_then(|found| found.name("path")) {
                let place = Place { file: file.into(), line: number + 1, column: path.start() + 1 };
                findings.push(Finding { place, what: "names a path of one machine".to_owned() });
            }
        }
    }
    findings
}
