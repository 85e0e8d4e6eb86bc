//! What a check found.

use machine::audit::{GuestStopped, TimerAccount, TimerSummary};
use serde::Serialize;
use vmtime::{Khz, VmTime};

use super::{compare::Comparison, console};

/// Version of the layout of the JSON.
pub const SCHEMA: &str = "vmm-check/1";

/// What was asked for, and how it was done.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Setup {
    /// The guest's image.
    pub guest: String,
    /// Its command line.
    pub cmdline: String,
    /// Number of vCPUs.
    pub cpus: u32,
    /// `real` or `virtual`.
    pub time: &'static str,
    /// The TSC source at the end.
    pub source: &'static str,
    /// TSC frequency at boot.
    pub tsc_khz: Khz,
    /// The frequencies after the migrations, in turn.
    pub khz_cycle: Vec<Khz>,
    /// Migrations that were asked for.
    pub wanted: u64,
    /// VM time between two, in nanoseconds.
    pub every_ns: u64,
    /// Deadline policy.
    pub deadline: &'static str,
    /// Downtime policy.
    pub downtime: &'static str,
    /// The fault that was injected.
    pub fault: Option<String>,
    /// What is late, in nanoseconds; none: nothing.
    pub late_ns: Option<u64>,
    /// The console is Linux'.
    pub linux: bool,
}

/// One migration.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Migrated {
    /// Its number, from 1.
    pub number: u64,
    /// VM time at the stop.
    pub vm_ns: VmTime,
    /// TSC frequency before.
    pub from_khz: Khz,
    /// TSC frequency after.
    pub to_khz: Khz,
    /// By number of vCPU: its first armings, compared with those of a copy that was not migrated. Empty where the
    /// frequency stays.
    pub armings: Vec<Vec<Comparison>>,
    /// Its kvmclock pages.
    pub pages: Vec<PageFound>,
}

/// A vCPU's kvmclock page over a migration.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct PageFound {
    /// The vCPU.
    pub cpu: usize,
    /// What the guest's clock shows at the resume, minus what it showed at the stop, minus the downtime to be counted,
    /// in nanoseconds. None: at the resume the guest's TSC is below the page's base, and it reads nonsense.
    pub step_ns: Option<i64>,
    /// The page has the scale of the new frequency.
    pub scale: bool,
    /// How far it is ahead of vCPU 0's, in nanoseconds.
    pub ahead_of_first_ns: f64,
    /// At the stop, by the old page: how far the guest's clock was ahead of the VMM's reference clock, in nanoseconds.
    pub off_ns: i64,
}

/// The run between two migrations.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Stretch {
    /// TSC frequency.
    pub tsc_khz: Khz,
    /// How long it was.
    pub vm_ns: u64,
    /// Timer interrupts in it, on all vCPUs.
    pub interrupts: u64,
}

/// Everything that was found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Findings {
    /// [`SCHEMA`].
    pub schema: &'static str,
    /// What was asked for.
    pub setup: Setup,
    /// The migrations.
    pub migrations: Vec<Migrated>,
    /// The runs before, between and after them.
    pub stretches: Vec<Stretch>,
    /// What each vCPU's timer was armed for, from before the first migration on.
    pub timers: Vec<TimerAccount>,
    /// Timer interrupts since the guest booted.
    pub interrupts: TimerSummary,
    /// PVCLOCK_GUEST_STOPPED.
    pub guest_stopped: GuestStopped,
    /// What the console said.
    pub console: console::Found,
    /// How the guest ended; none if it did not.
    pub end: Option<Ended>,
    /// VM time at the end.
    pub vm_ns: VmTime,
}

/// How the guest ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Ended {
    /// In good order.
    pub good: bool,
    /// In words.
    pub how: String,
}

/// What a check came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// As it must be.
    Ok,
    /// Not as it must be.
    Failed,
    /// There was something to judge, but not enough.
    CannotTell,
    /// A remark, that is neither good nor bad.
    Note,
    /// There was nothing to judge.
    NotJudged,
}

impl Verdict {
    /// As people read it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Failed => "FAILED",
            Self::CannotTell => "cannot tell",
            Self::Note => "note",
            Self::NotJudged => "-",
        }
    }

    /// Whether the whole check fails with it. One that could not judge what it is for has not passed.
    #[must_use]
    pub fn fails(self) -> bool {
        matches!(self, Self::Failed | Self::CannotTell)
    }
}

/// A check, and what it came to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Row {
    /// Its name.
    pub check: &'static str,
    /// The verdict.
    pub verdict: Verdict,
    /// What was seen, in a sentence or two.
    pub seen: String,
}
