//! Carries out the subcommands.

pub mod args;
mod check;
pub mod check_args;
pub mod choices;
mod clock;
pub mod clock_args;
mod closing;
pub mod commands;
mod conformance;
mod control;
pub mod ctl_args;
mod demo;
mod doctor;
pub mod doctor_args;
pub mod exit;
pub mod logging;
pub mod output;
mod progress;
mod receive;
mod run;
mod run_files;
mod run_page;
mod sites;
pub mod sites_args;
mod snapshot;
mod study;
pub mod study_args;
mod sweep;
pub mod sweep_args;
pub mod text;
mod units;

use std::process::ExitCode;

use clap::{ArgMatches, CommandFactory, FromArgMatches, parser::ValueSource};

use args::{Cli, Run};
use commands::Command;
use exit::{Error, Result};

/// The flags that the demonstration accepts. The others need a guest or a snapshot.
const DEMONSTRATION: [&str; 9] =
    ["time", "json", "emulate_host", "report", "junit", "tap", "ktap", "exit_codes", "heartbeat"];

/// Carries out the command that was called.
///
/// # Errors
/// One message for the user, and an exit code.
pub fn dispatch(matches: &ArgMatches) -> Result<ExitCode> {
    let Some(command) = Command::called(matches) else {
        let run = Run::from_arg_matches(matches).unwrap_or_else(|error| error.exit());
        return if run.guest.is_some() { run::guest(&run) } else { demonstration(matches, &run) };
    };
    match command.unwrap_or_else(|error| error.exit()) {
        Command::Restore(args) => run::restore(&args),
        Command::Receive(args) => receive::receive(&args),
        Command::Ctl(args) => control::ctl(&args),
        Command::Snapshot(args) => snapshot::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Sweep(args) => sweep::run(&args),
        Command::Study(args) => study::run(&args),
        Command::Clock(args) => clock::run(&args),
        Command::Check(args) => check::run(&args),
        Command::Sites(args) => sites::run(&args),
    }
}

fn demonstration(matches: &ArgMatches, run: &Run) -> Result<ExitCode> {
    let command = Cli::command();
    let stray = command.get_arguments().find(|argument| {
        let id = argument.get_id().as_str();
        !DEMONSTRATION.contains(&id) && matches.value_source(id) == Some(ValueSource::CommandLine)
    });
    if let Some(flag) = stray.and_then(clap::Arg::get_long) {
        return Err(Error::usage(format!("--{flag} is for running a guest: name one with --guest")));
    }
    demo::run(run)
}
