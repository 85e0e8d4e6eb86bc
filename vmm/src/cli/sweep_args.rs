//! The grammar of `vmm sweep`.

use std::{ffi::OsStr, path::PathBuf, time::Duration};

use clap::{
    Arg, Args, Command, Subcommand, ValueEnum,
    builder::{PossibleValue, PossibleValuesParser, TypedValueParser},
};
use lab::{
    recipe::{HOST_STOP, Recipe, fault_names},
    sweep::{self, Edge, Ratio, result::Shard},
};
use machine::boot::cpuid_changes::CpuidChanges;
use vmtime::Khz;

use super::{
    args::{Deadline, Downtime, EmulateHost, OnOff, duration, khz, size},
    output::{CaseFiles, ReportFile},
    progress::Heartbeat,
    sites_args::{SitesFrom, sites_from},
};

/// Migrate a guest at every instruction of a stretch, and say what became of its ticks.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Sweep {
    #[command(subcommand)]
    pub command: Option<SweepCommand>,
    /// Guest image with trap sites; the embedded one by default. One without a tick ring is judged by its timer
    /// interrupts, compared with those of a run without migrations.
    #[arg(long, value_name = "FILE")]
    pub guest: Option<PathBuf>,
    /// Trap sites of a guest that lists none, such as Linux: auto finds them in its code, FILE has them from vmm sites.
    #[arg(long, value_name = "auto|FILE", value_parser = sites_from, requires = "guest")]
    pub sites: Option<SitesFrom>,
    /// Initial RAM disk.
    #[arg(long, value_name = "FILE", requires = "guest")]
    pub initrd: Option<PathBuf>,
    /// The guest's command line.
    #[arg(long, value_name = "STRING", default_value = "", allow_hyphen_values = true)]
    pub cmdline: String,
    /// Guest RAM.
    #[arg(long, value_name = "SIZE", default_value = "16M", value_parser = size)]
    pub memory: u64,
    /// Number of vCPUs.
    #[arg(long, value_name = "N", default_value = "1")]
    pub cpus: u32,
    /// What fixes the order of several vCPUs' turns, and the sample of --depth 2.
    #[arg(long, value_name = "N", default_value = "0")]
    pub seed: u64,
    /// Features that the guest's CPUID is not to have (-NAME), with all that needs them, or must have (+NAME), for
    /// example -smap,-invtsc. Names are those of /proc/cpuinfo.
    #[arg(long, value_name = "-NAME,+NAME,…", allow_hyphen_values = true)]
    pub cpuid: Option<CpuidChanges>,
    /// Whether the CPU offers x2APIC where the host can.
    #[arg(long, value_enum, value_name = "ON|OFF", default_value = "on")]
    pub x2apic: OnOff,
    /// Whether the guest has VMClock; the embedded one looks at it with vmclock=on.
    #[arg(long, value_enum, value_name = "ON|OFF", default_value = "off")]
    pub vmclock: OnOff,
    /// The guest's TSC frequency at boot, in kHz.
    #[arg(long, value_name = "KHZ", value_parser = khz, default_value = "2600000")]
    pub tsc_khz: Khz,
    /// Where the stretch begins: tick:N, where CPU 0 enters the handler of its Nth timer interrupt, or a function or
    /// an address, where it is first reached after tick:3.
    #[arg(long, value_name = "EDGE", default_value = "tick:3")]
    pub from: Edge,
    /// Where it ends; by default at the next timer interrupt.
    #[arg(long, value_name = "EDGE")]
    pub to: Option<Edge>,
    /// Which instruction boundaries are points: all, those after an exit to the VMM, or those after an RDTSC.
    #[arg(long, value_enum, value_name = "WHAT", default_value = "instruction")]
    pub every: Every,
    /// Frequencies to migrate to, as multiples of the present one; by default 0.5,2, and 1 for --inject host-stop and
    /// for a --recipe whose destination is kvm or same.
    #[arg(long, value_name = "RATIO,…", value_delimiter = ',')]
    pub ratio: Vec<Ratio>,
    /// What becomes of a deadline in flight.
    #[arg(long, value_enum, value_name = "POLICY", default_value = "rescale")]
    pub deadline: Deadline,
    /// Whether VM time counts the time that the VM was saved.
    #[arg(long, value_enum, value_name = "POLICY", default_value = "freeze")]
    pub downtime: Downtime,
    /// How long that was.
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, default_value = "0s")]
    pub downtime_length: Duration,
    /// Let every restore go wrong in this way.
    #[arg(long, value_name = "FAULT", value_parser = FaultParser)]
    pub inject: Option<Fault>,
    /// Save and restore by the steps of another VMM: one that is shipped, or a file; `list` says which there are.
    #[arg(long, value_name = "NAME|FILE", conflicts_with_all = ["inject", "deadline", "downtime", "downtime_length"])]
    pub recipe: Option<String>,
    /// Ticks that must come after the one in hand; by default 1, and 2 for clockevent=lapic-deadline, whose error is in
    /// what it arms after the migration, for scenario=watchdog, which checks the clocks after a tick, and for a guest
    /// without a tick ring.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1000))]
    pub ticks: Option<u64>,
    /// 2: migrate a second time, back to the first frequency, at another point before those ticks.
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u8).range(1..=2))]
    pub depth: u8,
    /// With --depth 2: about how many pairs of points to try, chosen by --seed.
    #[arg(long, value_name = "N", default_value = "2000", value_parser = clap::value_parser!(u64).range(1..))]
    pub samples: u64,
    /// How much later than usual a tick may be before it is late.
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, default_value = "10us")]
    pub tolerance: Duration,
    /// VM time to wait for a tick before it is lost; by default 30 periods.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub patience: Option<Duration>,
    /// Threads.
    #[arg(long, value_name = "N", default_value = "2", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub workers: u32,
    /// Try only part I of N of the points, for `vmm sweep merge`.
    #[arg(long, value_name = "I/N", value_parser = shard)]
    pub shard: Option<Shard>,
    /// Try only this point (with --depth 2: K,J), once, at --ratio or else the first default, and say what happened.
    #[arg(long, value_name = "K", value_delimiter = ',', conflicts_with = "shard")]
    pub point: Vec<u64>,
    /// With --point: write everything that happens to this file, one JSON object a line; - is standard output, instead
    /// of what happened.
    #[arg(long, value_name = "FILE", requires = "point")]
    pub trace: Option<PathBuf>,
    /// Pretend to be a host with this peculiarity, to test the way out of it.
    #[arg(long, value_enum, value_name = "PECULIARITY")]
    pub emulate_host: Option<EmulateHost>,
    #[command(flatten)]
    pub output: Output,
    #[command(flatten)]
    pub report: ReportFile,
    #[command(flatten)]
    pub cases: CaseFiles,
    #[command(flatten)]
    pub heartbeat: Heartbeat,
}

/// Flag for the result.
#[derive(Debug, Args)]
pub struct Output {
    /// Write the result as JSON to this file; - is standard output, instead of the table.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub enum SweepCommand {
    /// Put the JSON files of all shards of one sweep together.
    Merge {
        /// The files.
        #[arg(required = true)]
        files: Vec<PathBuf>,
        #[command(flatten)]
        output: Output,
        #[command(flatten)]
        report: ReportFile,
        #[command(flatten)]
        cases: CaseFiles,
    },
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Every {
    /// All.
    Instruction,
    /// Those after an exit to the VMM.
    Exit,
    /// Those after an RDTSC.
    Read,
}

impl From<Every> for sweep::Every {
    fn from(every: Every) -> Self {
        match every {
            Every::Instruction => Self::Instruction,
            Every::Exit => Self::Exit,
            Every::Read => Self::Read,
        }
    }
}

/// A fault of a restore.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// As it was written.
    pub name: String,
    /// Its recipe.
    pub recipe: Recipe,
}

impl Fault {
    /// The fault of this name; a stop of the host has its length after `=`.
    fn from_name(name: &str) -> Option<Self> {
        let host_stop = || {
            let (name, length) = name.split_once('=')?;
            let length = humantime::parse_duration(length).ok()?;
            let ns = u64::try_from(length.as_nanos()).ok()?;
            // At most an hour: the sweep waits for the ticks after it.
            let mut recipe =
                Recipe::fault(name).filter(|_| name == HOST_STOP && (1..=3_600_000_000_000).contains(&ns))?;
            recipe.hosts.downtime_ns = ns;
            Some(Self { name: format!("{HOST_STOP}={}", humantime::format_duration(length)), recipe })
        };
        let other = || {
            let recipe = Recipe::fault(name).filter(|_| name != HOST_STOP)?;
            Some(Self { name: name.to_owned(), recipe })
        };
        other().or_else(host_stop)
    }
}

/// Parses a fault's name.
#[derive(Clone)]
pub struct FaultParser;

impl TypedValueParser for FaultParser {
    type Value = Fault;

    fn parse_ref(&self, command: &Command, arg: Option<&Arg>, value: &OsStr) -> Result<Fault, clap::Error> {
        if let Some(fault) = value.to_str().and_then(Fault::from_name) {
            return Ok(fault);
        }
        // This error names the argument, its value and the possible values.
        PossibleValuesParser::new(possible_faults()).parse_ref(command, arg, value)?;
        Err(clap::Error::raw(
            clap::error::ErrorKind::ValueValidation,
            format!("--inject {}: write host-stop=LENGTH, with a LENGTH of 1ns to 1h\n", value.display()),
        ))
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        Some(Box::new(possible_faults().into_iter()))
    }
}

fn possible_faults() -> Vec<PossibleValue> {
    let written = |name| if name == HOST_STOP { "host-stop=LENGTH" } else { name };
    let about = |name| Recipe::fault(name).map(|fault| fault.about).unwrap_or_default();
    fault_names().chain([HOST_STOP]).map(|name| PossibleValue::new(written(name)).help(about(name))).collect()
}

fn shard(text: &str) -> Result<Shard, String> {
    let numbers = text.split_once('/').and_then(|(index, count)| Some((index.parse().ok()?, count.parse().ok()?)));
    match numbers {
        Some((index, count)) if (1..=count).contains(&index) => Ok(Shard { index, count }),
        _ => Err("not a shard like 2/5".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Catches: a fault that cannot be given, or a stop without an end.
    #[test]
    fn names_of_faults_lead_back() {
        for name in fault_names() {
            assert_eq!(Fault::from_name(name).unwrap().name, name);
        }
        let stop = Fault::from_name("host-stop=1500ms").unwrap();
        assert_eq!((stop.name.as_str(), stop.recipe.hosts.downtime_ns), ("host-stop=1s 500ms", 1_500_000_000));
        for bad in ["none", "host-stop", "host-stop=", "host-stop=0s", "host-stop=2h", "tsc-jump=1s", "qemu"] {
            assert_eq!(Fault::from_name(bad), None, "{bad}");
        }
    }
}
