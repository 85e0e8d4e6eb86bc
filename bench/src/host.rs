//! Describes the machine that the measurements were made on.

use std::{fs, path::Path};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{lab::Lab, process, programs::version};

/// The facts about a machine that its numbers depend on.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct HostDescription {
    /// The CPU's model name.
    pub cpu: String,
    /// Number of CPUs.
    pub cpus: usize,
    /// RAM, in bytes.
    pub memory: u64,
    /// The kernel's release.
    pub kernel: String,
    /// KVM's modules, if the kernel lists them.
    pub kvm_modules: Vec<String>,
    /// The host TSC's frequency in kHz.
    pub tsc_khz: u64,
    /// Whether KVM emulates supervisor code, and the time per emulated instruction, in ns.
    pub supervisor: String,
    /// Round trip from the guest to the VMM, in ns.
    pub exit_ns: u64,
    /// The frequency governor of CPU 0, if there is one.
    pub governor: Option<String>,
    /// The file system that snapshots are written to.
    pub file_system: String,
    /// Versions of the programs that take part.
    pub versions: Vec<String>,
}

impl HostDescription {
    /// Describes this machine.
    ///
    /// # Errors
    /// If `vmm doctor` fails or lacks a fact.
    pub fn describe(lab: &Lab) -> Result<Self> {
        let said = process::succeed(&mut lab.vmm("doctor --json"))?;
        let doctor: Value = serde_json::from_str(&said.stdout).context("vmm doctor --json")?;
        let whole = |name: &str| doctor.pointer(name).and_then(Value::as_u64).with_context(|| format!("no {name}"));
        let emulated = doctor.pointer("/supervisor_emulated").and_then(Value::as_bool).unwrap_or_default();
        let instruction = doctor.pointer("/supervisor_instruction_ns").and_then(Value::as_f64).unwrap_or_default();
        let modules = doctor.pointer("/kvm_modules").and_then(Value::as_array).into_iter().flatten();
        let peers = lab.programs.peers.iter().map(|peer| peer.version());
        Ok(Self {
            cpu: field("/proc/cpuinfo", "model name").unwrap_or_else(|| "unknown".to_owned()),
            cpus: std::thread::available_parallelism().map_or(0, usize::from),
            memory: field("/proc/meminfo", "MemTotal").and_then(|text| kib(&text)).unwrap_or_default(),
            kernel: doctor.pointer("/kernel").and_then(Value::as_str).unwrap_or("unknown").to_owned(),
            kvm_modules: modules.filter_map(Value::as_str).map(str::to_owned).collect(),
            tsc_khz: whole("/host_tsc_khz")?,
            supervisor: format!(
                "{} ({instruction:.0} ns an instruction)",
                if emulated { "emulated" } else { "native" }
            ),
            exit_ns: whole("/exit_ns")?,
            governor: first_line("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
            file_system: file_system(lab.dir()).unwrap_or_else(|| "unknown".to_owned()),
            versions: [version(&lab.programs.vmm)].into_iter().chain(peers).collect(),
        })
    }
}

/// The load averages of 1, 5 and 15 minutes, as the kernel writes them.
#[must_use]
pub fn load() -> String {
    let text = first_line("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().take(3).collect::<Vec<_>>().join(" ")
}

fn first_line(path: &str) -> Option<String> {
    fs::read_to_string(path).ok()?.lines().next().map(str::to_owned)
}

/// The value of the first `name : value` of a file.
fn field(path: &str, name: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let line = text.lines().find(|line| line.starts_with(name))?;
    line.split_once(':').map(|(_, value)| value.trim().to_owned())
}

fn kib(text: &str) -> Option<u64> {
    text.strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
}

/// The type of the file system of `path`: that of the mount point that is its longest prefix.
fn file_system(path: &Path) -> Option<String> {
    let path = fs::canonicalize(path).ok()?;
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    let mounts = mounts.lines().filter_map(|line| {
        let mut words = line.split(' ').skip(1);
        Some((words.next()?.to_owned(), words.next()?.to_owned()))
    });
    mounts.filter(|(place, _)| path.starts_with(place)).max_by_key(|(place, _)| place.len()).map(|(_, kind)| kind)
}
