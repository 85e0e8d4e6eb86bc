//! `vmm study`.

mod horizon;
mod rebase;
mod tables;

use std::process::ExitCode;

use lab::{
    report,
    study::{self, SCHEMA, Study as Studied},
    sweep::SweepError,
};
use machine::HostEnvironment;
use serde::Serialize;
use vmtime::DeadlinePolicy;

use super::{
    exit::Result,
    output::{self, OutFile},
    study_args::{Study, StudyCommand, StudyPart},
    sweep::{CANCEL, wait_for_signals},
    sweep_args::Output,
    text::Text,
};

/// `vmm study`.
pub fn run(args: &Study) -> Result<ExitCode> {
    match &args.command {
        Some(StudyCommand::Rebase(args)) => {
            let studied = study::rebase::study(&args.tsc_khz, args.shift, args.look_back);
            write(&args.output, studied, rebase::text)
        }
        Some(StudyCommand::Horizon(args)) => {
            let studied = study::horizon::study(&args.formula, &args.tsc_khz, args.host_khz, args.days);
            write(&args.output, studied, horizon::text)
        }
        None => run_parts(args),
    }
}

/// Writes a study that is arithmetic only: as JSON to the file, and as text unless that file is standard output.
fn write<T: Serialize>(output: &Output, studied: Result<T, SweepError>, text: fn(&T) -> Text) -> Result<ExitCode> {
    let json = OutFile::open("json", output.json.as_deref())?;
    let quiet = json.as_ref().is_some_and(OutFile::is_stdout);
    let studied = studied?;
    if let Some(file) = json {
        file.write(&output::json(&studied)?)?;
    }
    if !quiet {
        text(&studied).print()?;
    }
    Ok(ExitCode::SUCCESS)
}

fn run_parts(args: &Study) -> Result<ExitCode> {
    let wanted = |part: StudyPart| args.parts.is_empty() || args.parts.contains(&part);
    output::distinct(&[("json", args.output.json.as_deref()), ("report", args.report.report.as_deref())])?;
    let json = OutFile::open("json", args.output.json.as_deref())?;
    let report = OutFile::open("report", args.report.report.as_deref())?;
    wait_for_signals()?;
    let env = HostEnvironment::open(None)?;
    let mut told = |what: &str| machine::say!("vmm: {what}");
    let mut sweeps = Vec::new();
    let mut studied = Studied { schema: SCHEMA.to_owned(), arithmetic: None, matrix: None, faults: None };
    if wanted(StudyPart::Arithmetic) {
        told("arithmetic");
        studied.arithmetic = Some(study::arithmetic::study(&env, &CANCEL)?);
    }
    if wanted(StudyPart::Matrix) {
        let rows = study::matrix::sweep(&env, args.workers, &CANCEL, &mut told)?;
        // Shown point by point is the policy that a host should have. The others are in the table only.
        let rescaled = rows.iter().filter(|(row, _)| row.deadline == DeadlinePolicy::Rescale && report.is_some());
        sweeps = rescaled.map(|(row, findings)| (format!("{}, rescale", row.clockevent), findings.clone())).collect();
        studied.matrix = Some(rows.into_iter().map(|(row, _)| row).collect());
    }
    if wanted(StudyPart::Faults) {
        studied.faults = Some(study::faults::sweep(&env, args.workers, &CANCEL, &mut told)?);
    }
    let quiet = [&json, &report].into_iter().flatten().any(OutFile::is_stdout);
    if let Some(file) = json {
        file.write(&output::json(&studied)?)?;
    }
    if let Some(file) = report {
        file.write(report::study::page(&studied, &sweeps, &output::command_line()).render().as_bytes())?;
    }
    if !quiet {
        tables::text(&studied).print()?;
    }
    Ok(ExitCode::SUCCESS)
}
