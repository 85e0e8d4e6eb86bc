//! A place to measure in: programs, a directory for what they leave, and how long to go on.

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

/// The place.
#[derive(Debug)]
pub struct Lab {
    /// What takes part.
    pub programs: Programs,
    /// Fewer and shorter measurements: to see that they work, not to believe them.
    pub quick: bool,
    dir: TempDir,
}

/// A run of `vmm` that ended well.
#[derive(Debug)]
pub struct Run {
    /// How.
    pub ended: Ended,
    /// What `--summary` wrote.
    pub summary: Value,
}

impl Lab {
    /// An empty one.
    ///
    /// # Errors
    /// If there is no place for temporary files.
    pub fn new(programs: Programs, quick: bool) -> Result<Self> {
        Ok(Self { programs, quick, dir: tempfile::Builder::new().prefix("vmm-bench-").tempdir()? })
    }

    /// Where temporary files are.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A path among them.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `full`, or with `--quick` a part of it that still works.
    #[must_use]
    pub fn effort(&self, full: u32) -> u32 {
        if self.quick { full.div_ceil(4) } else { full }
    }

    /// [`Self::effort`], for rounds.
    #[must_use]
    pub fn rounds(&self, full: u32) -> usize {
        usize::try_from(self.effort(full)).unwrap_or(usize::MAX)
    }

    /// `vmm` with these flags, separated by blanks.
    #[must_use]
    pub fn vmm(&self, flags: &str) -> Command {
        let mut command = Command::new(&self.programs.vmm);
        command.args(flags.split_whitespace()).current_dir(self.dir()).env_remove("RUST_LOG");
        command
    }

    /// `vmm` with the guest.
    #[must_use]
    pub fn guest(&self, cmdline: &str, flags: &str) -> Command {
        let mut command = self.vmm(flags);
        command.arg("--guest").arg(&self.programs.guest).args(["--cmdline", cmdline]);
        command
    }

    /// Runs the guest to its end. That it lost no tick and that none came early is part of every measurement.
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

    /// Whether the guest takes this word on its command line.
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
    /// If it cannot be asked.
    pub fn vmm_takes(&self, subcommand: &str, flag: &str) -> Result<bool> {
        let help = process::finish(self.vmm(subcommand).arg("--help"))?;
        Ok(help.stdout.split_whitespace().any(|word| word == flag))
    }
}

/// The number at `pointer` of a JSON value.
///
/// # Errors
/// If there is none.
pub fn number(value: &Value, pointer: &str) -> Result<f64> {
    value.pointer(pointer).and_then(Value::as_f64).with_context(|| format!("no number {pointer} in {value}"))
}
