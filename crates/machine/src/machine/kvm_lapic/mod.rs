//! A machine whose LAPICs and kvmclock are KVM's (`--lapic kvm`).
//!
//! What it is: the reference to compare our own LAPIC with, built as other VMMs build theirs: KVM has the interrupts, the
//! timer, IPIs and INIT/SIPI, publishes the kvmclock page and owns its MSRs; we have ports, and state going in and out.
//!
//! What it is not: HLT does not exit, so that no instruction can be trapped by patching, and there is neither virtual time
//! nor a TSC of any frequency. We inject nothing, so the host has no judgement of its own about a tick.
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
