//! `vmm doctor`.

use std::process::ExitCode;

use lab::report::cases::Suite;
use machine::{blame::Blame, doctor};

use super::{
    conformance,
    doctor_args::Doctor,
    exit::{Error, Result},
    text::Text,
};

pub fn run(args: &Doctor) -> Result<ExitCode> {
    if !args.compare.is_empty() {
        conformance::compare(&args.compare)?.print()?;
    } else if args.conformance {
        let report = match doctor::conformance::examine().map_err(Error::from) {
            // A machine that counts failures finds a result, not silence.
            Err(error) if args.ktap && error.blame() == Blame::Host => {
                Text::from(Suite::cannot("vmm doctor --conformance", &error.one_line()).ktap()).print()?;
                return Err(error);
            }
            examined => examined?,
        };
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
