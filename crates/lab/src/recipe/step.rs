//! The steps of a recipe.

use serde::Deserialize;

/// A group of steps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Group {
    /// Steps of the whole VM, one after the other.
    Vm(Vec<Step>),
    /// Steps of a vCPU: all of them for vCPU 0, then all of them for vCPU 1, and so on.
    EachCpu(Vec<Step>),
    /// Steps of a vCPU, which all vCPUs do at the same time: the VMM has a thread for each.
    AllCpus(Vec<Step>),
}

impl Group {
    /// Its steps.
    #[must_use]
    pub fn steps(&self) -> &[Step] {
        match self {
            Self::Vm(steps) | Self::EachCpu(steps) | Self::AllCpus(steps) => steps,
        }
    }

    #[cfg(test)]
    pub(super) fn steps_mut(&mut self) -> &mut [Step] {
        match self {
            Self::Vm(steps) | Self::EachCpu(steps) | Self::AllCpus(steps) => steps,
        }
    }
}

/// A step, and how long after the step before it takes effect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Nanoseconds.
    pub after_ns: u64,
    /// What it does.
    pub op: Op,
}

/// What a step does: an ioctl of KVM, with what matters to a guest's time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Nothing: time passes.
    Wait,
    /// KVM_GET_CLOCK: kvmclock, CLOCK_REALTIME and the host's TSC, of one instant.
    GetClock,
    /// KVM_GET_MSRS.
    GetMsrs(Vec<Msr>),
    /// KVM_GET_LAPIC.
    GetLapic,
    /// KVM_GET_TSC_KHZ.
    GetTscKhz,
    /// KVM_GET_DEVICE_ATTR, KVM_VCPU_TSC_OFFSET.
    GetTscOffset,
    /// KVM_SET_CLOCK with the kvmclock value that the last KVM_GET_CLOCK of the save gave.
    SetClock(ClockBy),
    /// KVM_SET_MSRS, in this order.
    SetMsrs(SetMsrs),
    /// KVM_SET_LAPIC.
    SetLapic,
    /// KVM_SET_TSC_KHZ.
    SetTscKhz,
    /// KVM_SET_DEVICE_ATTR, KVM_VCPU_TSC_OFFSET.
    SetTscOffset(OffsetFrom),
    /// KVM_KVMCLOCK_CTRL, which sets PVCLOCK_GUEST_STOPPED.
    KvmclockCtrl,
    /// KVM_REQ_MASTERCLOCK_UPDATE: KVM bases the pages on CLOCK_MONOTONIC_RAW anew, by which other time has passed
    /// since the last base than by the page. KVM does so at the first entries after a restore, and did so before Linux
    /// 6.8 for each vCPU that was plugged in.
    MasterclockUpdate,
    /// The VMM publishes the kvmclock page of its own restore, if it emulates kvmclock. The base is a TSC that the
    /// guest reaches `base_ahead_ns` later.
    PublishPage {
        /// Nanoseconds.
        base_ahead_ns: u64,
    },
    /// The VMM writes the VMClock page, if there is one, and changes its disruption marker.
    UpdateVmclock,
}

/// What KVM_SET_MSRS writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetMsrs {
    /// The MSRs, in the order in which they are written.
    pub msrs: Vec<Msr>,
    /// What becomes of a deadline of 0.
    pub zero_deadline: ZeroDeadline,
    /// By what the deadline is computed.
    pub deadline_by: DeadlineBy,
    /// How far the TSC that is written is ahead of the right one, in nanoseconds.
    pub tsc_ahead_ns: u64,
    /// How much farther on each vCPU than on the one before.
    pub tsc_ahead_ns_per_cpu: u64,
}

/// By what a VMM computes the instant of a deadline.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeadlineBy {
    /// By the numbers of the page, as the guest does.
    #[default]
    Page,
    /// By ticks over kHz since the guest booted: another rate than the page's, whose multiplier is rounded.
    Khz,
}

/// What the restore is into.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Destination {
    /// A new VM, of KVM with its LAPIC and kvmclock.
    #[default]
    Kvm,
    /// This VMM's own, which emulates both. The steps write the values of its own restore, under its policies.
    Vmm,
    /// None: the VM stays where it is. Its clocks count on, and what no step writes stays.
    Same,
}

/// An MSR that a VMM saves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Msr {
    /// IA32_TSC.
    Tsc,
    /// MSR_KVM_SYSTEM_TIME_NEW: the kvmclock page's address. KVM publishes the page once it is written.
    Kvmclock,
    /// IA32_TSC_DEADLINE.
    Deadline,
}

/// How KVM_SET_CLOCK sets kvmclock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ClockBy {
    /// To the saved value.
    Value,
    /// With KVM_CLOCK_REALTIME: to the saved value and the wall time since it was read.
    Realtime,
}

/// Where a TSC offset comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OffsetFrom {
    /// Computed so that the TSC has counted the wall time between KVM_GET_CLOCK of the save and the last one of the
    /// restore (Linux `Documentation/virt/kvm/devices/vcpu.rst`, KVM_VCPU_TSC_OFFSET).
    Elapsed,
    /// Copied from vCPU 0.
    FirstCpu,
}

/// What becomes of an IA32_TSC_DEADLINE of 0, which means disarmed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ZeroDeadline {
    /// It stays 0.
    #[default]
    Keep,
    /// The saved TSC is written, so that the timer fires at once.
    Now,
}
