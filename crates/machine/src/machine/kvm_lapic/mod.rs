//! A machine whose LAPICs and kvmclock are KVM's (`--lapic kvm`).
//!
//! What it is: the reference to compare the VMM's own LAPIC with, built as other VMMs build theirs. KVM emulates the
//! interrupts, the timer, IPIs and INIT/SIPI, publishes the kvmclock page and handles its MSRs. The VMM handles ports,
//! and saves and restores the state.
//!
//! What it is not: HLT does not exit, so that no instruction can be trapped by patching, and there is neither virtual time
//! nor a TSC of any frequency. The VMM injects nothing, so it cannot measure when a tick's interrupt was injected.
//!
//! [`KvmCpu`] is one vCPU, [`run`] its loop. [`freeze`] reads a machine that stands still, for a pause as for a save;
//! [`thaw`] puts it into KVM again, for a resume as for a restore, and says what depends on what.

mod choose;
mod freeze;
mod step;
mod timer;
mod vcpu;

pub(crate) use choose::{check_features, choose, offer};
pub(crate) use freeze::{freeze, start_clock, thaw};
pub(crate) use step::run;
pub(crate) use vcpu::{KvmCpu, boot, restore};
