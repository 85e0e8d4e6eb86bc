//! Restore recipes: a VMM's own steps of save and restore, as data.
//!
//! **What it is.** A recipe lists, in order, the ioctls by which a VMM saves a guest's clock and timer and restores
//! them, with the time that passes before each. `kvm.rs` is a model of what KVM does with each step; it decides about
//! the guest's TSC, kvmclock pages and timer deadlines. A sweep plays the recipe at each instruction in place of this
//! VMM's own restore, and the guest shows what it loses. `predict.rs` computes the loss from the delays alone, by a
//! formula.
//!
//! **What it is not.** It runs no other VMM, and it measures no delay: those are inputs. A host of KVM with its real
//! delays can be measured with that VMM; here the order is judged, at every instruction.
//!
//! **The error that counts** is how far the kvmclock page is ahead of the guest's TSC: of the page that a restore
//! without error gives for that TSC. The two are one clock for the guest before the restore, and must be one after it.

mod error;
mod kvm;
mod order;
mod own;
mod parse;
mod play;
mod predict;
mod schedule;
mod shipped;
mod source;
pub mod step;
#[cfg(test)]
mod tests;

use std::path::Path;

use machine::host::regular_file;

pub use error::RecipeError;
pub use play::Played;
pub use predict::predict;
pub use shipped::{fault_names, shipped};

use self::step::{Destination, Group};

/// The fault that is a stop of the host: its length is given with it.
pub const HOST_STOP: &str = "host-stop";

/// The fault that only a guest with VMClock can notice.
pub const VMCLOCK_KEPT: &str = "vmclock-kept";

/// Limit for a recipe file. The longest that is shipped has a twentieth of it.
const MAX_BYTES: u64 = 64 << 10;

/// A VMM's steps of save and restore.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recipe {
    /// Its name: of the file, without folder and extension.
    pub name: String,
    /// What it is, in one line.
    pub about: String,
    /// Where the order was read.
    pub sources: Vec<Source>,
    /// What the restore is into.
    pub destination: Destination,
    /// What delays alone do not say about the hosts.
    pub hosts: Hosts,
    /// From the stop of the vCPUs on, on the source.
    pub save: Vec<Group>,
    /// On the destination, until the vCPUs run.
    pub restore: Vec<Group>,
}

/// A file in which the order was read.
#[derive(Clone, Debug, PartialEq, Eq, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// Its path in the repository.
    pub file: String,
    /// The commit.
    pub revision: String,
    /// The functions to look at.
    pub what: String,
}

/// Facts about the two hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Hosts {
    /// From the last step of the save to the first of the restore, in nanoseconds.
    pub downtime_ns: u64,
    /// The destination's CPU scales the TSC: KVM_SET_TSC_KHZ has an effect.
    pub tsc_scaling: bool,
    /// How long the destination host has been up, in nanoseconds: its TSC began at 0 then.
    pub uptime_ns: u64,
    /// By how many billionths CLOCK_MONOTONIC_RAW is faster than the page.
    pub raw_ppb: u64,
    /// How long the guest has been up, in nanoseconds, where a step counts from its boot.
    pub guest_uptime_ns: u64,
    /// With a VM that stays where it is: how long ago KVM last based its page, in nanoseconds.
    pub page_age_ns: u64,
}

impl Default for Hosts {
    fn default() -> Self {
        Self {
            downtime_ns: 0,
            tsc_scaling: false,
            uptime_ns: 3_600_000_000_000,
            raw_ppb: 0,
            guest_uptime_ns: 0,
            page_age_ns: 0,
        }
    }
}

impl Recipe {
    /// The shipped recipe of this name, or else the one in the file of this name.
    ///
    /// # Errors
    /// [`RecipeError`].
    pub fn named_or_file(name: &str) -> Result<Self, RecipeError> {
        match shipped::text(name) {
            Some(text) => parse::parse(name, name, text),
            None => Self::from_file(Path::new(name)),
        }
    }

    /// The recipe of the injected fault of this name, if there is one.
    #[must_use]
    pub fn fault(name: &str) -> Option<Self> {
        parse::parse(name, name, shipped::fault_text(name)?).ok()
    }

    /// How long it takes for `cpus` vCPUs from the stop to the first entry, in nanoseconds.
    #[must_use]
    pub fn length_ns(&self, cpus: usize) -> u64 {
        let (_, saved_ns) = schedule::schedule(&self.save, cpus, 0);
        let (_, end_ns) = schedule::schedule(&self.restore, cpus, saved_ns.saturating_add(self.hosts.downtime_ns));
        end_ns
    }

    /// The recipe in a file.
    ///
    /// # Errors
    /// [`RecipeError`].
    pub fn from_file(path: &Path) -> Result<Self, RecipeError> {
        let file = path.display().to_string();
        let unreadable = |why: String| RecipeError::Unreadable { file: file.clone(), why };
        let (mut open, bytes) = regular_file::open_regular(path).map_err(|error| unreadable(error.to_string()))?;
        if bytes > MAX_BYTES {
            return Err(unreadable(format!("it has {bytes} bytes, and a recipe has at most {MAX_BYTES}")));
        }
        let mut text = String::new();
        std::io::Read::read_to_string(&mut open, &mut text).map_err(|error| unreadable(error.to_string()))?;
        let name = path.file_stem().map_or_else(|| file.clone(), |stem| stem.to_string_lossy().into_owned());
        parse::parse(&file, &name, &text)
    }
}
