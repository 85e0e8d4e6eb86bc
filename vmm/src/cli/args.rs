//! The grammar of the command line. Doc comments here are the help texts.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand};
use machine::{
    audit::checks::{BadCheck, Checks},
    boot::cpuid_changes::CpuidChanges,
    live::Address,
};
use vmtime::Khz;

pub use super::choices::{
    Acpi, ConsoleFull, Deadline, DebugExitStatus, Downtime, EmulateHost, Lapic, OnOff, Time, Tsc, Verify,
};
use super::{
    commands::HELP_WIDTH,
    output::{CaseFiles, ReportFile},
    progress::Heartbeat,
    sites_args::{SitesFrom, sites_from},
};

/// Shows what live migration does to a guest's clock and timers.
///
/// Without --guest it runs the demonstration: the embedded guest migrates to slower and faster TSCs with every kind of
/// timer, and a table says what happened to every tick.
#[derive(Debug, Parser)]
#[command(version, args_conflicts_with_subcommands = true, max_term_width = HELP_WIDTH)]
pub struct Cli {
    #[command(flatten)]
    pub run: Run,
}

#[derive(Debug, Args)]
pub struct Run {
    /// Guest image: an ELF kernel with a PVH entry point, a Multiboot 1 kernel or a Linux bzImage.
    #[arg(long, value_name = "FILE")]
    pub guest: Option<PathBuf>,
    /// The guest's command line.
    #[arg(long, value_name = "STRING", requires = "guest", allow_hyphen_values = true)]
    pub cmdline: Option<String>,
    /// Trap sites of a guest that lists none, such as Linux, for --time virtual and --tsc trapped: auto finds them in
    /// its code, FILE has them from vmm sites.
    #[arg(long, value_name = "auto|FILE", value_parser = sites_from, requires = "guest")]
    pub sites: Option<SitesFrom>,
    /// Initial RAM disk; for a Multiboot kernel its one module.
    #[arg(long, value_name = "FILE", requires = "guest")]
    pub initrd: Option<PathBuf>,
    /// Guest RAM, for example 64M or 1G.
    #[arg(long, value_name = "SIZE", default_value = "128M", value_parser = size, requires = "guest")]
    pub memory: u64,
    /// Number of vCPUs.
    #[arg(long, value_name = "N", default_value = "1", requires = "guest")]
    pub cpus: u32,
    /// Virtual time with several vCPUs: what fixes the order of their turns.
    #[arg(long, value_name = "N", default_value = "0", requires = "guest")]
    pub seed: u64,
    /// Who has the local APICs: vmm, or KVM with its own kvmclock, as in other VMMs. With kvm the TSC is the host's, or
    /// scaled where that works.
    #[arg(long, value_enum, value_name = "WHO", default_value = "user", requires = "guest")]
    pub lapic: Lapic,
    /// How time passes for the guest; virtual needs a guest with trap sites. The demonstration's default is virtual, a
    /// guest's is real.
    #[arg(long, value_enum, value_name = "MODE")]
    pub time: Option<Time>,
    /// Features that the guest's CPUID is not to have (-NAME), with all that needs them, or must have (+NAME), for
    /// example -smap,-invtsc. Names are those of /proc/cpuinfo.
    #[arg(long, value_name = "-NAME,+NAME,…", allow_hyphen_values = true, requires = "guest")]
    pub cpuid: Option<CpuidChanges>,
    /// Whether the CPU offers x2APIC where the host can.
    #[arg(long, value_enum, value_name = "ON|OFF", default_value = "on", requires = "guest")]
    pub x2apic: OnOff,
    /// Whether the guest is offered to end interrupts without an exit (KVM's paravirtual EOI); not with KVM's local
    /// APICs.
    #[arg(long, value_enum, value_name = "ON|OFF", default_value = "on", requires = "guest")]
    pub pv_eoi: OnOff,
    /// Whether the guest has VMClock: a page from which it computes real time by its TSC. A marker in the page changes
    /// at every migration, restore and pause. The guest finds the page by CPUID or by ACPI.
    #[arg(long, value_enum, value_name = "ON|OFF", default_value = "off", requires = "guest")]
    pub vmclock: OnOff,
    /// Whether the guest has ACPI tables: CPUs, I/O APIC, reset, power-off, VMClock. auto: yes, except a guest with a
    /// tick ring, as the embedded one, that has no VMClock.
    #[arg(long, value_enum, value_name = "AUTO|ON|OFF", default_value = "auto", requires = "guest")]
    pub acpi: Acpi,
    /// The guest's TSC frequency in kHz; the host's by default.
    #[arg(long, value_name = "KHZ", value_parser = khz, requires = "guest")]
    pub tsc_khz: Option<Khz>,
    /// The demonstration's result as JSON on standard output.
    #[arg(long, conflicts_with = "guest")]
    pub json: bool,
    #[command(flatten)]
    pub session: Session,
}

/// What running a guest and restoring one have in common.
#[derive(Debug, Args)]
pub struct Session {
    /// Where the guest's RDTSC gets its value.
    #[arg(long, value_enum, value_name = "SOURCE", default_value = "auto")]
    pub tsc: Tsc,
    /// Control socket to create (mode 0600).
    #[arg(long, value_name = "PATH")]
    pub api_sock: Option<PathBuf>,
    /// Do not start the vCPUs until `vmm ctl … resume`.
    #[arg(long, requires = "api_sock")]
    pub paused: bool,
    /// Keep account of the pages that change, for `vmm ctl … snapshot --base`. A page's first change after each
    /// snapshot costs a little more.
    #[arg(long)]
    pub track_dirty: bool,
    /// Write what happens to this file, one JSON object a line; - is standard output.
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
    /// Write what the ticks came to as JSON to this file at the end; - is standard output.
    #[arg(long, value_name = "FILE")]
    pub summary: Option<PathBuf>,
    #[command(flatten)]
    pub report: ReportFile,
    /// What becomes of what the guest prints when nobody reads it and 1 MiB waits: the guest waits too, or it is
    /// dropped and counted.
    #[arg(long, value_enum, value_name = "HOW", default_value = "wait")]
    pub console_full: ConsoleFull,
    #[command(flatten)]
    pub cases: CaseFiles,
    #[command(flatten)]
    pub heartbeat: Heartbeat,
    /// What ends a run with exit code 1, and only that: late=TIME (a tick came later after its expiry), early (an
    /// interrupt came before it), lost (a tick did not come), clock (the guest's clock went back), accounts (what the
    /// guest says of a tick cannot be, by the host's account), watchdog (the guest's clocksource watchdog marked a
    /// clocksource unstable), stopped (a vCPU never cleared PVCLOCK_GUEST_STOPPED), wall=TIME (the guest's time
    /// of day differs by more from the host's), vmclock=TIME (UTC by VMClock differs by more from the
    /// host's, or the guest found VMClock wrong); or none. By default lost,clock,accounts.
    #[arg(long, value_name = "CHECK,…", value_parser = checks)]
    pub fail_on: Option<Checks>,
    /// Migrate within the process every so much VM time, for example 500ms.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub migrate_every: Option<Duration>,
    /// TSC frequencies in kHz for --migrate-every, in turn.
    #[arg(long, value_name = "KHZ,…", value_delimiter = ',', value_parser = khz, requires = "migrate_every")]
    pub tsc_khz_cycle: Vec<Khz>,
    /// What becomes of a deadline in flight when the TSC frequency changes.
    #[arg(long, value_enum, value_name = "POLICY", default_value = "rescale")]
    pub deadline: Deadline,
    /// Whether VM time counts the time that the VM was saved or paused.
    #[arg(long, value_enum, value_name = "POLICY", default_value = "freeze")]
    pub downtime: Downtime,
    /// How long the VM counts as having been saved, for catch-up, instead of measuring it by wall time. In virtual time
    /// nothing is measured, and the default is 0s.
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub downtime_length: Option<Duration>,
    /// Save the VM at this VM time into --save-to, and end.
    #[arg(long, value_name = "TIME", value_parser = duration, requires = "save_to")]
    pub save_at: Option<Duration>,
    /// Directory for --save-at.
    #[arg(long, value_name = "DIR", requires = "save_at")]
    pub save_to: Option<PathBuf>,
    /// Real time: how long a vCPU's thread may at most look at the TSC for a deadline that is near, in nanoseconds. How
    /// much of that it takes it learns; 8 % of all time is the most. 0 = always sleep, and be as late as the host's
    /// scheduler.
    #[arg(long, value_name = "NS", default_value = "200000", value_parser = clap::value_parser!(u64).range(..=10_000_000))]
    pub poll_ns: u64,
    /// Virtual time: end with exit code 1 a guest that runs for this long without an operation, which is what moves
    /// virtual time. CPU time, and twice as long at most; off = never.
    #[arg(long, value_name = "TIME|off", default_value = "10s", value_parser = time_or_off)]
    pub spin_limit: TimeOrOff,
    /// End with exit code 1, telling where each vCPU is, if the guest has not ended after this wall time.
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub timeout: Option<Duration>,
    /// Pretend to be a host with this peculiarity, to test the way out of it.
    #[arg(long, value_enum, value_name = "PECULIARITY")]
    pub emulate_host: Option<EmulateHost>,
    /// How the guest's debug-exit code becomes the exit status: 0 or 1, or raw as QEMU's (code << 1) | 1.
    #[arg(long, value_enum, value_name = "HOW", default_value = "map")]
    pub debug_exit_status: DebugExitStatus,
}

/// Go on with a saved VM, at another TSC frequency if wanted.
#[derive(Debug, Args)]
pub struct Restore {
    /// The snapshot's directory.
    pub dir: PathBuf,
    /// The guest's TSC frequency in kHz from now on; as saved by default.
    #[arg(long, value_name = "KHZ", value_parser = khz)]
    pub tsc_khz: Option<Khz>,
    /// How time passes; as saved by default.
    #[arg(long, value_enum, value_name = "MODE")]
    pub time: Option<Time>,
    /// When the saved memory is checked: all of it before the guest goes on, or each block before its first use. Damage
    /// ends the VM either way, and reaches no guest.
    #[arg(long, value_enum, value_name = "WHEN", default_value = "background")]
    pub verify: Verify,
    #[command(flatten)]
    pub session: Session,
}

/// Wait for a live migration from another VMM, and run its guest.
#[derive(Debug, Args)]
pub struct Receive {
    /// Where to wait: unix:PATH, a socket that only you can open, or tcp:HOST:PORT.
    #[arg(value_name = "ADDRESS")]
    pub at: Address,
    /// Allow tcp: no encryption, and anyone who can connect can send a guest.
    #[arg(long)]
    pub insecure: bool,
    /// The most guest RAM to take.
    #[arg(long, value_name = "SIZE", default_value = "16G", value_parser = size)]
    pub max_memory: u64,
    /// The guest's TSC frequency in kHz from now on; as it was by default.
    #[arg(long, value_name = "KHZ", value_parser = khz)]
    pub tsc_khz: Option<Khz>,
    /// How time passes; as before by default.
    #[arg(long, value_enum, value_name = "MODE")]
    pub time: Option<Time>,
    #[command(flatten)]
    pub session: Session,
}

/// Look at a saved VM.
#[derive(Debug, Args)]
pub struct Snapshot {
    #[command(subcommand)]
    pub command: SnapshotCommand,
}

#[derive(Debug, Subcommand)]
pub enum SnapshotCommand {
    /// Print what is in a snapshot.
    Show {
        /// The snapshot's directory.
        dir: PathBuf,
        /// All of it, as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Write a snapshot and all that it is based on as one that is based on none.
    Merge {
        /// The snapshot's directory.
        dir: PathBuf,
        /// The directory to create.
        out: PathBuf,
    },
}

fn checks(text: &str) -> Result<Checks, String> {
    text.parse().map_err(|error: BadCheck| error.to_string())
}

pub fn size(text: &str) -> Result<u64, String> {
    parse_size::Config::new().with_binary().parse_size(text).map_err(|error| error.to_string())
}

pub fn khz(text: &str) -> Result<Khz, String> {
    let number: u64 = text.parse().map_err(|_| "not a whole number of kHz".to_owned())?;
    Khz::new(number).map_err(|error| error.to_string())
}

/// A time, or none for `off`.
#[derive(Clone, Copy, Debug)]
pub struct TimeOrOff(pub Option<Duration>);

pub fn time_or_off(text: &str) -> Result<TimeOrOff, String> {
    if text == "off" { Ok(TimeOrOff(None)) } else { duration(text).map(|limit| TimeOrOff(Some(limit))) }
}

pub fn duration(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(length) if length.is_zero() => Err("must be more than zero".to_owned()),
        Ok(length) => Ok(length),
        Err(error) => Err(error.to_string()),
    }
}
