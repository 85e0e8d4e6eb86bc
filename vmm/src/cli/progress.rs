//! Shows the progress of a long command: a bar on a terminal, elsewhere a line now and then.

use std::{
    io::{self, IsTerminal, Write},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use clap::Args;
use kdam::{Bar, BarBuilder, BarExt};
use vmtime::Length;

use super::args::{TimeOrOff, time_or_off};

/// Flag for long commands.
#[derive(Debug, Args)]
pub struct Heartbeat {
    /// While it runs, say so on standard error every so often, unless that is a terminal; off = never.
    #[arg(long, value_name = "TIME|off", default_value = "30s", value_parser = time_or_off)]
    pub heartbeat: TimeOrOff,
}

impl Heartbeat {
    /// The interval; none if it is off, or standard error is a terminal.
    pub fn interval(&self) -> Option<Duration> {
        self.heartbeat.0.filter(|_| !io::stderr().is_terminal())
    }
}

/// The progress of a command, on standard error.
pub struct Progress {
    shown: Shown,
    /// What a step is called.
    unit: &'static str,
}

enum Shown {
    Bar(Mutex<Bar>),
    Lines(Mutex<Lines>),
    Nothing,
}

/// Lines at an interval.
struct Lines {
    every: Duration,
    begun: Instant,
    last: Instant,
}

impl Lines {
    /// The time since the beginning, if a line is due at `now`.
    fn due(&mut self, now: Instant) -> Option<Duration> {
        let due = now.duration_since(self.last) >= self.every;
        due.then(|| {
            self.last = now;
            now.duration_since(self.begun)
        })
    }
}

fn lock<T>(what: &Mutex<T>) -> MutexGuard<'_, T> {
    what.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Progress {
    /// Progress at zero; `unit` names steps. Errors of the bar are ignored.
    pub fn new(unit: &'static str, heartbeat: &Heartbeat) -> Self {
        let bar = || BarBuilder::default().unit(format!(" {unit}")).dynamic_ncols(true).mininterval(0.1).build().ok();
        let bar = io::stderr().is_terminal().then(bar).flatten();
        let begun = Instant::now();
        let lines = || heartbeat.interval().map(|every| Lines { every, begun, last: begun });
        let shown = match bar {
            Some(bar) => Shown::Bar(Mutex::new(bar)),
            None => lines().map_or(Shown::Nothing, |lines| Shown::Lines(Mutex::new(lines))),
        };
        Self { shown, unit }
    }

    /// Whether there is a terminal to show a bar on.
    pub fn is_shown(&self) -> bool {
        matches!(self.shown, Shown::Bar(_))
    }

    /// Says that `done` of `total` steps are done.
    pub fn at(&self, done: u64, total: u64) {
        match &self.shown {
            Shown::Bar(bar) => {
                let mut bar = lock(bar);
                bar.total = usize::try_from(total).unwrap_or(usize::MAX);
                let _ = bar.update_to(usize::try_from(done).unwrap_or(usize::MAX));
            }
            Shown::Lines(lines) => {
                if let Some(after) = lock(lines).due(Instant::now()) {
                    let after = Length(Duration::from_secs(after.as_secs()));
                    machine::say!("vmm: {done} of {total} {} after {after}", self.unit);
                }
            }
            Shown::Nothing => {}
        }
    }

    /// Sets the text beside the bar.
    pub fn say(&self, what: &str) {
        if let Shown::Bar(bar) = &self.shown {
            let mut bar = lock(bar);
            bar.set_postfix(what);
            let _ = bar.refresh();
        }
    }

    /// Removes the bar.
    pub fn finish(&mut self) {
        if let Shown::Bar(bar) = std::mem::replace(&mut self.shown, Shown::Nothing) {
            let mut bar = bar.into_inner().unwrap_or_else(PoisonError::into_inner);
            // The bar overwrites itself with blanks and leaves the cursor at their end.
            let _ = bar.clear().and_then(|()| io::stderr().write_all(b"\r"));
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.finish();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Catches: a line for each step, or none after the first.
    #[test]
    fn a_line_is_due_once_an_interval() {
        let begun = Instant::now();
        let at = |seconds| begun + Duration::from_secs(seconds);
        let mut lines = Lines { every: Duration::from_secs(30), begun, last: begun };
        let due: Vec<u64> = (0..100).filter(|seconds| lines.due(at(*seconds)).is_some()).collect();
        assert_eq!(due, [30, 60, 90]);
        // Steps may take longer than that.
        assert_eq!([lines.due(at(250)), lines.due(at(251))], [Some(Duration::from_secs(250)), None]);
    }
}
