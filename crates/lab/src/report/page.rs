//! The page: the command, the result and the inputs at the top, then sections.

use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::{Chart, Heat, Table, table::Tone, units};

const STYLE: &str = concat!(include_str!("vendor/uplot/uPlot.min.css"), include_str!("assets/report.css"));
/// uPlot with its licence, which requires that every copy carries it.
const UPLOT: &str =
    concat!("/*\n", include_str!("vendor/uplot/LICENSE"), "\n*/\n", include_str!("vendor/uplot/uPlot.iife.min.js"));
const SCRIPT: &str = concat!(
    include_str!("assets/units.js"),
    include_str!("assets/chart.js"),
    include_str!("assets/heat.js"),
    include_str!("assets/main.js")
);
/// Content security policy: the page may load nothing.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'";

/// A report.
#[derive(Clone, Debug)]
pub struct Page {
    title: String,
    command: String,
    found: Found,
    facts: Vec<(String, String)>,
    sections: Vec<Section>,
}

/// The result, in a sentence.
#[derive(Clone, Debug)]
pub struct Found {
    /// How good it is.
    pub tone: Tone,
    /// One or two words: `passed`.
    pub word: String,
    /// The sentence.
    pub text: String,
}

/// A part of a page, with a heading.
#[derive(Clone, Debug)]
pub struct Section {
    title: String,
    blocks: Vec<Block>,
}

#[derive(Clone, Debug)]
enum Block {
    Text(String),
    Note(String),
    Command(String),
    Table(Table),
    Charts(Vec<Chart>),
    Heat(Box<Heat>),
}

impl Page {
    /// A page without sections. `command` is the command that makes it again.
    #[must_use]
    pub fn new(title: impl Into<String>, command: impl Into<String>, found: Found) -> Self {
        Self { title: title.into(), command: command.into(), found, facts: Vec::new(), sections: Vec::new() }
    }

    /// Adds an input or a fact, under the result.
    #[must_use]
    pub fn fact(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.facts.push((name.into(), value.into()));
        self
    }

    /// Adds a section.
    #[must_use]
    pub fn section(mut self, section: Section) -> Self {
        self.sections.push(section);
        self
    }

    /// Renders the HTML.
    #[must_use]
    pub fn render(&self) -> String {
        let Self { title, command, found, facts, sections } = self;
        let page = html! {
            (DOCTYPE)
            html lang="en" {
                head {
                    meta charset="utf-8";
                    meta http-equiv="Content-Security-Policy" content=(POLICY);
                    meta name="viewport" content="width=device-width, initial-scale=1";
                    meta name="color-scheme" content="light dark";
                    title { (title) }
                    style { (PreEscaped(STYLE)) }
                }
                body {
                    header {
                        h1 { (title) }
                        p.found { span.tone.(found.tone.class()) { (found.word) } " " (found.text) }
                        pre.command tabindex="0" { (command) }
                        @if !facts.is_empty() {
                            dl { @for (name, value) in facts { div { dt { (name) } dd { (value) } } } }
                        }
                    }
                    @if sections.len() > 2 {
                        nav aria-label="sections" { ol { @for (number, section) in sections.iter().enumerate() {
                            li { a href={"#s" (number)} { (section.title) } }
                        } } }
                    }
                    main { @for (number, section) in sections.iter().enumerate() {
                        section id={"s" (number)} { (section.render()) }
                    } }
                    noscript { p.note { "Charts and heat maps are drawn by a script in this page; it is turned off." } }
                    footer { "vmm " (env!("CARGO_PKG_VERSION")) " · charts by uPlot (MIT)" }
                    script { (PreEscaped(UPLOT)) }
                    script { (PreEscaped(SCRIPT)) }
                }
            }
        };
        page.into_string()
    }
}

impl Section {
    /// An empty section.
    #[must_use]
    pub fn new(title: impl Into<String>) -> Self {
        Self { title: title.into(), blocks: Vec::new() }
    }

    /// Adds a paragraph.
    #[must_use]
    pub fn text(self, text: impl Into<String>) -> Self {
        self.block(Block::Text(text.into()))
    }

    /// Adds a remark, in small print.
    #[must_use]
    pub fn note(self, text: impl Into<String>) -> Self {
        self.block(Block::Note(text.into()))
    }

    /// Adds a command for the reader to type.
    #[must_use]
    pub fn command(self, command: impl Into<String>) -> Self {
        self.block(Block::Command(command.into()))
    }

    /// Adds a table.
    #[must_use]
    pub fn table(self, table: Table) -> Self {
        self.block(Block::Table(table))
    }

    /// Adds charts beside each other, with one legend and one y axis.
    #[must_use]
    pub fn charts(self, charts: Vec<Chart>) -> Self {
        self.block(Block::Charts(charts))
    }

    /// Adds a heat map.
    #[must_use]
    pub fn heat(self, heat: Heat) -> Self {
        self.block(Block::Heat(Box::new(heat)))
    }

    fn block(mut self, block: Block) -> Self {
        self.blocks.push(block);
        self
    }

    fn render(&self) -> Markup {
        html! {
            h2 { (self.title) }
            @for block in &self.blocks { (block.render()) }
        }
    }
}

impl Block {
    fn render(&self) -> Markup {
        html! {
            @match self {
                Self::Text(text) => p { (text) },
                Self::Note(text) => p.note { (text) },
                Self::Command(command) => pre.command tabindex="0" { (command) },
                Self::Table(table) => (table.render()),
                Self::Charts(charts) => {
                    ul.legend aria-hidden="true" { @for (name, class) in Chart::legend(charts) {
                        li { canvas.key data-look=(class) {} " " (name) }
                    } }
                    div.charts.{"of-" (columns(charts.len()))} { @for chart in charts { (chart.render()) } }
                },
                Self::Heat(heat) => (heat.render()),
            }
        }
    }
}

/// Number of charts in a row, where there is room, chosen so that no chart is alone in the last row of up to six.
const fn columns(charts: usize) -> usize {
    match charts {
        0 | 1 => 1,
        2 | 4 => 2,
        _ => 3,
    }
}

/// The beginning of a sentence about how many were bad: `3 of 10 migrations`.
#[must_use]
pub(super) fn of(bad: u64, all: u64, what: &str) -> String {
    format!("{} of {}", units::grouped(bad), units::count(all, what))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::chart::{Axis, Look};

    #[test]
    fn vendored_text_does_not_end_its_element() {
        for script in [UPLOT, SCRIPT] {
            assert!(!script.contains("</script") && !script.contains("<!--"));
        }
        assert!(!STYLE.contains("</style"));
    }

    #[test]
    fn names_from_outside_stay_text() {
        let evil = "a</script><b>&";
        let found = Found { tone: Tone::Bad, word: "failed".to_owned(), text: evil.to_owned() };
        let chart = Chart::new(evil, Axis::VmTime).series(evil, Look::Guest, vec![(1, 2)]).mark(3, evil);
        let section = Section::new(evil).text(evil).note(evil).command(evil).charts(vec![chart]);
        let html = Page::new(evil, evil, found).fact(evil, evil).section(section).render();
        assert!(!html.contains("<b>"), "markup from data");
        // Three pieces of script: the data, the library, ours.
        assert_eq!(html.matches("</script>").count(), 3);
    }

    #[test]
    fn the_page_refers_to_nothing_outside() {
        let found = Found { tone: Tone::Good, word: "passed".to_owned(), text: String::new() };
        let html = Page::new("t", "c", found).section(Section::new("s")).render();
        for (at, _) in html.match_indices("http") {
            let around = html.get(at..at + 30).unwrap_or_default();
            assert!(around.starts_with("http-equiv") || around.contains("github.com/leeoniya"), "{around}");
        }
        assert!(!html.contains(" src=") && !html.contains("@import") && !html.contains("url("));
    }
}
