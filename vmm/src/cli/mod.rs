//! What each subcommand does.

pub mod args;
mod control;
mod demo;
pub mod exit;
mod run;
mod snapshot;

use std::process::ExitCode;

use anyhow::Result;

use args::{Cli, Command};

/// Carries the command out.
///
/// # Errors
/// One message for the user; [`exit::code_of`] says with which exit code.
pub fn dispatch(cli: Cli) -> Result<ExitCode> {
    match cli.command {
        Some(Command::Restore(args)) => run::restore(&args),
        Some(Command::Ctl(args)) => control::ctl(&args),
        Some(Command::Snapshot(args)) => snapshot::run(&args),
        None => match cli.run.guest {
            Some(_) => run::boot(&cli.run),
            None => demo::run(&cli.run),
        },
    }
}
