//! The context of a measurement: programs, a directory for temporary files, and the number of rounds.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tempfile::TempDir;

use crate::{
    process::{self, Ended},
    programs::Programs,
};

/// The context of a measurement.
#[derive(Debug)]
pub struct Lab {
    /// The programs that take part.
    pub programs: Programs,
    /// Fewer and shorter measurements, which show only that they work: their numbers mean nothing.
    pub quick: bool,
    dir: TempDir,
}

/// A run of `vmm` that succeeded.
#[derive(Debug)]
pub struct Run {
    /// Exit status and output.
    pub ended: Ended,
    /// The file that `--summary` wrote.
    pub summary: Value,
}

impl Lab {
    /// A context with an empty directory.
    ///
    /// # Errors
    /// If the directory for temporary files cannot be created.
    pub fn new(programs: Programs, quick: bool) -> Result<Self> {
        Ok(Self { programs, quick, dir: tempfile::Builder::new().prefix("vmm-bench-").tempdir()? })
    }

    /// The directory of temporary files.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The path of a temporary file.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `full`, or with `--quick` a smaller number that still works.
    #[must_use]
    pub fn effort(&self, full: u32) -> u32 {
        if self.quick { full.div_ceil(4) } else { full }
    }

    /// [`Self::effort`] for a number of rounds.
    #[must_use]
    pub fn rounds(&self, full: u32) -> usize {
        usize::try_from(self.effort(full)).unwrap_or(usize::MAX)
    }

    /// A command: `vmm` with these flags, separated by blanks.
    #[must_use]
    pub fn vmm(&self, flags: &str) -> Command {
        let mut command = Command::new(&self.programs.vmm);
        command.args(flags.split_whitespace()).current_dir(self.dir()).env_remove("RUST_LOG");
        command
    }

    /// A command: `vmm` with the guest.
    #[must_use]
    pub fn guest(&self, cmdline: &str, flags: &str) -> Command {
        let mut command = self.vmm(flags);
        command.arg("--guest").arg(&self.programs.guest).args(["--cmdline", cmdline]);
        command
    }

    /// Runs the guest to its end. A run with a lost or early tick is no measurement.
    ///
    /// # Errors
    /// If the guest fails, a tick is lost or early, or its clock went back.
    pub fn run(&self, cmdline: &str, flags: &str) -> Result<Run> {
        let file = self.path("summary.json");
        let ended = process::succeed(self.guest(cmdline, flags).arg("--summary").arg(&file))?;
        let summary: Value = serde_json::from_slice(&fs::read(&file).context("--summary")?).context("--summary")?;
        for wrong in ["/lost", "/ticks/early_by_host", "/ticks/clock_steps_back"] {
            if number(&summary, wrong)? != 0.0 {
                bail!("{flags} {cmdline}: {wrong} is not 0 in {summary}");
            }
        }
        Ok(Run { ended, summary })
    }

    /// Whether the guest accepts this word on its command line.
    ///
    /// # Errors
    /// If it fails for another reason.
    pub fn guest_takes(&self, word: &str) -> Result<bool> {
        let ended = process::finish(&mut self.guest(&format!("hz=1000 count=1 {word}"), ""))?;
        match ended.status.success() {
            true => Ok(true),
            false if ended.stdout.contains("is unknown") => Ok(false),
            false => bail!("{word}: {}{}", ended.stdout, ended.stderr),
        }
    }

    /// Whether `vmm SUBCOMMAND --help` names `flag`.
    ///
    /// # Errors
    /// If `vmm` cannot be run.
    pub fn vmm_takes(&self, subcommand: &str, flag: &str) -> Result<bool> {
        let help = process::finish(self.vmm(subcommand).arg("--help"))?;
        Ok(help.stdout.split_whitespace().any(|word| word == flag))
    }
}

/// The number at JSON pointer `pointer` of `value`.
///
/// # Errors
/// If there is none.
pub fn number(value: &Value, pointer: &str) -> Result<f64> {
    value.pointer(pointer).and_then(Value::as_f64).with_context(|| format!("no number {pointer} in {value}"))
}
