//! Tables of text.

use maud::{Markup, html};

/// A table of text. On a narrow page it scrolls on its own.
#[derive(Clone, Debug, Default)]
pub struct Table {
    caption: Option<String>,
    header: Vec<String>,
    numeric: Vec<usize>,
    rows: Vec<Vec<Cell>>,
}

/// One cell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cell {
    text: String,
    tone: Option<Tone>,
    code: bool,
}

/// How good a result is, shown as a colour. The text must say it, too, for readers who do not see colours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tone {
    /// Nothing is wrong.
    Good,
    /// It costs time and does no harm.
    Costly,
    /// It harms the guest.
    Bad,
}

impl Tone {
    pub(super) const fn class(self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::Costly => "costly",
            Self::Bad => "bad",
        }
    }
}

impl<T: Into<String>> From<T> for Cell {
    fn from(text: T) -> Self {
        Self { text: text.into(), tone: None, code: false }
    }
}

impl Cell {
    /// A verdict.
    #[must_use]
    pub fn verdict(tone: Tone, text: impl Into<String>) -> Self {
        Self { text: text.into(), tone: Some(tone), code: false }
    }

    /// Text of a program: an instruction, a command line.
    #[must_use]
    pub fn code(text: impl Into<String>) -> Self {
        Self { text: text.into(), tone: None, code: true }
    }
}

impl Table {
    /// An empty table.
    #[must_use]
    pub fn new<S: Into<String>>(header: impl IntoIterator<Item = S>) -> Self {
        Self { header: header.into_iter().map(Into::into).collect(), ..Self::default() }
    }

    /// Sets the caption above the table.
    #[must_use]
    pub fn caption(mut self, caption: impl Into<String>) -> Self {
        self.caption = Some(caption.into());
        self
    }

    /// Aligns these columns, counted from 0, at the right: they are numbers.
    #[must_use]
    pub fn numeric(mut self, columns: impl IntoIterator<Item = usize>) -> Self {
        self.numeric = columns.into_iter().collect();
        self
    }

    /// Adds a row.
    pub fn row<C: Into<Cell>>(&mut self, cells: impl IntoIterator<Item = C>) -> &mut Self {
        self.rows.push(cells.into_iter().map(Into::into).collect());
        self
    }

    pub(super) fn render(&self) -> Markup {
        let class = |column: usize| self.numeric.contains(&column).then_some("n");
        html! {
            div.scroll tabindex="0" role="region" aria-label=[self.caption.as_deref()] {
                table {
                    @if let Some(caption) = &self.caption { caption { (caption) } }
                    thead { tr { @for (column, name) in self.header.iter().enumerate() {
                        th scope="col" class=[class(column)] { (name) }
                    } } }
                    tbody { @for row in &self.rows { tr { @for (column, cell) in row.iter().enumerate() {
                        td class=[class(column)] { (cell.render()) }
                    } } } }
                }
            }
        }
    }
}

impl Cell {
    fn render(&self) -> Markup {
        html! {
            @match (self.tone, self.code) {
                (Some(tone), _) => span.tone.(tone.class()) { (self.text) },
                (None, true) => code { (self.text) },
                (None, false) => (self.text),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_text() {
        let mut table = Table::new(["<name>"]).caption("a & b");
        table.row([Cell::code("core::ops::Shl<u8>::shl</script><b>")]);
        let html = table.render().into_string();
        assert!(html.contains("&lt;name&gt;") && html.contains("a &amp; b"), "{html}");
        assert!(html.contains("Shl&lt;u8&gt;::shl&lt;/script&gt;&lt;b&gt;"), "{html}");
    }
}
