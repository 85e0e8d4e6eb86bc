//! The lines of a `--trace` file.

use std::{fmt, fs, path::Path};

use serde_json::Value;

use crate::Page;

/// A trace: its bytes, to compare two of them, and its lines.
pub struct Trace {
    /// The file.
    pub bytes: Vec<u8>,
    lines: Vec<Line>,
}

impl fmt::Debug for Trace {
    /// Prints the end only, which is enough for a failed test.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tail = self.lines.iter().rev().take(20).rev().map(|line| line.0.to_string());
        f.debug_list().entries(tail).finish()
    }
}

/// One line of a trace.
#[derive(Debug)]
pub struct Line(Value);

impl Trace {
    /// Reads a trace file.
    ///
    /// # Panics
    /// If it cannot be read, or a line is no JSON object.
    #[track_caller]
    #[must_use]
    pub fn read(path: &Path) -> Self {
        let bytes = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let lines = bytes.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
        let lines = lines.map(|line| Line(serde_json::from_slice(line).expect("a JSON object a line"))).collect();
        Self { bytes, lines }
    }

    /// All lines, in order.
    #[must_use]
    pub fn lines(&self) -> &[Line] {
        &self.lines
    }

    /// The lines about `event`, in order.
    pub fn all<'a>(&'a self, event: &str) -> impl DoubleEndedIterator<Item = &'a Line> {
        let event = event.to_owned();
        self.lines.iter().filter(move |line| line.is(&event))
    }

    /// The only line about `event`.
    ///
    /// # Panics
    /// If there is none or another.
    #[track_caller]
    #[must_use]
    pub fn only<'a>(&'a self, event: &str) -> &'a Line {
        let mut lines = self.all(event);
        let line = lines.next().unwrap_or_else(|| panic!("no {event} in {self:?}"));
        assert!(lines.next().is_none(), "more than one {event} in {self:?}");
        line
    }

    /// The first line about `event`.
    ///
    /// # Panics
    /// If there is none.
    #[track_caller]
    #[must_use]
    pub fn first<'a>(&'a self, event: &str) -> &'a Line {
        self.all(event).next().unwrap_or_else(|| panic!("no {event} in {self:?}"))
    }
}

impl Line {
    /// Whether it is about `event`.
    #[must_use]
    pub fn is(&self, event: &str) -> bool {
        self.0["event"] == event
    }

    /// Guest TSC.
    #[must_use]
    pub fn tsc(&self) -> u64 {
        self.number("/tsc")
    }

    /// VM time in nanoseconds.
    #[must_use]
    pub fn vm_ns(&self) -> u64 {
        self.number("/vm_ns")
    }

    /// A field that is a number.
    ///
    /// # Panics
    /// If there is none.
    #[track_caller]
    #[must_use]
    pub fn field(&self, name: &str) -> u64 {
        self.number(&format!("/{name}"))
    }

    /// Whether it has this field.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.0.get(name).is_some()
    }

    /// A field that is a string.
    ///
    /// # Panics
    /// If there is none.
    #[track_caller]
    #[must_use]
    pub fn word(&self, name: &str) -> &str {
        self.0[name].as_str().unwrap_or_else(|| panic!("no word {name} in {self:?}"))
    }

    /// The published page of a `save` or `restore`.
    #[must_use]
    pub fn page(&self) -> Page {
        let shift = self.0.pointer("/page/scale/shift").and_then(Value::as_i64).expect("a shift");
        Page {
            tsc_timestamp: self.number("/page/tsc_timestamp"),
            system_time: self.number("/page/system_time"),
            mul: u32::try_from(self.number("/page/scale/mul")).expect("32 bits"),
            shift: i8::try_from(shift).expect("8 bits"),
        }
    }

    /// The TSC deadline in flight at a `save` or `restore`.
    #[must_use]
    pub fn armed_tsc(&self) -> u64 {
        self.number("/armed/tsc")
    }

    #[track_caller]
    fn number(&self, pointer: &str) -> u64 {
        self.0.pointer(pointer).and_then(Value::as_u64).unwrap_or_else(|| panic!("no number {pointer} in {}", self.0))
    }
}
