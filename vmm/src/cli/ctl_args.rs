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
    /// Save and restore within the VMM, at another TSC frequency if wanted; or move to another VMM while the guest
    /// runs.
    Migrate {
        /// Where another VMM waits (vmm receive): unix:PATH or tcp:HOST:PORT. Frequency and policies are then its.
        to: Option<Address>,
        /// How long the guest may be stopped to send the rest of its memory; 10ms by default. If it writes too fast for
        /// that, it goes on here.
        #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, requires = "to")]
        max_downtime: Option<Duration>,
        /// Guest memory may go over TCP, without encryption and to whoever is there.
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
