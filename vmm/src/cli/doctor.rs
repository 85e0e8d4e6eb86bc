//! `vmm doctor`.

use std::process::ExitCode;

use machine::doctor;

use super::{conformance, doctor_args::Doctor, exit::Result, text::Text};

pub fn run(args: &Doctor) -> Result<ExitCode> {
    if !args.compare.is_empty() {
        conformance::compare(&args.compare)?.print()?;
    } else if args.conformance {
        let report = doctor::conformance::examine()?;
        match (args.json, args.ktap) {
            (true, _) => Text::json(&report)?,
            (false, true) => Text::from(report.ktap()),
            (false, false) => Text::from(report.text()),
        }
        .print()?;
    } else {
        let report = doctor::examine(args.emulate_host.map(Into::into))?;
        match args.json {
            true => Text::json(&report)?,
            false => Text::from(doctor::text::render(&report)),
        }
        .print()?;
    }
    Ok(ExitCode::SUCCESS)
}
