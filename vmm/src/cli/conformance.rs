//! `vmm doctor --compare`: reports of several hosts side by side, as a Markdown table.

use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

use machine::doctor::conformance::{SCHEMA, Verdict};
use serde::Deserialize;

use super::{
    exit::{Error, Result},
    text::{LINE_CHARS, Text, printable},
};

/// Far more than a report has.
const MOST_BYTES: u64 = 1 << 20;
const MOST_ANSWERS: usize = 1000;

/// What the table shows of a report.
#[derive(Deserialize)]
struct Report {
    schema: String,
    kernel: String,
    kvm_modules: Vec<String>,
    answers: Vec<Answer>,
}

#[derive(Deserialize)]
struct Answer {
    id: String,
    measured: String,
    verdict: Verdict,
}

/// The table: a row for each check of the first report, then for those that only others have; a column for each file.
pub fn compare(files: &[PathBuf]) -> Result<Text> {
    let reports = files.iter().map(|file| read(file)).collect::<Result<Vec<Report>>>()?;
    let mut checks: Vec<&str> = Vec::new();
    for answer in reports.iter().flat_map(|report| &report.answers) {
        if !checks.contains(&answer.id.as_str()) {
            checks.push(&answer.id);
        }
    }
    let mut out = Text::default();
    let mut row = |first: &str, cells: Vec<String>| out.line(format!("| {first} | {} |", cells.join(" | ")));
    row("check", reports.iter().map(Report::name).collect());
    row("---", vec!["---".to_owned(); reports.len()]);
    for check in checks {
        row(&cell(check), reports.iter().map(|report| report.cell(check)).collect());
    }
    Ok(out)
}

fn read(file: &Path) -> Result<Report> {
    let name = || file.display().to_string();
    let mut bytes = Vec::new();
    // A FIFO would block.
    if std::fs::metadata(file).is_ok_and(|metadata| !metadata.is_file()) {
        return Err(Error::usage(format!("{} is not a file", name())));
    }
    let read = File::open(file).and_then(|opened| opened.take(MOST_BYTES).read_to_end(&mut bytes));
    read.map_err(|error| Error::usage(format!("cannot read {}: {error}", name())))?;
    let report: Report = serde_json::from_slice(&bytes).map_err(|error| {
        Error::usage(format!("{} is not a report of `vmm doctor --conformance --json`: {error}", name()))
    })?;
    if report.schema != SCHEMA {
        let found = printable(&report.schema, LINE_CHARS);
        return Err(Error::usage(format!("{} has the layout {found}; only {SCHEMA} is known", name())));
    }
    if report.answers.len() > MOST_ANSWERS {
        return Err(Error::usage(format!(
            "{} has {} answers; {MOST_ANSWERS} are the most",
            name(),
            report.answers.len()
        )));
    }
    Ok(report)
}

impl Report {
    /// The vendor's module and the kernel.
    fn name(&self) -> String {
        let vendor = self.kvm_modules.iter().find(|module| *module != "kvm");
        cell(&format!("{} {}", vendor.map_or("kvm", String::as_str), self.kernel))
    }

    fn cell(&self, check: &str) -> String {
        let Some(answer) = self.answers.iter().find(|answer| answer.id == check) else { return "–".to_owned() };
        match answer.verdict {
            Verdict::Conforms => "conforms".to_owned(),
            Verdict::NotOffered => "not offered".to_owned(),
            Verdict::Differs => cell(&format!("**differs**: {}", answer.measured)),
            Verdict::Noted => cell(&answer.measured),
            Verdict::Failed => "failed".to_owned(),
        }
    }
}

/// Text from a file as a table's cell.
fn cell(text: &str) -> String {
    printable(text, LINE_CHARS).replace('\\', "\\\\").replace('|', "\\|").replace('<', "&lt;")
}
