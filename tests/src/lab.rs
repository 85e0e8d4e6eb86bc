//! Runs `vmm` in a temporary directory, with flags as users write them, and reads its results.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;
use tempfile::TempDir;

use crate::{Ended, Trace, binary, process};

/// A temporary directory, in which runs of `vmm` leave their files.
#[derive(Debug)]
pub struct Lab {
    dir: TempDir,
}

/// A run that ended.
#[derive(Debug)]
pub struct Run {
    /// Exit status and output.
    pub ended: Ended,
    /// The `--summary` file.
    pub summary: Summary,
    /// What `--trace` wrote, if asked for.
    pub trace: Option<Trace>,
}

impl Default for Lab {
    fn default() -> Self {
        Self::new()
    }
}

impl Lab {
    /// An empty one.
    ///
    /// # Panics
    /// If the directory cannot be created.
    #[must_use]
    pub fn new() -> Self {
        Self { dir: tempfile::tempdir().expect("a temporary directory") }
    }

    /// A path in it.
    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `vmm` with these flags, separated by blanks, in this working directory: files need no path.
    #[must_use]
    pub fn vmm(&self, flags: &str) -> Command {
        let mut command = Command::new(binary::vmm());
        command.current_dir(self.dir.path()).args(flags.split_whitespace()).env_remove("RUST_LOG");
        command
    }

    /// `vmm --guest GUEST --cmdline …` with these flags.
    #[must_use]
    pub fn guest(&self, cmdline: &str, flags: &str) -> Command {
        let mut command = self.vmm(flags);
        command.arg("--guest").arg(binary::guest()).args(["--cmdline", cmdline]);
        command
    }

    /// Runs `vmm` with these flags.
    #[track_caller]
    pub fn run(&self, flags: &str) -> Ended {
        process::finish(&mut self.vmm(flags))
    }

    /// Sweeps the exits of one tick of the embedded guest, and returns the result's points. A sweep that has found
    /// something ends with exit code 1.
    #[track_caller]
    pub fn sweep_exits(&self, cmdline: &str, flags: &str) -> Vec<Value> {
        let mut command = self.vmm("sweep --every exit --json found.json");
        let ended = process::finish(command.args(["--cmdline", cmdline]).args(flags.split_whitespace()));
        assert!(matches!(ended.code(), 0 | 1), "{ended:#?}");
        let found: Value = serde_json::from_slice(&fs::read(self.path("found.json")).expect("a result")).expect("JSON");
        let points = found["points"].as_array().expect("points").clone();
        assert!(points.len() >= 4, "{points:?}");
        points
    }

    /// Boots the guest, and reads its result files; the exit code must be 0.
    #[track_caller]
    pub fn boot(&self, cmdline: &str, flags: &str) -> Run {
        self.results(&mut self.guest(cmdline, flags))
    }

    /// Boots the guest with a trace.
    #[track_caller]
    pub fn boot_traced(&self, cmdline: &str, flags: &str) -> Run {
        self.results(self.guest(cmdline, flags).args(["--trace", "trace"]))
    }

    /// Restores the snapshot `dir` with a trace.
    #[track_caller]
    pub fn restore(&self, dir: &str, flags: &str) -> Run {
        self.results(self.vmm("restore").arg(dir).args(flags.split_whitespace()).args(["--trace", "trace"]))
    }

    #[track_caller]
    fn results(&self, command: &mut Command) -> Run {
        let [summary, trace] = ["summary", "trace"].map(|name| self.path(name));
        let _ = (fs::remove_file(&summary), fs::remove_file(&trace));
        let ended = process::finish(command.args(["--summary", "summary"])).expect(0);
        let summary = fs::read(summary).expect("a summary");
        let trace = trace.exists().then(|| Trace::read(&trace));
        Run { ended, summary: Summary(serde_json::from_slice(&summary).expect("JSON")), trace }
    }
}

impl Run {
    /// The trace that was asked for.
    ///
    /// # Panics
    /// If there is none.
    #[must_use]
    pub fn trace(&self) -> &Trace {
        self.trace.as_ref().expect("a trace")
    }

    /// Asserts that all `count` ticks came, none of them early by the guest's or the host's clock, and that the clock
    /// never went back.
    ///
    /// # Panics
    /// With the summary, if not.
    #[track_caller]
    pub fn in_order(&self, count: u64) {
        let summary = &self.summary;
        let seen =
            ["ticks/ticks", "lost", "ticks/early_by_host", "ticks/clock_steps_back"].map(|name| summary.count(name));
        assert_eq!(seen, [count, 0, 0, 0], "ticks, lost, early by the host, clock steps back: {self:#?}");
    }
}

/// What `--summary` wrote.
#[derive(Debug)]
pub struct Summary(Value);

impl Summary {
    /// A number, by its path: `ticks/early_wakes`.
    ///
    /// # Panics
    /// If there is no such number.
    #[track_caller]
    #[must_use]
    pub fn count(&self, path: &str) -> u64 {
        self.value(path).as_u64().unwrap_or_else(|| panic!("{path} is not a count in {self:#?}"))
    }

    /// A ratio, by its path; `None` if there was nothing to take it of.
    #[must_use]
    pub fn ratio(&self, path: &str) -> Option<f64> {
        self.value(path).as_f64()
    }

    /// A word, by its path.
    ///
    /// # Panics
    /// If there is no such word.
    #[track_caller]
    #[must_use]
    pub fn word(&self, path: &str) -> &str {
        self.value(path).as_str().unwrap_or_else(|| panic!("{path} is not a word in {self:#?}"))
    }

    /// Whatever is at a path.
    ///
    /// # Panics
    /// If nothing is.
    #[track_caller]
    #[must_use]
    pub fn value(&self, path: &str) -> &Value {
        self.0.pointer(&format!("/{path}")).unwrap_or_else(|| panic!("no {path} in {self:#?}"))
    }
}
