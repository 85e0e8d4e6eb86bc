//! `vmm doctor`.

use std::process::ExitCode;

use machine::doctor;

use super::{args::Doctor, exit::Result, text::Text};

pub fn run(args: &Doctor) -> Result<ExitCode> {
    let report = doctor::examine(args.emulate_host.map(Into::into))?;
    if args.json {
        Text::json(&report)?.print()?;
    } else {
        Text::from(doctor::text::render(&report)).print()?;
    }
    Ok(ExitCode::SUCCESS)
}
