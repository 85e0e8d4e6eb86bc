//! The grammar of `vmm study`.

use clap::{Args, Subcommand, ValueEnum};
use lab::study::{horizon, rebase};
use vmtime::Khz;

use super::{args::khz, output::ReportFile, sweep_args::Output};

/// Study every clockevent of the embedded guest: precision and cost of its arithmetic, every policy, every fault.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Study {
    #[command(subcommand)]
    pub command: Option<StudyCommand>,
    /// What to study; all by default.
    #[arg(value_enum)]
    pub parts: Vec<StudyPart>,
    /// Threads.
    #[arg(long, value_name = "N", default_value = "2", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub workers: u32,
    #[command(flatten)]
    pub output: Output,
    #[command(flatten)]
    pub report: ReportFile,
}

#[derive(Debug, Subcommand)]
pub enum StudyCommand {
    /// How precise a kvmclock page with a new base can be, by TSC frequency and tsc_shift: counted exactly.
    Rebase(Rebase),
    /// How far each formula for the same clock drifts in a month of VM time: computed exactly.
    Horizon(Horizon),
}

#[derive(Debug, Args)]
pub struct Rebase {
    /// TSC frequencies in kHz; by default those of the KVM selftest pvclock_test, and some of real hosts.
    #[arg(long, value_name = "KHZ,…", value_delimiter = ',', value_parser = khz)]
    pub tsc_khz: Vec<Khz>,
    /// The page's tsc_shift; by default the one that KVM chooses and, if that is negative, those up to 0.
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub shift: Option<i8>,
    /// For a base that is chosen: among how many ticks.
    #[arg(long, value_name = "TICKS", default_value_t = rebase::LOOK_BACK_TICKS,
          value_parser = clap::value_parser!(u32).range(1..=i64::from(rebase::MOST_LOOK_BACK_TICKS)))]
    pub look_back: u32,
    #[command(flatten)]
    pub output: Output,
}

#[derive(Debug, Args)]
pub struct Horizon {
    /// Formulas; all by default.
    #[arg(long, value_name = "NAME,…", value_delimiter = ',')]
    pub formula: Vec<String>,
    /// TSC frequencies in kHz; by default four of real hosts.
    #[arg(long, value_name = "KHZ,…", value_delimiter = ',', value_parser = khz)]
    pub tsc_khz: Vec<Khz>,
    /// The host's TSC frequency in kHz, for formulas about a scaled TSC; by default 3 GHz.
    #[arg(long, value_name = "KHZ", value_parser = khz)]
    pub host_khz: Option<Khz>,
    /// VM time, in days.
    #[arg(long, value_name = "N", default_value_t = horizon::DAYS)]
    pub days: u32,
    #[command(flatten)]
    pub output: Output,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum StudyPart {
    /// Precision and cost of the conversions.
    Arithmetic,
    /// Every clockevent, deadline policy and ratio, at every instruction of a tick.
    Matrix,
    /// Every fault of a restore.
    Faults,
}
