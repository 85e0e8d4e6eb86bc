//! Shows the progress of a long command: a bar on a terminal, nothing elsewhere.

use std::{
    io::{self, IsTerminal, Write},
    sync::{Mutex, MutexGuard, PoisonError},
};

use kdam::{Bar, BarBuilder, BarExt};

/// The bar, on standard error.
pub struct Progress(Option<Mutex<Bar>>);

impl Progress {
    /// A bar at zero; `unit` names a step. Errors of the bar are ignored.
    pub fn new(unit: &str) -> Self {
        let on_terminal = io::stderr().is_terminal();
        let bar = || BarBuilder::default().unit(unit).dynamic_ncols(true).mininterval(0.1).build().ok();
        Self(on_terminal.then(bar).flatten().map(Mutex::new))
    }

    fn bar(&self) -> Option<MutexGuard<'_, Bar>> {
        self.0.as_ref().map(|bar| bar.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether there is a terminal to show it on.
    pub fn is_shown(&self) -> bool {
        self.0.is_some()
    }

    /// Sets the bar to `done` steps of `total`.
    pub fn at(&self, done: u64, total: u64) {
        if let Some(mut bar) = self.bar() {
            bar.total = usize::try_from(total).unwrap_or(usize::MAX);
            let _ = bar.update_to(usize::try_from(done).unwrap_or(usize::MAX));
        }
    }

    /// Sets the text beside the bar.
    pub fn say(&self, what: &str) {
        if let Some(mut bar) = self.bar() {
            bar.set_postfix(what);
            let _ = bar.refresh();
        }
    }

    /// Removes the bar.
    pub fn finish(&mut self) {
        if let Some(bar) = self.0.take() {
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
