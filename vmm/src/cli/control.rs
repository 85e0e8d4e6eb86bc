//! `vmm ctl`.

use std::{
    path::{self, PathBuf},
    process::ExitCode,
};

use machine::{
    control::{self, Command, api},
    live::Address,
};

use super::{
    ctl_args::{Ctl, CtlCommand},
    exit::{OrFailed, Result},
    text::Text,
};

/// The VMM may have another working directory.
fn absolute_address(address: &Address) -> Result<Address> {
    Ok(match address {
        Address::Unix(path) => Address::Unix(path::absolute(path).or_failed(|| address.to_string())?),
        Address::Tcp(_) => address.clone(),
    })
}

pub fn ctl(args: &Ctl) -> Result<ExitCode> {
    let command = match &args.command {
        CtlCommand::Status => Command::Status,
        CtlCommand::Pause => Command::Pause,
        CtlCommand::Resume { deadline, downtime } => {
            Command::Resume(api::Resume { deadline: deadline.map(Into::into), downtime: downtime.map(Into::into) })
        }
        CtlCommand::Snapshot { dir, base, stay_paused } => {
            // The VMM may have another working directory.
            let absolute =
                |dir: &PathBuf| path::absolute(dir).or_failed(|| format!("snapshot directory {}", dir.display()));
            Command::Snapshot(api::Snapshot {
                dir: absolute(dir)?,
                base: base.as_ref().map(absolute).transpose()?,
                stay_paused: *stay_paused,
            })
        }
        CtlCommand::Migrate { to, max_downtime, insecure, tsc_khz, deadline, downtime } => {
            Command::Migrate(api::Migrate {
                to: to.as_ref().map(absolute_address).transpose()?,
                max_downtime_ms: max_downtime.map(|most| u64::try_from(most.as_millis()).unwrap_or(u64::MAX)),
                insecure: *insecure,
                tsc_khz: *tsc_khz,
                deadline: deadline.map(Into::into),
                downtime: downtime.map(Into::into),
            })
        }
        CtlCommand::Quit => Command::Quit,
    };
    let answer = control::call(&args.api_sock, &command)?;
    if !answer.is_null() {
        Text::json(&answer)?.print()?;
    }
    Ok(ExitCode::SUCCESS)
}
