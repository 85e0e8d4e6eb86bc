//! The grammar of `vmm check`.

use std::{path::PathBuf, time::Duration};

use clap::{Args, ValueEnum};
use machine::boot::cpuid_changes::CpuidChanges;
use vmtime::Khz;

use super::{
    args::{Deadline, Downtime, Time, TimeOrOff, Tsc, duration, khz, size, time_or_off},
    output::CaseFiles,
    progress::Heartbeat,
    sites_args::{SitesFrom, sites_from},
    sweep_args::{Fault, FaultParser, Output},
};

/// Migrate a guest some times, and judge its timer and clock without any record of its own.
///
/// After each migration the deadlines that the guest arms are compared with those that a copy arms which was not
/// migrated. vmm also judges the deadlines in flight, the timer's interrupts and the kvmclock pages, and of Linux the
/// console.
#[derive(Debug, Args)]
pub struct Check {
    /// Guest image; the embedded one by default.
    #[arg(long, value_name = "FILE")]
    pub guest: Option<PathBuf>,
    /// The guest's command line. By default the embedded guest makes 100 ticks a second without end.
    #[arg(long, value_name = "STRING", allow_hyphen_values = true)]
    pub cmdline: Option<String>,
    /// What kind of guest it is. linux: its command line gets console=ttyS0 and panic=-1 unless it has such, and vdso=0
    /// in virtual time; its console is searched for what its watchdogs say and for the lines of docs/linux/init.c; and
    /// it goes on after the last migration until it ends.
    #[arg(long, value_enum, value_name = "KIND", default_value = "bare")]
    pub profile: Profile,
    /// Trap sites of a guest that lists none: auto finds them in its code, FILE has them from vmm sites. By default
    /// auto, if they are needed.
    #[arg(long, value_name = "auto|FILE", value_parser = sites_from, requires = "guest")]
    pub sites: Option<SitesFrom>,
    /// Initial RAM disk.
    #[arg(long, value_name = "FILE", requires = "guest")]
    pub initrd: Option<PathBuf>,
    /// Guest RAM.
    #[arg(long, value_name = "SIZE", default_value = "128M", value_parser = size)]
    pub memory: u64,
    /// Number of vCPUs.
    #[arg(long, value_name = "N", default_value = "1")]
    pub cpus: u32,
    /// Virtual time with several vCPUs: what fixes the order of their turns.
    #[arg(long, value_name = "N", default_value = "0")]
    pub seed: u64,
    /// Features that the guest's CPUID is not to have (-NAME), with all that needs them, or must have (+NAME), for
    /// example -smap,-invtsc. Names are those of /proc/cpuinfo.
    #[arg(long, value_name = "-NAME,+NAME,…", allow_hyphen_values = true)]
    pub cpuid: Option<CpuidChanges>,
    /// How time passes for the guest.
    #[arg(long, value_enum, value_name = "MODE", default_value = "virtual")]
    pub time: Time,
    /// Where the guest's RDTSC gets its value.
    #[arg(long, value_enum, value_name = "SOURCE", default_value = "auto")]
    pub tsc: Tsc,
    /// The guest's TSC frequency at boot, in kHz; the host's by default.
    #[arg(long, value_name = "KHZ", value_parser = khz)]
    pub tsc_khz: Option<Khz>,
    /// What the console must show before the first migration. By default the guest must have had ten interrupts of a
    /// LAPIC timer.
    #[arg(long, value_name = "TEXT")]
    pub wait_for: Option<String>,
    /// VM time within which that must have come.
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "60s")]
    pub within: Duration,
    /// How often it is migrated.
    #[arg(long, value_name = "N", default_value = "4", value_parser = clap::value_parser!(u64).range(1..=10_000))]
    pub migrations: u64,
    /// VM time before the first migration, from one to the next, and after the last.
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "500ms")]
    pub migrate_every: Duration,
    /// The TSC frequencies after the migrations, in turn. By default half of that at boot, that, twice that, and that.
    #[arg(long, value_name = "KHZ,…", value_delimiter = ',', value_parser = khz)]
    pub tsc_khz_cycle: Vec<Khz>,
    /// What becomes of a deadline in flight.
    #[arg(long, value_enum, value_name = "POLICY", default_value = "rescale")]
    pub deadline: Deadline,
    /// Whether VM time counts the time that the VM was saved.
    #[arg(long, value_enum, value_name = "POLICY", default_value = "freeze")]
    pub downtime: Downtime,
    /// How long that was, instead of measuring it.
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub downtime_length: Option<Duration>,
    /// Let every restore go wrong in this way.
    #[arg(long, value_name = "FAULT", value_parser = FaultParser)]
    pub inject: Option<Fault>,
    /// An interrupt that comes later than this after its deadline, or a program that wakes up so late, fails a check.
    /// By default 1ms in virtual time; off in real time, where the host can be to blame.
    #[arg(long, value_name = "TIME|off", value_parser = time_or_off)]
    pub late: Option<TimeOrOff>,
    /// VM time that the guest has to end, after the last migration; 0s: it need not. By default 60s for linux, else 0s.
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub end_within: Option<Duration>,
    /// Write what the guest prints to this file.
    #[arg(long, value_name = "FILE")]
    pub console: Option<PathBuf>,
    /// Virtual time: end with exit code 1 a guest that runs for this long without an operation, which is what moves
    /// virtual time. CPU time, and twice as long at most; off = never.
    #[arg(long, value_name = "TIME|off", default_value = "10s", value_parser = time_or_off)]
    pub spin_limit: TimeOrOff,
    #[command(flatten)]
    pub output: Output,
    #[command(flatten)]
    pub cases: CaseFiles,
    #[command(flatten)]
    pub heartbeat: Heartbeat,
}

/// What kind of guest it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Profile {
    /// Any: its timer and its kvmclock pages are judged.
    Bare,
    /// Linux: its console is, too.
    Linux,
}
