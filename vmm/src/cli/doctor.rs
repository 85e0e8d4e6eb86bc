//! `vmm doctor`.

use std::process::ExitCode;

use anyhow::Result;
use vmm::doctor;

use super::args::Doctor;

pub fn run(args: &Doctor) -> Result<ExitCode> {
    let report = doctor::examine(args.emulate_host.map(Into::into))?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{}", doctor::text::render(&report));
    }
    Ok(ExitCode::SUCCESS)
}
