//! The values of flags that are one of several words. Doc comments here are the help texts.

use clap::ValueEnum;
use machine::{
    AcpiTables, EmulatedHost, LapicKind, TimeMode,
    config::source::{SourceChoice, TscSource},
};

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Lapic {
    /// vmm: every access to them exits.
    User,
    /// KVM: the reference to compare with.
    Kvm,
}

impl From<Lapic> for LapicKind {
    fn from(lapic: Lapic) -> Self {
        match lapic {
            Lapic::User => Self::User,
            Lapic::Kvm => Self::Kvm,
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Time {
    /// With the host's clock.
    Real,
    /// By a fixed cost per guest operation; a halted guest jumps to its next deadline. Repeatable.
    Virtual,
}

impl From<Time> for TimeMode {
    fn from(time: Time) -> Self {
        match time {
            Time::Real => Self::Real,
            Time::Virtual => Self::Virtual,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Verify {
    /// First: the guest starts when all of it has been read.
    Now,
    /// Each block before its first use, the rest in the background; a snapshot of the VM waits for that.
    Background,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ConsoleFull {
    /// The guest's vCPUs stand still until somebody reads.
    Wait,
    /// The guest runs on.
    Drop,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnOff {
    On,
    Off,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Acpi {
    /// As the guest is.
    Auto,
    /// It has them.
    On,
    /// It has none.
    Off,
}

impl From<Acpi> for AcpiTables {
    fn from(acpi: Acpi) -> Self {
        match acpi {
            Acpi::Auto => Self::Auto,
            Acpi::On => Self::On,
            Acpi::Off => Self::Off,
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Tsc {
    /// The best that works here; says which and why.
    Auto,
    /// The host's TSC, unchanged.
    Host,
    /// The host's TSC, scaled by KVM, if a probe sees it work.
    Scaled,
    /// The VMM answers, at the guest's trap sites.
    Trapped,
}

impl From<Tsc> for SourceChoice {
    fn from(tsc: Tsc) -> Self {
        match tsc {
            Tsc::Auto => Self::Auto,
            Tsc::Host => Self::Fixed(TscSource::Host),
            Tsc::Scaled => Self::Fixed(TscSource::Scaled),
            Tsc::Trapped => Self::Fixed(TscSource::Trapped),
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Deadline {
    /// The raw TSC value stays, as QEMU, Firecracker and Cloud Hypervisor do it.
    Keep,
    /// It fires at the same VM time.
    Rescale,
    /// It fires at once; the guest arms it again.
    Fire,
}

impl From<Deadline> for vmtime::DeadlinePolicy {
    fn from(policy: Deadline) -> Self {
        match policy {
            Deadline::Keep => Self::Keep,
            Deadline::Rescale => Self::Rescale,
            Deadline::Fire => Self::Fire,
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Downtime {
    /// No: VM time stands still.
    Freeze,
    /// Yes: VM time advances by it, never back.
    CatchUp,
    /// As catch-up, and it is added to the guest's steal time (MSR_KVM_STEAL_TIME), if the guest has registered an
    /// area.
    Steal,
}

impl From<Downtime> for vmtime::DowntimePolicy {
    fn from(policy: Downtime) -> Self {
        match policy {
            Downtime::Freeze => Self::Freeze,
            Downtime::CatchUp => Self::CatchUp,
            Downtime::Steal => Self::Steal,
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum EmulateHost {
    /// KVM swallows the write of the TSC deadline: trap sites are patched, or TSC-deadline is hidden.
    SwallowDeadline,
    /// A single step over STI also runs the instruction after it: sweeps are refused.
    CoarseStep,
    /// The CPU has no XSAVE, and KVM no KVM_CAP_XCRS.
    NoXsave,
}

impl EmulateHost {
    /// As on the command line.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::SwallowDeadline => "swallow-deadline",
            Self::CoarseStep => "coarse-step",
            Self::NoXsave => "no-xsave",
        }
    }
}

impl From<EmulateHost> for EmulatedHost {
    fn from(host: EmulateHost) -> Self {
        match host {
            EmulateHost::SwallowDeadline => Self::SwallowDeadline,
            EmulateHost::CoarseStep => Self::CoarseStep,
            EmulateHost::NoXsave => Self::NoXsave,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DebugExitStatus {
    /// 0 for the guest's code 0, else 1.
    Map,
    /// (code << 1) | 1.
    Raw,
}
