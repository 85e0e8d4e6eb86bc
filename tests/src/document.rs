//! The examples in documents: console blocks, and whether what they show is what was printed.
//!
//! A block of a Markdown page is an example if a line of it begins with `$ `. An HTML comment right before a block,
//! which is not shown to readers of the page, says how the block is run:
//!
//! | comment | meaning |
//! |---|---|
//! | `not run: WHY` | it cannot be run in a test |
//! | `before: COMMANDS` | run these first: what the text around takes for granted |
//! | `exit: N` | its commands may end with this code besides 0 |
//! | `host: no TSC scaling` | it shows a host whose KVM does not scale a TSC, and is run on such hosts only |
//! | `goes on` | its last command does not end: it is ended when it has printed what is shown |
//! | `file: NAME` | no example: the content of a file that later ones use |
//!
//! What is shown may leave lines out, and `…` stands for anything. Numbers that differ from run to run or from host to
//! host are compared as numbers only.

use std::sync::OnceLock;

use regex::Regex;

/// A block that is run, or a file that later ones use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Block {
    /// Number of its first line.
    pub line: usize,
    /// Commands, each with the lines that it is shown to print.
    pub commands: Vec<(String, Vec<String>)>,
    /// Why it cannot be run.
    pub not_run: Option<String>,
    /// It is run only where KVM does not scale a guest's TSC.
    pub without_scaling: bool,
    /// Commands to run first.
    pub before: Vec<String>,
    /// Exit codes that a command may have besides 0.
    pub exit: Vec<i32>,
    /// The last command does not end by itself: the test ends it.
    pub goes_on: bool,
    /// No example, but a file with this name and the block's content.
    pub file: Option<(String, String)>,
}

/// The blocks of a page that are of interest here.
#[must_use]
pub fn blocks(page: &str) -> Vec<Block> {
    let mut blocks = Vec::new();
    let mut marks = Block::default();
    let mut lines = page.lines().enumerate();
    while let Some((number, line)) = lines.next() {
        if let Some(mark) = line.strip_prefix("<!-- ").and_then(|line| line.strip_suffix(" -->")) {
            read_mark(&mut marks, mark);
        } else if line.starts_with("```") {
            let content: Vec<&str> =
                lines.by_ref().map(|(_, line)| line).take_while(|line| !line.starts_with("```")).collect();
            let mut block = Block { line: number + 1, ..std::mem::take(&mut marks) };
            if let Some((_, file)) = &mut block.file {
                *file = content.iter().map(|line| format!("{line}\n")).collect();
                blocks.push(block);
            } else if content.iter().any(|line| line.starts_with("$ ")) {
                block.commands = commands(&content);
                blocks.push(block);
            }
        } else if !line.is_empty() {
            marks = Block::default();
        }
    }
    blocks
}

fn read_mark(marks: &mut Block, mark: &str) {
    match mark.split_once(": ") {
        Some(("not run", why)) => marks.not_run = Some(why.to_owned()),
        Some(("before", commands)) => marks.before.push(commands.to_owned()),
        Some(("exit", code)) => marks.exit.push(code.parse().expect("an exit code")),
        Some(("host", host)) => {
            assert_eq!(host, "no TSC scaling", "a kind of host");
            marks.without_scaling = true;
        }
        Some(("file", name)) => marks.file = Some((name.to_owned(), String::new())),
        None if mark == "goes on" => marks.goes_on = true,
        // A comment that is not about examples.
        _ => {}
    }
}

fn commands(lines: &[&str]) -> Vec<(String, Vec<String>)> {
    let mut commands: Vec<(String, Vec<String>)> = Vec::new();
    let mut goes_on = false;
    for line in lines {
        match (line.strip_prefix("$ "), commands.last_mut()) {
            (Some(command), _) => {
                commands.push((command.to_owned(), Vec::new()));
                goes_on = line.ends_with('\\');
            }
            (None, Some((command, _))) if goes_on => {
                command.push('\n');
                command.push_str(line);
                goes_on = line.ends_with('\\');
            }
            (None, Some((_, shown))) => shown.push((*line).to_owned()),
            (None, None) => {}
        }
    }
    commands
}

/// Whether what `command` prints is a function of the command: then all of it is compared.
#[must_use]
pub fn repeats(command: &str) -> bool {
    let in_virtual_time = command.contains("--time virtual") && command.contains("--tsc-khz");
    let by_itself = ["vmm --guest", "vmm restore", "vmm ctl", "curl ", "vmm snapshot", "vmm doctor", "vmm clock"];
    in_virtual_time || !by_itself.iter().any(|what| command.contains(what))
}

/// The first line that is shown and was not printed, if there is one. Each of the two streams has its own order.
#[must_use]
pub fn not_printed<'a>(shown: &'a [String], streams: [&str; 2], repeats: bool) -> Option<&'a str> {
    let mut left = streams.map(str::lines);
    shown.iter().map(String::as_str).filter(|line| !line.is_empty() && *line != "…").find(|line| {
        let printed = left.iter_mut().any(|lines| {
            let mut ahead = lines.clone();
            let found = ahead.any(|printed| is_shown_as(printed, line, repeats));
            if found {
                *lines = ahead;
            }
            found
        });
        !printed
    })
}

fn is_shown_as(printed: &str, shown: &str, repeats: bool) -> bool {
    let (printed, shown) = (level(printed, repeats), level(shown, repeats));
    let mut parts = shown.split('…');
    let Some(mut rest) = parts.next().and_then(|first| printed.strip_prefix(first)) else { return false };
    let mut last = None;
    for part in parts {
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
        last = Some(part);
    }
    // A line that ends in `…` may go on.
    rest.is_empty() || last == Some("")
}

/// `line` without what is the host's, the build's or, unless it repeats, the run's.
fn level(line: &str, repeats: bool) -> String {
    /// Patterns, and what stands for what they match.
    static HOST: OnceLock<Vec<(Regex, &str)>> = OnceLock::new();
    static RUN: OnceLock<Vec<(Regex, &str)>> = OnceLock::new();
    let compile = |rules: &[(&str, &'static str)]| {
        rules.iter().map(|(pattern, to)| (Regex::new(pattern).expect("a pattern"), *to)).collect::<Vec<_>>()
    };
    let host = HOST.get_or_init(|| {
        compile(&[
            ("host [0-9]+ kHz", "host N kHz"),
            ("host's has [0-9]+ kHz", "host's has N kHz"),
            ("0x[0-9a-f]+", "X"),
            ("\"rip\":[0-9]+", "\"rip\":N"),
            ("\\.rs:[0-9]+", ".rs:N"),
            ("; it swallows the TSC deadline, so the guest's deadline sites are patched", ""),
            ("\"costs\":\\{[^}]*\\}", "\"costs\":{}"),
        ])
    });
    let run = RUN.get_or_init(|| {
        compile(&[
            ("([0-9]+(\\.[0-9]+)?(ms|us|ns|µs|h|m|s) ?)+", "T"),
            // Milliseconds in a column.
            (" *-?[0-9]+\\.[0-9]{6}(?-u:\\b)", " N"),
            ("[0-9]{5,}(\\.[0-9]+)?", "N"),
            ("worst late [0-9]+ ns", "worst late N ns"),
            ("[0-9]+ (early wakes|woken early)", "N $1"),
            ("\"ticks\": ?[0-9]+", "\"ticks\": N"),
            ("[0-9]+ bytes", "N bytes"),
        ])
    });
    let mut line = line.trim_end().to_owned();
    for (pattern, to) in host.iter().chain(run.iter().filter(|_| !repeats)) {
        line = pattern.replace_all(&line, *to).into_owned();
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_found_with_their_marks() {
        let page = "text\n\n<!-- before: touch a -->\n<!-- exit: 1 -->\n```console\n$ ls \\\n    a\na\n$ false\n```\n\n\
                    <!-- not run: why -->\n\ntext\n<!-- host: no TSC scaling -->\n```\n$ x\n```\n```\nno example\n```\n<!-- file: f -->\n```asm\ncode\n```\n";
        let [first, second, file] = &blocks(page)[..] else { panic!() };
        assert_eq!(first.commands, [("ls \\\n    a".to_owned(), vec!["a".to_owned()]), ("false".to_owned(), vec![])]);
        assert_eq!((first.line, &first.exit[..], &first.before[..]), (5, &[1][..], &["touch a".to_owned()][..]));
        // A mark is for the block right after it.
        assert_eq!((&second.not_run, second.without_scaling, second.line), (&None, true, 16));
        assert!(!first.without_scaling);
        assert_eq!(file.file, Some(("f".to_owned(), "code\n".to_owned())));
    }

    #[test]
    fn what_is_shown_must_have_been_printed_in_order() {
        let missing = |shown: &[&str], repeats| {
            let shown: Vec<String> = shown.iter().map(|line| (*line).to_owned()).collect();
            not_printed(&shown, ["a 1ms\nb 123456\nc\n", "vmm: x\n"], repeats).map(str::to_owned)
        };
        assert_eq!(missing(&["a 1ms", "vmm: x", "c"], true), None);
        assert_eq!(missing(&["c", "a 1ms"], true), Some("a 1ms".to_owned()));
        assert_eq!(missing(&["a 2ms"], true), Some("a 2ms".to_owned()));
        assert_eq!(missing(&["a 2ms", "b 99999", "…", "c"], false), None);
        assert_eq!(missing(&["b 9999"], false), Some("b 9999".to_owned()));
        assert_eq!(missing(&["v…: x"], true), None);
        assert_eq!(missing(&["v…: y"], true), Some("v…: y".to_owned()));
        assert_eq!(missing(&["a 1ms…"], true), None);
        let column = ["late        4.488933".to_owned()];
        assert_eq!(not_printed(&column, ["late     -997.978021\n", ""], false), None);
        assert!(not_printed(&column, ["late     -997.978021\n", ""], true).is_some());
        let wall = ["wall 1795424766.252466101".to_owned()];
        assert_eq!(not_printed(&wall, ["wall 1795878003.369987485\n", ""], false), None);
        // What a host adds that swallows the deadline's write.
        let swallows = "vmm: x; it swallows the TSC deadline, so the guest's deadline sites are patched";
        assert_eq!(not_printed(&["vmm: x".to_owned()], ["", swallows], true), None);
    }
}
