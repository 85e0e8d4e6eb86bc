//! The program behind `scripts/bench`, which builds everything first.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, Result};
use bench::{growth, lab::Lab, page, programs::Programs, row::Row, rows, suite, table};
use clap::Parser;
use serde::Serialize;

/// Measures vmm beside a bare-KVM floor, KVM's own LAPIC and the VMMs that are installed, and says which targets it
/// meets. Exit code: 0 all of them, 1 one is missed, 2 usage, 3 this host lacks something.
///
/// QEMU, Firecracker and Cloud Hypervisor take part if they are on PATH, or named by BENCH_QEMU, BENCH_FIRECRACKER,
/// BENCH_CLOUD_HYPERVISOR.
#[derive(Debug, Parser)]
#[command(name = "scripts/bench", max_term_width = 110)]
struct Args {
    /// Measure this row only; may be given more than once.
    #[arg(long, value_name = "ROW", value_parser = row)]
    only: Vec<String>,
    /// How often to measure everything; a target is met when each run meets it.
    #[arg(long, value_name = "N", default_value = "3", value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Fewer and shorter measurements: to see that they work, not to believe them.
    #[arg(long)]
    quick: bool,
    /// Write every sample, and what the machine is, to this file as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the table into this page, between its marks: docs/performance.md.
    #[arg(long, value_name = "FILE")]
    docs: Option<PathBuf>,
    /// Measure how costs grow instead, and write plots (SVG) and their numbers (growth.json) into this directory.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["only", "runs", "json", "docs"])]
    growth: Option<PathBuf>,
}

fn row(name: &str) -> Result<String, String> {
    if rows::ALL.iter().any(|row| row.id == name) {
        return Ok(name.to_owned());
    }
    let all: Vec<&str> = rows::ALL.iter().map(|row| row.id).collect();
    Err(format!("no such row; there are {}", all.join(" ")))
}

fn main() -> ExitCode {
    let args = Args::parse();
    if let Err(error) = File::options().read(true).write(true).open("/dev/kvm") {
        eprintln!("bench: /dev/kvm: {error}: a benchmark needs a readable and writable one");
        return ExitCode::from(3);
    }
    let done = match &args.growth {
        Some(dir) => grow(&args, dir).map(|()| true),
        None => measure(&args),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::from(3)
        }
    }
}

fn measure(args: &Args) -> Result<bool> {
    let lab = Lab::new(Programs::find()?, args.quick)?;
    let rows: Vec<Row> =
        rows::ALL.into_iter().filter(|row| args.only.is_empty() || args.only.iter().any(|id| id == row.id)).collect();
    let results = suite::run(&lab, &rows, args.runs, |line| eprintln!("{line}"))?;
    println!("{}", table::text(&results));
    print!("{}", page::host(&results));
    if let Some(file) = &args.docs {
        let name = || format!("--docs {}", file.display());
        let text = fs::read_to_string(file).with_context(name)?;
        fs::write(file, page::rewrite(&text, &results).with_context(name)?).with_context(name)?;
    }
    if let Some(file) = &args.json {
        write_json(file, &results).with_context(|| format!("--json {}", file.display()))?;
    }
    Ok(results.met())
}

/// Measures growth. A measurement that cannot be made is printed as missing, and is no failure.
fn grow(args: &Args, dir: &Path) -> Result<()> {
    let lab = Lab::new(Programs::find()?, args.quick)?;
    let name = || format!("--growth {}", dir.display());
    fs::create_dir_all(dir).with_context(name)?;
    let growth = growth::run(&lab, |line| eprintln!("{line}"))?;
    for plot in &growth.plots {
        fs::write(dir.join(format!("{}.svg", plot.id)), growth::draw(plot)?).with_context(name)?;
        let last = plot.growth().into_iter().map(|(who, times)| format!("{who} ×{times:.2}"));
        println!(
            "{}, from {} to {}: {}",
            plot.title,
            first(&plot.steps),
            end(&plot.steps),
            last.collect::<Vec<_>>().join(", ")
        );
    }
    for (what, why) in &growth.missing {
        println!("{what}: not measured: {why}");
    }
    write_json(&dir.join("growth.json"), &growth).with_context(name)
}

fn first(steps: &[String]) -> &str {
    steps.first().map_or("", String::as_str)
}

fn end(steps: &[String]) -> &str {
    steps.last().map_or("", String::as_str)
}

fn write_json(file: &Path, results: &impl Serialize) -> Result<()> {
    let mut text = serde_json::to_vec_pretty(results)?;
    text.push(b'\n');
    Ok(fs::write(file, text)?)
}
