//! Comment lines that are too wide. rustfmt wraps code and leaves comments as they are.

use crate::Reading;
use crate::finding::{Finding, Place};

/// The last column, as in rustfmt.toml.
const LAST_COLUMN: usize = 120;

/// Lines of the Rust files that are wholly a comment and end behind [`LAST_COLUMN`].
pub(crate) fn findings(reading: &Reading<'_>) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (file, text) in reading.tree.rust() {
        for (number, line) in text.lines().enumerate() {
            if line.trim_start().starts_with("//") && line.chars().count() > LAST_COLUMN {
                let place = Place { file: file.into(), line: number + 1, column: LAST_COLUMN + 1 };
                let what = format!("a comment ends at column {LAST_COLUMN}: wrap it");
                findings.push(Finding { place, what });
            }
        }
    }
    findings
}
