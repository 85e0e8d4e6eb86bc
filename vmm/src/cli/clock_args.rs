//! The grammar of `vmm clock`.

use std::{path::PathBuf, time::Duration};

use clap::Args;
use lab::clock::checks::{BadCheck, Checks};
use vmtime::Khz;

use super::{
    args::{Deadline, Downtime, Lapic, Time, Tsc, duration, khz, size},
    output::ReportFile,
    progress::Heartbeat,
    sweep_args::{Fault, FaultParser, Output},
};

/// Stop a guest again and again, and measure what that does to its clock and timers.
#[derive(Debug, Args)]
pub struct Clock {
    /// Guest image; the embedded one by default.
    #[arg(long, value_name = "FILE")]
    pub guest: Option<PathBuf>,
    /// The guest's command line. By default the embedded guest makes 100 ticks a second without end.
    #[arg(long, value_name = "STRING", allow_hyphen_values = true)]
    pub cmdline: Option<String>,
    /// Guest RAM.
    #[arg(long, value_name = "SIZE", default_value = "16M", value_parser = size)]
    pub memory: u64,
    /// Number of vCPUs.
    #[arg(long, value_name = "N", default_value = "1")]
    pub cpus: u32,
    /// Virtual time with several vCPUs: what fixes the order of their turns.
    #[arg(long, value_name = "N", default_value = "0")]
    pub seed: u64,
    /// Who has the local APICs and kvmclock.
    #[arg(long, value_enum, value_name = "WHO", default_value = "user")]
    pub lapic: Lapic,
    /// How time passes for the guest.
    #[arg(long, value_enum, value_name = "MODE", default_value = "real")]
    pub time: Time,
    /// Where the guest's RDTSC gets its value.
    #[arg(long, value_enum, value_name = "SOURCE", default_value = "auto")]
    pub tsc: Tsc,
    /// The guest's TSC frequency at boot, in kHz; the host's by default.
    #[arg(long, value_name = "KHZ", value_parser = khz)]
    pub tsc_khz: Option<Khz>,
    /// The TSC frequencies with which it continues after the stops, in turn; by default it does not change.
    #[arg(long, value_name = "KHZ,…", value_delimiter = ',', value_parser = khz)]
    pub tsc_khz_cycle: Vec<Khz>,
    /// Migrate it so often within the process; 100 times if neither this nor --pauses nor --gaps is
    /// given.
    #[arg(long, value_name = "N", value_parser = stops)]
    pub migrations: Option<u64>,
    /// Migrate without building the virtual machine anew. The guest sees the same, and a million migrations take
    /// minutes.
    #[arg(long, conflicts_with = "pauses")]
    pub in_place: bool,
    /// Pause it and let it continue so often.
    #[arg(long, value_name = "N", value_parser = stops, conflicts_with = "migrations")]
    pub pauses: Option<u64>,
    /// How long a pause is. In virtual time nothing waits.
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "50ms")]
    pub pause_length: Duration,
    /// Stop the whole process this many times with SIGSTOP while the guest runs, as `kill -STOP` does. No pause is
    /// requested: the VMM finds the gap afterwards, or misses it. Real time only.
    #[arg(long, value_name = "N", value_parser = stops, conflicts_with_all = [
        "migrations", "pauses", "in_place", "tsc_khz_cycle", "downtime_length", "inject",
    ])]
    pub gaps: Option<u64>,
    /// How long after SIGSTOP the process gets SIGCONT. The VMM finds every gap longer than about
    /// 600ms, and none of 500ms or less.
    #[arg(long, value_name = "TIME", value_parser = gap_length, default_value = "1s", requires = "gaps")]
    pub gap_length: Duration,
    /// VM time from one stop to the next.
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "10ms")]
    pub every: Duration,
    /// What becomes of a deadline in flight.
    #[arg(long, value_enum, value_name = "POLICY", default_value = "rescale")]
    pub deadline: Deadline,
    /// Whether VM time counts the time that the guest is stopped.
    #[arg(long, value_enum, value_name = "POLICY", default_value = "freeze")]
    pub downtime: Downtime,
    /// How long it counts as stopped, instead of measuring that.
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub downtime_length: Option<Duration>,
    /// Let each resume have a fault, to see that it is found.
    #[arg(long, value_name = "FAULT", value_parser = FaultParser)]
    pub inject: Option<Fault>,
    /// What ends it with exit code 1: back (the guest's clock went back at a stop), missed (the VMM did not find a
    /// gap), drift=TIME (the mean error of a stop is larger, either way), total=TIME (their sum is), worst=TIME (one
    /// is), deadline=TIME (a deadline was shifted farther), rate=TIME (between the stops the pages gained or lost more,
    /// in all, against ticks over frequency); or none. TIME may be a fraction, such as 0.05ns.
    #[arg(long, value_name = "CHECK,…", value_parser = checks, default_value = "back")]
    pub fail_on: Checks,
    #[command(flatten)]
    pub heartbeat: Heartbeat,
    #[command(flatten)]
    pub output: Output,
    #[command(flatten)]
    pub report: ReportFile,
}

fn stops(text: &str) -> Result<u64, String> {
    const MOST: u64 = 10_000_000;
    match text.parse() {
        Ok(count @ 1..=MOST) => Ok(count),
        _ => Err(format!("not a number from 1 to {MOST}")),
    }
}

fn gap_length(text: &str) -> Result<Duration, String> {
    const LEAST: Duration = Duration::from_millis(1);
    const MOST: Duration = Duration::from_secs(3600);
    let length = duration(text)?;
    if (LEAST..=MOST).contains(&length) { Ok(length) } else { Err("not a time from 1ms to 1h".to_owned()) }
}

fn checks(text: &str) -> Result<Checks, String> {
    text.parse().map_err(|error: BadCheck| error.to_string())
}
