//! `vmm ctl`.

use std::{
    path::{self, PathBuf},
    process::ExitCode,
};

use machine::control::{self, Command, api};

use super::{
    ctl_args::{Ctl, CtlCommand},
    exit::{OrFailed, Result},
    text::Text,
};

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
        CtlCommand::Migrate { tsc_khz, deadline, downtime } => Command::Migrate(api::Migrate {
            tsc_khz: *tsc_khz,
            deadline: (*deadline).into(),
            downtime: (*downtime).into(),
        }),
        CtlCommand::Quit => Command::Quit,
    };
    let answer = control::call(&args.api_sock, &command)?;
    if !answer.is_null() {
        Text::json(&answer)?.print()?;
    }
    Ok(ExitCode::SUCCESS)
}
