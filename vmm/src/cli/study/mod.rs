//! `vmm study`.

mod tables;

use std::{
    io::{self, IsTerminal},
    process::ExitCode,
};

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};
use vmm::{
    run::HostEnvironment,
    study::{self, SCHEMA, Study as Studied},
};

use super::{
    sweep::{CANCEL, wait_for_signals},
    sweep_args::{Study, StudyPart},
};

/// `vmm study`.
pub fn run(args: &Study) -> Result<ExitCode> {
    let wanted = |part: StudyPart| args.parts.is_empty() || args.parts.contains(&part);
    let output = args.output.open()?;
    wait_for_signals()?;
    let env = HostEnvironment::open(None)?;
    let spinner = if io::stderr().is_terminal() { ProgressBar::new_spinner() } else { ProgressBar::hidden() };
    spinner.set_style(
        ProgressStyle::with_template("{spinner} {msg}, {elapsed}").unwrap_or_else(|_| ProgressStyle::default_spinner()),
    );
    let mut told = |what: &str| {
        if spinner.is_hidden() {
            eprintln!("vmm: {what}");
        }
        spinner.set_message(what.to_owned());
        spinner.tick();
    };
    let mut studied = Studied { schema: SCHEMA.to_owned(), arithmetic: None, matrix: None, faults: None };
    if wanted(StudyPart::Arithmetic) {
        told("arithmetic");
        studied.arithmetic = Some(study::arithmetic::study(&env, &CANCEL)?);
    }
    if wanted(StudyPart::Matrix) {
        let rows = study::matrix::sweep(&env, args.workers, &CANCEL, &mut told)?;
        studied.matrix = Some(rows.into_iter().map(|(row, _)| row).collect());
    }
    if wanted(StudyPart::Faults) {
        studied.faults = Some(study::faults::sweep(&env, args.workers, &CANCEL, &mut told)?);
    }
    spinner.finish_and_clear();
    output.write(&studied, || tables::print(&studied))?;
    Ok(ExitCode::SUCCESS)
}
