//! Output of commands. It is built in memory and then written, so that a closed pipe is an error, not a panic.

use std::{
    fmt::{self, Display, Formatter},
    io::Write,
    ops::Range,
};

use comfy_table::{CellAlignment, LineStyle, Table, TableStyle};
use serde::Serialize;

use super::exit::{Error, OrFailed, Result};

/// Lines and tables.
#[derive(Default)]
pub struct Text(String);

impl From<String> for Text {
    fn from(lines: String) -> Self {
        Self(lines)
    }
}

impl Display for Text {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Text {
    /// Adds a line.
    pub fn line(&mut self, line: impl Display) {
        self.0.push_str(&line.to_string());
        self.0.push('\n');
    }

    /// Adds a table; the columns `right` are aligned at the right.
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
        Ok(Self(serde_json::to_string_pretty(value).map_err(Error::failed)? + "\n"))
    }

    /// Writes it to standard output.
    pub fn print(self) -> Result<()> {
        std::io::stdout().write_all(self.0.as_bytes()).or_failed(|| "cannot write to standard output")
    }
}

/// The most characters of one line of a message.
pub const LINE_CHARS: usize = 2000;

/// Makes `text` safe for a terminal: one line, without control characters, of at most `most` characters. A longer text
/// has an ellipsis in its middle, since messages quote files and guests at the beginning and end with the reason.
pub fn printable(text: &str, most: usize) -> String {
    let plain = |c: char| {
        // Bidirectional and zero-width characters can make a line look like another one.
        let invisible =
            matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}');
        match c {
            '\n' | '\t' => ' ',
            _ if c.is_control() || invisible => '\u{fffd}',
            _ => c,
        }
    };
    let count = text.chars().count();
    if count <= most {
        return text.chars().map(plain).collect();
    }
    let tail = most / 4;
    let head = most.saturating_sub(tail).saturating_sub(1);
    let ends = text.chars().take(head).chain(['…']).chain(text.chars().skip(count.saturating_sub(tail)));
    ends.map(plain).collect()
}

/// A table with no line but one under its header.
pub fn plain<const N: usize>(header: [&str; N]) -> Table {
    let mut table = Table::new();
    table.load_style(TableStyle::new().header_separator(LineStyle::none().fill('─').junction('─')));
    table.set_header(header);
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    // Catches: a message that moves the cursor, or that hides its reason behind 100 KB of a file.
    #[test]
    fn a_message_is_one_bounded_line_with_its_end() {
        assert_eq!(printable("plain – ü", 20), "plain – ü");
        assert_eq!(printable("a\nb\tc", 20), "a b c");
        assert_eq!(printable("\x1b[2Jgone\u{202e}x", 20), "\u{fffd}[2Jgone\u{fffd}x");
        let long = format!("field `{}`: the reason", "é".repeat(100_000));
        let cut = printable(&long, LINE_CHARS);
        assert_eq!(cut.chars().count(), LINE_CHARS);
        assert!(cut.starts_with("field `éé") && cut.contains("é…é") && cut.ends_with("é`: the reason"));
        assert_eq!(printable("abcdefgh", 4), "ab…h");
        assert_eq!(printable("abcd", 0).chars().count(), 1);
    }
}
