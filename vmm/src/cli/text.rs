//! What commands print, made whole and then written: a closed pipe is an error, not a panic.

use std::{fmt::Display, io::Write, ops::Range};

use anyhow::{Context, Result};
use comfy_table::{CellAlignment, LineStyle, Table, TableStyle};
use serde::Serialize;

/// Lines and tables.
#[derive(Default)]
pub struct Text(String);

impl From<String> for Text {
    fn from(lines: String) -> Self {
        Self(lines)
    }
}

impl Text {
    /// One more line.
    pub fn line(&mut self, line: impl Display) {
        self.0.push_str(&line.to_string());
        self.0.push('\n');
    }

    /// One more table; the columns `right` end at the right.
    pub fn table(&mut self, mut table: Table, right: Range<usize>) {
        for index in right {
            if let Some(column) = table.column_mut(index) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        for line in table.to_string().lines() {
            self.line(line.trim_end());
        }
    }

    /// `value` as JSON, indented.
    pub fn json(value: &impl Serialize) -> Result<Self> {
        Ok(Self(serde_json::to_string_pretty(value)? + "\n"))
    }

    /// Writes it to standard output.
    pub fn print(self) -> Result<()> {
        std::io::stdout().write_all(self.0.as_bytes()).context("cannot write to standard output")
    }
}

/// A table without lines but one under its header.
pub fn plain<const N: usize>(header: [&str; N]) -> Table {
    let mut table = Table::new();
    table.load_style(TableStyle::new().header_separator(LineStyle::none().fill('─').junction('─')));
    table.set_header(header);
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table
}
