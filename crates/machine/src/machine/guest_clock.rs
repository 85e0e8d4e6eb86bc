//! The clocks and timers of a machine at a stop and at the resume after it, as its guest has them, for a caller that
//! compares the two.

use guest_abi::pvclock::TimeInfo;
use serde::Serialize;
use vlapic::Armed;
use vmtime::{Adjusted, GuestTsc, Moment, TscAdjust};

/// One vCPU's clock and timer at a stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VcpuClock {
    /// Its kvmclock page, from guest memory; none if the guest has registered none.
    pub page: Option<TimeInfo>,
    /// What its timer waits for.
    pub armed: Armed,
    /// How far its TSC is ahead of the base, modulo 2^64.
    pub tsc_adjust: TscAdjust,
}

/// A paused machine's clocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoppedClocks {
    /// The instant of the stop, by the VMM's own account.
    pub moment: Moment,
    /// By number of vCPU.
    pub vcpus: Vec<VcpuClock>,
}

/// Where a resumed machine continued.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResumedClocks {
    /// The base TSC from which VM time continued.
    pub tsc: GuestTsc,
    /// The VMM's own account. With KVM's kvmclock its instant is the first reading of that clock, which is later.
    pub adjusted: Adjusted,
    /// What each vCPU's timer was set to wait for, by number of vCPU.
    pub armed: Vec<Armed>,
}

/// Ioctls that are proposed so that a VMM can move KVM's kvmclock without loss
/// (lore.kernel.org/kvm/20260703212145.343527-1-dwmw2@infradead.org), and whether this host's KVM has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct ClockIoctls {
    /// KVM_GET_CLOCK_GUEST, and with it KVM_SET_CLOCK_GUEST: the clock as a function of the guest's TSC.
    pub clock_guest: bool,
    /// KVM_VCPU_TSC_SCALE: the ratio by which the CPU scales the TSC.
    pub tsc_scale: bool,
}
