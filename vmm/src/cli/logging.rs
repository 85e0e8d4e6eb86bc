//! The log, on standard error. Its rate is limited, so that no guest and no client can flood it.

use std::{
    collections::HashMap,
    io::Write,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use log::{Log, Metadata, Record};
use machine::output::stderr;

use super::text::{LINE_CHARS, printable};

/// Lines of one place in the code that are written within [`WINDOW`]; the rest is counted.
const BURST: u64 = 10;
const WINDOW: Duration = Duration::from_secs(10);

/// The place in the code that logs a line.
type Place = (Option<String>, Option<u32>);

/// The state of the limit of one place.
#[derive(Clone, Copy, Debug)]
struct Seen {
    since: Instant,
    lines: u64,
    left_out: u64,
}

/// Whether a line is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// It is written, after a line with the number of lines left out, if there are any.
    Write { left_out: u64 },
    /// It is left out and counted.
    LeaveOut,
}

impl Seen {
    fn new(now: Instant) -> Self {
        Self { since: now, lines: 0, left_out: 0 }
    }

    fn line(&mut self, now: Instant) -> Verdict {
        let left_out = self.left_out;
        if now.duration_since(self.since) >= WINDOW {
            *self = Self::new(now);
        } else if self.lines >= BURST {
            self.left_out = left_out.saturating_add(1);
            return Verdict::LeaveOut;
        }
        self.lines = self.lines.saturating_add(1);
        Verdict::Write { left_out: if self.lines == 1 { left_out } else { 0 } }
    }
}

/// The logger with the limit.
struct Limited {
    inner: env_logger::Logger,
    seen: Mutex<HashMap<Place, Seen>>,
}

impl Log for Limited {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.inner.enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        if !self.inner.matches(record) {
            return;
        }
        // The map is bounded: it has at most one entry for each log call in the code.
        let place = (record.module_path().map(str::to_owned), record.line());
        let now = Instant::now();
        let verdict = {
            let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
            seen.entry(place).or_insert_with(|| Seen::new(now)).line(now)
        };
        match verdict {
            Verdict::LeaveOut => {}
            Verdict::Write { left_out } => {
                if left_out > 0 {
                    tell(left_out);
                }
                self.inner.log(record);
            }
        }
    }

    fn flush(&self) {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let left_out = seen.values().fold(0u64, |sum, seen| sum.saturating_add(seen.left_out));
        if left_out > 0 {
            tell(left_out);
        }
    }
}

fn tell(left_out: u64) {
    machine::say!("vmm: {left_out} lines of the log like those above were left out");
}

/// Starts the log, at level `warn` unless `RUST_LOG` sets another.
pub fn begin() {
    let inner = env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn"))
        .format(|out, record| {
            let said = printable(&record.args().to_string(), LINE_CHARS);
            writeln!(out, "vmm: {}: {said}", record.level().as_str().to_lowercase())
        })
        .target(env_logger::Target::Pipe(Box::new(stderr().clone())))
        .build();
    log::set_max_level(inner.filter());
    // This fails if there is a logger already, which is then used.
    let _ = log::set_boxed_logger(Box::new(Limited { inner, seen: Mutex::default() }));
}

#[cfg(test)]
mod tests {
    use super::*;

    // Catches: a guest that fills a disk with one repeated line, and a lost count of lines left out.
    #[test]
    fn a_place_gets_a_burst_and_then_a_count() {
        let start = Instant::now();
        let mut seen = Seen::new(start);
        for _ in 0..BURST {
            assert_eq!(seen.line(start), Verdict::Write { left_out: 0 });
        }
        for _ in 0..1000 {
            assert_eq!(seen.line(start), Verdict::LeaveOut);
        }
        assert_eq!(seen.line(start + WINDOW), Verdict::Write { left_out: 1000 });
        assert_eq!(seen.line(start + WINDOW), Verdict::Write { left_out: 0 });
    }
}
