//! Reads a guest's console: for a text that it waits for, for complaints of Linux' watchdogs, and for what the program
//! of `docs/linux/init.c` says.

use std::{
    collections::VecDeque,
    io::{self, Write},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use serde::Serialize;

/// What Linux prints when time does not pass as it must, or a CPU does not run: a part of the line, and who says so.
const COMPLAINTS: [(&str, &str); 7] = [
    ("soft lockup", "soft-lockup detector"),
    ("hard LOCKUP", "hard-lockup detector"),
    ("timekeeping watchdog", "clocksource watchdog"),
    ("Marking clocksource", "clocksource watchdog"),
    ("detected stall", "RCU stall detector"),
    ("blocked for more than", "hung-task detector"),
    ("Kernel panic", "panic"),
];

/// Bytes of a line that are looked at.
const LINE_MAX: usize = 1024;
/// Last lines that are kept for messages.
const LAST: usize = 4;
/// Complaints that are kept.
const COMPLAINTS_MAX: usize = 16;

/// A console that is read and passed on. Clones share it.
#[derive(Clone)]
pub struct Console(Arc<Mutex<State>>);

struct State {
    to: Box<dyn Write + Send>,
    wanted: Option<String>,
    line: Vec<u8>,
    last: VecDeque<String>,
    found: Found,
}

/// What was read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Found {
    /// The text that was waited for came.
    #[serde(skip)]
    pub wanted: bool,
    /// How many complaints there were.
    pub complaints: u64,
    /// The first ones: who complains, and the line.
    pub first_complaints: Vec<(String, String)>,
    /// By the program's account: how late it woke at worst, in microseconds.
    pub worst_late_us: Option<u64>,
    /// By its account: how many errors there were, at its end.
    pub errors: Option<u64>,
    /// The first error that it printed.
    pub first_error: Option<String>,
}

impl Console {
    /// Passes everything on to `to`, and waits for `wanted`.
    #[must_use]
    pub fn new(to: Box<dyn Write + Send>, wanted: Option<String>) -> Self {
        let state = State { to, wanted, line: Vec::new(), last: VecDeque::new(), found: Found::default() };
        Self(Arc::new(Mutex::new(state)))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was read so far.
    #[must_use]
    pub fn found(&self) -> Found {
        self.state().found.clone()
    }

    /// The last lines, in one.
    #[must_use]
    pub fn last_lines(&self) -> String {
        let state = self.state();
        let open = String::from_utf8_lossy(&state.line);
        let lines = state.last.iter().map(String::as_str).chain([open.trim()]);
        lines.filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" / ")
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut state = self.state();
        for byte in bytes {
            state.take(*byte);
        }
        // Whoever reads the console does not decide what the guest does.
        let _ = state.to.write_all(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let _ = self.state().to.flush();
        Ok(())
    }
}

impl State {
    fn take(&mut self, byte: u8) {
        if byte == b'\n' {
            let line = String::from_utf8_lossy(&self.line).trim().to_owned();
            self.line.clear();
            self.found.read(&line);
            if self.last.len() == LAST {
                self.last.pop_front();
            }
            self.last.push_back(line);
        } else if self.line.len() < LINE_MAX {
            self.line.push(byte);
            // A prompt has no end of line.
            self.found.wanted |= self.wanted.as_ref().is_some_and(|wanted| self.line.ends_with(wanted.as_bytes()));
        }
    }
}

impl Found {
    fn read(&mut self, line: &str) {
        if let Some((_, who)) = COMPLAINTS.into_iter().find(|(part, _)| line.contains(part)) {
            self.complaints = self.complaints.saturating_add(1);
            if self.first_complaints.len() < COMPLAINTS_MAX {
                self.first_complaints.push((who.to_owned(), line.to_owned()));
            }
        }
        let number = |text: &str| text.split(' ').next()?.parse::<u64>().ok();
        if let Some((_, late)) = line.split_once(": worst late ").filter(|_| line.contains("init: ")) {
            self.worst_late_us = self.worst_late_us.max(number(late));
        }
        if let Some((_, errors)) = line.split_once("init: done, errors: ") {
            self.errors = number(errors);
        }
        if let Some((_, error)) = line.split_once("init: ERROR: ") {
            self.first_error.get_or_insert_with(|| error.to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pieces: &[&str], wanted: &str) -> (Console, Vec<u8>) {
        #[derive(Clone, Default)]
        struct Copy(Arc<Mutex<Vec<u8>>>);
        impl Write for Copy {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0.lock().unwrap().extend(bytes);
                Ok(bytes.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let copy = Copy::default();
        let mut console = Console::new(Box::new(copy.clone()), Some(wanted.to_owned()));
        for piece in pieces {
            console.write_all(piece.as_bytes()).unwrap();
        }
        let bytes = copy.0.lock().unwrap().clone();
        (console, bytes)
    }

    // Catches: a marker that is missed because it comes in pieces or has no end of line; bytes that are not passed on.
    #[test]
    fn a_text_is_found_wherever_the_pieces_end() {
        assert!(read(&["boot\nlog", "in: "], "login: ").0.found().wanted);
        assert!(!read(&["boot\nlog\nin: "], "login: ").0.found().wanted);
        assert_eq!(read(&["a\n", "b"], "x").1, b"a\nb");
        // A guest without line ends cannot make it grow.
        let long = "x".repeat(10 * LINE_MAX);
        let (console, _) = read(&[&long], "y");
        assert_eq!(console.state().line.len(), LINE_MAX);
    }

    // Catches: a complaint of Linux that is missed, or an ordinary line taken for one. The lines are Linux 6.1's.
    #[test]
    fn linuxs_watchdogs_are_heard() {
        let lines = [
            "[   50.1] watchdog: BUG: soft lockup - CPU#0 stuck for 23s! [init:1]",
            "[    9.0] clocksource: timekeeping watchdog on CPU0: Marking clocksource 'tsc' as unstable",
            "[   60.2] rcu: INFO: rcu_sched self-detected stall on CPU",
            "[   60.2] rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:",
            "[  243.0] INFO: task init:1 blocked for more than 122 seconds.",
            "[    0.5] clocksource: Switched to clocksource kvm-clock",
            "[    0.5] NMI watchdog: Enabled. Permanently consumes one hw-PMU counter.",
        ];
        let found = read(&[&(lines.join("\r\n") + "\r\n")], "x").0.found();
        let who: Vec<&str> = found.first_complaints.iter().map(|(who, _)| who.as_str()).collect();
        assert_eq!(found.complaints, 5);
        assert_eq!(
            who,
            [
                "soft-lockup detector",
                "clocksource watchdog",
                "RCU stall detector",
                "RCU stall detector",
                "hung-task detector"
            ]
        );
    }

    // Catches: the worst of several CPUs forgotten; a count of errors that is read from another line.
    #[test]
    fn the_programs_account_is_read() {
        let text = "init: cpu 0: worst late 80 us\r\ninit: cpu 1: worst late 2635 us\r\n\
                    init: ERROR: cpu 1: tick 3 late 2635 us\r\ninit: ERROR: other\r\ninit: done, errors: 2\r\n";
        let found = read(&[text], "x").0.found();
        assert_eq!((found.worst_late_us, found.errors), (Some(2635), Some(2)));
        assert_eq!(found.first_error.as_deref(), Some("cpu 1: tick 3 late 2635 us"));
        assert_eq!(read(&["worst late 7 us\n"], "x").0.found(), Found::default());
    }
}
