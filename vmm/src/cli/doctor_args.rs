//! The command line of `vmm doctor`.

use std::path::PathBuf;

use clap::Args;

use super::{args::EmulateHost, exit::Codes};

/// Find out what this host does, and what vmm will do about it.
#[derive(Debug, Args)]
pub struct Doctor {
    /// Compare this host's KVM with its documentation, check by check.
    #[arg(long)]
    pub conformance: bool,
    /// As JSON.
    #[arg(long)]
    pub json: bool,
    /// As KTAP, the kernel's test format.
    #[arg(long, requires = "conformance", conflicts_with = "json")]
    pub ktap: bool,
    /// A table of reports that `--conformance --json` wrote on several hosts.
    #[arg(long, value_name = "FILE", num_args = 1.., conflicts_with_all = ["conformance", "json", "ktap", "emulate_host"])]
    pub compare: Vec<PathBuf>,
    /// Pretend to be a host with this peculiarity.
    #[arg(long, value_enum, value_name = "PECULIARITY", conflicts_with = "conformance")]
    pub emulate_host: Option<EmulateHost>,
    /// Whose exit codes to end with.
    #[arg(long, value_enum, value_name = "WHOSE", default_value = "vmm")]
    pub exit_codes: Codes,
}
