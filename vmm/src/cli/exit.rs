//! Exit codes: 0 all good; 1 the guest failed or a check did; 2 usage; 3 the host cannot do it.

use std::process::ExitCode;

use lab::sweep::SweepError;
use machine::{
    End, RunError, control::ClientError, devices::GuestExit, session::SessionError, snapshot::SnapshotError,
};

use super::text::{LINE_CHARS, printable};

/// The user's input is wrong: exit code 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(pub String);

/// A check failed: exit code 1.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Failed(pub String);

/// The host cannot do it, as another process of ours found: exit code 3.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct HostCannot(pub String);

const FAILED: u8 = 1;
/// What is wrong is what vmm was given.
pub const USAGE: u8 = 2;
const HOST: u8 = 3;

/// The exit code for an error.
pub fn code_of(error: &anyhow::Error) -> ExitCode {
    let run_error = error.chain().find_map(|cause| {
        if let Some(SweepError::Run(error)) = cause.downcast_ref::<SweepError>() {
            return Some(error);
        }
        cause.downcast_ref::<RunError>().or_else(|| match cause.downcast_ref::<SessionError>() {
            Some(SessionError::Run(error) | SessionError::Snapshot(SnapshotError::Run(error))) => Some(error),
            _ => match cause.downcast_ref::<SnapshotError>() {
                Some(SnapshotError::Run(error)) => Some(error),
                _ => None,
            },
        })
    });
    let usage = error.is::<Usage>()
        || error.downcast_ref().is_some_and(super::sweep::is_usage)
        || matches!(error.downcast_ref(), Some(SessionError::Socket(_)))
        || matches!(error.downcast_ref(), Some(ClientError::NoSocket { .. } | ClientError::NobodyListens { .. }))
        || matches!(
            error.downcast_ref::<SnapshotError>(),
            Some(
                SnapshotError::Directory(_)
                    | SnapshotError::Container(_)
                    | SnapshotError::Memory(_)
                    | SnapshotError::Chain(_)
                    | SnapshotError::Paging(_)
            )
        )
        || matches!(error.downcast_ref(), Some(SessionError::Snapshot(SnapshotError::Directory(_))));
    match run_error {
        Some(error) if error.is_host() => HOST.into(),
        None if error.is::<HostCannot>() => HOST.into(),
        Some(error) if error.is_usage() => USAGE.into(),
        None if usage => USAGE.into(),
        _ => FAILED.into(),
    }
}

/// Says what is wrong with the command line, or the help that was asked for. Where words are very long, their middle is left
/// out.
pub fn refuse(error: &clap::Error) -> ExitCode {
    let said = error.render().to_string();
    if said.lines().any(|line| line.chars().count() > LINE_CHARS) && error.use_stderr() {
        for line in said.lines() {
            machine::say!("{}", printable(line, LINE_CHARS));
        }
    } else {
        // Nobody is there to be told that nobody listens.
        let _ = error.print();
    }
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(USAGE))
}

/// The error and its causes in one bounded line. Most errors tell their cause themselves: that is not said again.
pub fn one_line(error: &anyhow::Error) -> String {
    let mut line = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !line.contains(&cause) {
            line = format!("{line}: {cause}");
        }
    }
    printable(&line, LINE_CHARS)
}

/// The exit code for a guest's end. `raw` passes the debug-exit status through as QEMU does: `(code << 1) | 1`.
pub fn code_of_end(end: &End, raw: bool) -> ExitCode {
    match end {
        End::Guest(GuestExit::Debug(code)) if raw => {
            // A process's status has eight bits.
            ExitCode::from(u8::try_from((code << 1 | 1) & 0xff).unwrap_or(FAILED))
        }
        End::Guest(GuestExit::Debug(0) | GuestExit::Reset) => ExitCode::SUCCESS,
        _ => FAILED.into(),
    }
}
