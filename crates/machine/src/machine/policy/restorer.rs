//! A restore by the rules of another VMM: what it writes takes the place of this VMM's own.
//!
//! What it is: the seam for experiments. [`Machine`](crate::Machine) stops its vCPUs and starts them again as always;
//! in between a [`Restorer`] says with which TSC, which kvmclock page and which armed timer each of them continues.
//! What it is not: a policy of a restore that users want. The machine knows nothing of the VMM whose rules these are.

use std::fmt::Debug;

use vlapic::Armed;
use vmtime::{Adjusted, Due, GuestTsc, Khz, Moment, PageClock, Remainder, TscAdjust};

/// A stopped machine, and how this VMM would continue it.
#[derive(Clone, Debug)]
pub struct Saved {
    /// The instant of the stop.
    pub moment: Moment,
    /// The TSC frequency with which the guest continues.
    pub khz: Khz,
    /// The instant from which this VMM's own restore would continue.
    pub own: Adjusted,
    /// Every vCPU, by number.
    pub cpus: Vec<SavedCpu>,
}

/// A vCPU of a stopped machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SavedCpu {
    /// How far its TSC is ahead of the base.
    pub tsc_adjust: TscAdjust,
    /// What its timer waits for.
    pub armed: Armed,
    /// What it would wait for after this VMM's own restore.
    pub own_armed: Armed,
    /// When that is due, if this VMM's restore moved it.
    pub own_due: Option<Due>,
    /// LVTT selects TSC-deadline mode.
    pub in_deadline_mode: bool,
}

/// How the machine continues.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Restored {
    /// The base TSC.
    pub tsc: GuestTsc,
    /// VM time that this TSC stands for, after the instant of the stop, in nanoseconds. The reference clock continues
    /// from there.
    pub elapsed_ns: u64,
    /// The clock by which the VMM converts from now on, in terms of the base TSC.
    pub page: PageClock,
    /// How far VM time is ahead of that page's line.
    pub remainder: Remainder,
    /// Whether PVCLOCK_TSC_STABLE is set in the pages.
    pub stable: bool,
    /// Whether the VMClock page is written, if there is one.
    pub vmclock: bool,
    /// Every vCPU, by number.
    pub cpus: Vec<RestoredCpu>,
}

/// How a vCPU continues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RestoredCpu {
    /// How far its TSC is ahead of the base.
    pub tsc_adjust: TscAdjust,
    /// What its timer waits for.
    pub armed: Armed,
    /// When that is due, if it was moved and a later restore is to know.
    pub due: Option<Due>,
    /// The page to publish, in terms of its own TSC; none: the guest's page stays as it is in RAM.
    pub page: Option<PageClock>,
    /// PVCLOCK_GUEST_STOPPED is set in that page.
    pub guest_stopped: bool,
}

/// The rules of another VMM.
pub trait Restorer: Debug + Send + Sync {
    /// How `saved` continues.
    fn restore(&self, saved: &Saved) -> Restored;
}
