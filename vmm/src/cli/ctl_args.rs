//! The grammar of `vmm ctl`.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Subcommand};
use machine::live::Address;
use vmtime::Khz;

use super::args::{Deadline, Downtime, khz};

/// Talk to a running VM over its control socket.
#[derive(Debug, Args)]
pub struct Ctl {
    /// The VM's control socket.
    #[arg(long, value_name = "PATH")]
    pub api_sock: PathBuf,
    #[command(subcommand)]
    pub command: CtlCommand,
}

#[derive(Debug, Subcommand)]
pub enum CtlCommand {
    /// Tell how the VM is.
    Status,
    /// Stop the vCPUs.
    Pause,
    /// Let them run.
    Resume {
        /// What becomes of a deadline in flight; by default what the VM was started with.
        #[arg(long, value_enum, value_name = "POLICY")]
        deadline: Option<Deadline>,
        /// Whether VM time counts the time that the VM was paused; by default what the VM was started with.
        #[arg(long, value_enum, value_name = "POLICY")]
        downtime: Option<Downtime>,
    },
    /// Save the VM into a new directory.
    Snapshot {
        /// The directory.
        dir: PathBuf,
        /// Save only what differs from this snapshot: the VM's latest, or the one that it was restored from. Needs a VM
        /// with --track-dirty.
        #[arg(long, value_name = "DIR")]
        base: Option<PathBuf>,
        /// Leave the VM paused.
        #[arg(long)]
        stay_paused: bool,
    },
    /// Without an address: save and restore in the process, at another TSC frequency if wanted. With one: live
    /// migration to the VMM that waits there.
    Migrate {
        /// Where vmm receive waits: unix:PATH or tcp:HOST:PORT. TSC frequency and policies are given there, not here.
        #[arg(value_name = "ADDRESS")]
        to: Option<Address>,
        /// The longest stop for the rest of memory; 10ms by default. If that cannot be met, the guest keeps running
        /// here.
        #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, requires = "to")]
        max_downtime: Option<Duration>,
        /// Allow tcp: guest memory goes unencrypted to whoever listens there.
        #[arg(long, requires = "to")]
        insecure: bool,
        /// The frequency in kHz; the present one by default.
        #[arg(long, value_name = "KHZ", value_parser = khz, conflicts_with = "to")]
        tsc_khz: Option<Khz>,
        /// What becomes of a deadline in flight; rescale by default.
        #[arg(long, value_enum, value_name = "POLICY", conflicts_with = "to")]
        deadline: Option<Deadline>,
        /// Whether VM time counts the time that the VM was saved; freeze by default.
        #[arg(long, value_enum, value_name = "POLICY", conflicts_with = "to")]
        downtime: Option<Downtime>,
    },
    /// End the VM and its VMM.
    Quit,
}
