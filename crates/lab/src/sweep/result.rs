//! The findings of a sweep, as they are written to JSON.
//!
//! Everything here is a function of the inputs: two runs write the same bytes, and shards merge to what one run writes.
//! Host time is not in it.

use serde::{Deserialize, Serialize};
use vmtime::{DeadlinePolicy, DowntimePolicy, Khz};

use super::verdict::{Outcome, Verdict};

/// Version of the layout.
pub const SCHEMA: &str = "vmm-sweep/1";

/// The result of a sweep, of a shard of one, or of merged shards.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Findings {
    /// [`SCHEMA`].
    pub schema: String,
    /// The options of the sweep.
    pub inputs: Inputs,
    /// Which shard this is; none for a whole sweep.
    pub shard: Option<Shard>,
    /// Whether every point was tried; false if the sweep was interrupted.
    pub complete: bool,
    /// The stretch that was swept.
    pub extent: Extent,
    /// What happens without a migration.
    pub baseline: Baseline,
    /// How many points had which verdict, for each ratio.
    pub totals: Vec<Totals>,
    /// Neighbouring points with the same verdict, other than `on-time`.
    pub windows: Vec<Window>,
    /// The instructions at the points, by address.
    pub code: Vec<Code>,
    /// Every point, in order.
    pub points: Vec<Point>,
}

/// The options of a sweep.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Inputs {
    /// Name of the image, for readers only.
    pub guest: String,
    /// CRC-32 of the image's bytes.
    pub guest_crc32: u32,
    /// The guest's command line.
    pub cmdline: String,
    /// Guest RAM in bytes.
    pub memory: u64,
    /// Number of vCPUs.
    pub cpus: u32,
    /// What was changed of CPUID, as `--cpuid` has it; empty for nothing.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub cpuid: String,
    /// Seed of the round robin's order of vCPUs, and of the sample of pairs.
    pub seed: u64,
    /// Whether CPUID offered x2APIC.
    pub x2apic: bool,
    /// Whether the guest had VMClock.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub vmclock: bool,
    /// TSC frequency at boot.
    pub tsc_khz: Khz,
    /// Where the stretch begins.
    pub from: String,
    /// Where it ends.
    pub to: String,
    /// Which boundaries are points.
    pub every: String,
    /// The frequencies to migrate to.
    pub ratios: Vec<Target>,
    /// Deadline policy.
    pub deadline: DeadlinePolicy,
    /// Downtime policy.
    pub downtime: DowntimePolicy,
    /// How long the VM counts as saved, in nanoseconds.
    pub downtime_ns: u64,
    /// The fault that was injected into every restore.
    pub inject: Option<String>,
    /// The recipe that was played in place of this VMM's restore.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recipe: Option<RecipeUsed>,
    /// Whether the guest was judged by its timer interrupts, as the VMM saw them: it keeps no records of ticks.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub by_interrupts: bool,
    /// CRC-32 of the initrd, if there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd_crc32: Option<u32>,
    /// CRC-32 of the trap sites, if they were found or came from a file: the image does not determine them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sites_crc32: Option<u32>,
    /// Ticks that must come after the one being handled at the point.
    pub ticks: u64,
    /// Migrations at a point: 1, or 2 for one to another frequency and one back.
    pub depth: u32,
    /// With two migrations: how many pairs to sample.
    pub samples: Option<u64>,
    /// A tick is late if its lateness exceeds the baseline's by more than this.
    pub tolerance_ns: u64,
    /// VM time that each run waited for its ticks.
    pub patience_ns: u64,
}

/// A recipe, and what it must lose.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecipeUsed {
    /// Its name.
    pub name: String,
    /// What it is.
    pub about: String,
    /// For each ratio in turn: how far each vCPU's page must be ahead of its TSC, by the recipe's delays, in
    /// nanoseconds; none where the recipe sets neither TSC nor kvmclock.
    pub predicted_ns: Vec<Option<Vec<i64>>>,
}

/// A frequency to migrate to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Target {
    /// As on the command line.
    pub ratio: String,
    /// The frequency.
    pub tsc_khz: Khz,
}

/// One of several parts of a sweep.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shard {
    /// Which, from 1.
    pub index: u32,
    /// Of how many.
    pub count: u32,
}

/// The stretch that was swept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Extent {
    /// Instruction boundaries in it.
    pub boundaries: u64,
    /// Those of them that are points.
    pub points: u64,
    /// Guest operations in it.
    pub operations: u64,
    /// VM time at its first boundary.
    pub from_vm_ns: u64,
    /// VM time at its last.
    pub to_vm_ns: u64,
}

/// What happens without a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Baseline {
    /// How late the latest tick was.
    pub late_ns: u64,
    /// Early wakes.
    pub early_wakes: u64,
    /// From one expiry to the next.
    pub period_ns: u64,
}

/// How many points had which verdict.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Totals {
    /// The ratio.
    pub ratio: String,
    /// Verdict and count, from harmless to fatal; verdicts that no point had are absent.
    pub verdicts: Vec<(Verdict, u64)>,
    /// The latest tick of all points.
    pub worst_late_ns: u64,
    /// The most early wakes of any point.
    pub most_early_wakes: u64,
    /// With a recipe: for each vCPU, how far its page was ahead of its TSC, the least and the most of all points;
    /// none for a vCPU without a page.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub page_errors_ns: Vec<Option<(i64, i64)>>,
}

/// An instruction.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Code {
    /// Its address.
    #[serde(with = "hex_number")]
    pub address: u64,
    /// The function it is in, and how far into it.
    pub symbol: Option<String>,
    /// Its bytes, in hexadecimal.
    pub bytes: String,
    /// Its disassembly.
    pub instruction: String,
    /// File and line.
    pub source: Option<String>,
}

/// A point: where the migration was, and what it did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Point {
    /// The boundary's number, from 0 at the beginning of the stretch; with two migrations also the number of boundaries
    /// from the first to the second.
    pub at: Vec<u64>,
    /// The vCPU that was stopped there.
    pub cpu: u32,
    /// The instruction that it would have executed next.
    #[serde(with = "hex_number")]
    pub address: u64,
    /// Whether that vCPU was in HLT.
    pub halted: bool,
    /// VM time.
    pub vm_ns: u64,
    /// What the migration did, for each ratio in turn.
    pub outcomes: Vec<Outcome>,
}

/// Neighbouring points with one verdict.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Window {
    /// The ratio.
    pub ratio: String,
    /// The verdict.
    pub verdict: Verdict,
    /// Its first point.
    pub first: Vec<u64>,
    /// Its last point.
    pub last: Vec<u64>,
    /// How many points.
    pub points: u64,
    /// Address of the instruction at the first point.
    #[serde(with = "hex_number")]
    pub first_address: u64,
    /// Address of the instruction at the last point.
    #[serde(with = "hex_number")]
    pub last_address: u64,
    /// The latest tick.
    pub worst_late_ns: Option<u64>,
    /// The most early wakes.
    pub most_early_wakes: u64,
    /// The largest clock error.
    pub worst_clock_error_ns: i64,
}

impl Findings {
    /// Whether no migration harmed the guest.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.points.iter().flat_map(|point| &point.outcomes).all(|outcome| !outcome.verdict.is_bad())
    }

    /// The instruction at `address`.
    #[must_use]
    pub fn code_at(&self, address: u64) -> Option<&Code> {
        let index = self.code.binary_search_by_key(&address, |code| code.address).ok()?;
        self.code.get(index)
    }
}

/// Addresses as `"0x…"`: a JSON number loses those beyond 2⁵³ in many readers.
mod hex_number {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(value: &u64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{value:#x}"))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
        let text = String::deserialize(deserializer)?;
        let digits = text.strip_prefix("0x").unwrap_or_default();
        u64::from_str_radix(digits, 16).map_err(|_| D::Error::custom(format!("{text:?} is no address like \"0x10\"")))
    }
}
