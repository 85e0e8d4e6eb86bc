//! What each subcommand does.

pub mod args;
mod control;
mod demo;
mod doctor;
pub mod exit;
pub mod output;
mod run;
mod run_files;
mod snapshot;
mod study;
mod sweep;
pub mod sweep_args;
mod text;
mod units;

use std::process::ExitCode;

use anyhow::Result;
use clap::{ArgMatches, CommandFactory, FromArgMatches, parser::ValueSource};

use args::{Cli, Command};
use exit::Usage;

/// What the demonstration takes; everything else is for a guest or a snapshot that the user names.
const DEMONSTRATION: [&str; 6] = ["time", "json", "emulate_host", "report", "junit", "tap"];

/// Carries the command out.
///
/// # Errors
/// One message for the user; [`exit::code_of`] says with which exit code.
pub fn dispatch(matches: &ArgMatches) -> Result<ExitCode> {
    let cli = Cli::from_arg_matches(matches).unwrap_or_else(|error| error.exit());
    match cli.command {
        Some(Command::Restore(args)) => run::restore(&args),
        Some(Command::Ctl(args)) => control::ctl(&args),
        Some(Command::Snapshot(args)) => snapshot::run(&args),
        Some(Command::Doctor(args)) => doctor::run(&args),
        Some(Command::Sweep(args)) => sweep::run(&args),
        Some(Command::Study(args)) => study::run(&args),
        None => match cli.run.guest {
            Some(_) => run::guest(&cli.run),
            None => {
                let command = Cli::command();
                let stray = command.get_arguments().find(|argument| {
                    let id = argument.get_id().as_str();
                    !DEMONSTRATION.contains(&id) && matches.value_source(id) == Some(ValueSource::CommandLine)
                });
                if let Some(flag) = stray.and_then(clap::Arg::get_long) {
                    return Err(Usage(format!("--{flag} is for running a guest: name one with --guest")).into());
                }
                demo::run(&cli.run)
            }
        },
    }
}
