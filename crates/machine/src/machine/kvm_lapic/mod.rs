//! A machine whose LAPICs and kvmclock are KVM's (`--lapic kvm`).
//!
//! What it is: the reference to compare the VMM's own LAPIC with, built as other VMMs build theirs. KVM emulates the
//! interrupts, the timer, IPIs and INIT/SIPI, publishes the kvmclock page and handles its MSRs. The VMM handles ports,
//! and saves and restores the state.
//!
//! What it is not: HLT does not exit, so no instruction can be trapped by patching, and there is neither virtual time
//! nor a TSC whose frequency can be chosen freely. The VMM injects nothing, so it cannot measure when a tick's
//! interrupt was injected. It judges a tick by the page that KVM writes instead ([`super::audit`]).
//!
//! [`KvmCpu`] is one vCPU, [`run`] its loop. [`freeze`] reads KVM's state when a machine is paused, which a save then
//! uses; [`thaw`] sets it again, for a resume as for a restore, and documents the order that KVM needs.

mod choose;
mod freeze;
mod start_clock;
mod step;
mod timer;
mod vcpu;

pub(crate) use choose::{check_features, choose, offer};
pub(crate) use freeze::{freeze, thaw};
pub(crate) use start_clock::start_clock;
pub(crate) use step::run;
pub(crate) use vcpu::{KvmCpu, boot, restore};
