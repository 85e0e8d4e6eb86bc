//! Reads KVM's clock and LAPICs when a machine stops, and sets them when it is resumed.
//!
//! KVM's clock and timers count on while the vCPUs do not run. So a stop reads them at once, and a resume sets them
//! again, in the same VM or in another. If a timer fires in between, the resume overwrites its interrupt with the other
//! LAPIC registers.

use vlapic::Armed;
use vmtime::{Adjusted, HostTsc, PageClock, VmTime};

use super::{KvmCpu, timer};
use crate::{
    kvm::{
        KvmClock, Vcpu, Vm,
        state::{KernelLapicState, MpState},
    },
    machine::{
        clock::Clock,
        error::RunError,
        policy::{Restart, deadline::rearm},
        state::KvmLapicState,
    },
};

/// Reads KVM's clock and LAPICs; no vCPU may run. Returns the host TSC at which VM time stopped. `since`: the vCPUs
/// have not run since this host TSC, and VM time is stopped as of then. (KVM's timers counted on: one that was due
/// since then has set its interrupt in IRR.)
pub fn freeze(cpus: &mut [KvmCpu], vm: &Vm, clock: &mut Clock, since: Option<HostTsc>) -> Result<HostTsc, RunError> {
    // MP states first: reading one makes KVM process pending INIT and start-up messages, which no saved state contains.
    let mp_states = cpus.iter().map(|cpu| cpu.vcpu.mp_state()).collect::<Result<Vec<_>, _>>()?;
    let mut kvm = vm.clock()?;
    if let Some(since) = since {
        let gap = clock.host().duration(since, kvm.host);
        let gap = u64::try_from(gap.as_nanos()).unwrap_or(u64::MAX);
        kvm = KvmClock { vm: VmTime(kvm.vm.0.saturating_sub(gap)), host: since, ..kvm };
    }
    clock.stop_at_kvm_clock(kvm);
    for (cpu, mp_state) in cpus.iter_mut().zip(mp_states) {
        let lapic = cpu.vcpu.kernel_lapic()?;
        cpu.frozen = Some(KvmLapicState { due: cpu.due, ..saved(lapic, mp_state, vm.clock()?.vm) });
    }
    Ok(kvm.host)
}

/// The LAPIC state of a vCPU that has never run.
pub(crate) fn never_run(vcpu: &Vcpu) -> Result<KvmLapicState, RunError> {
    let mp_state = vcpu.mp_state()?;
    Ok(saved(vcpu.kernel_lapic()?, mp_state, VmTime(0)))
}

/// The state for a snapshot. `now` is VM time when `lapic` was read, or later.
fn saved(lapic: KernelLapicState, mp_state: MpState, now: VmTime) -> KvmLapicState {
    let KernelLapicState { page, tsc_deadline, tsc_adjust, system_time, wall_clock } = lapic;
    let armed = timer::armed(&page, tsc_deadline, now);
    KvmLapicState { page, armed, due: None, mp_state, tsc_adjust, system_time, wall_clock }
}

/// How far KVM's page may be behind the one that the VMM computes from KVM's clock, in nanoseconds: the old and the new
/// clock were read once each and the guest reads a third time, and each reading rounds down by less than 2 ns.
const ROUNDINGS_NS: u64 = 6;

/// Sets one vCPU's LAPIC, timer and kvmclock for a resume, and returns what its timer then waits for. KVM needs this
/// order:
///
/// - TSCs and clock are set: a deadline is compared with the TSC, a count's rest with VM time, when they are set.
/// - LAPIC registers, then the deadline, which only deadline mode takes.
/// - kvmclock's MSRs: the wall clock is filled in from VM time at once.
/// - MP state, which setting registers may change, then GUEST_STOPPED, which needs the page.
pub(crate) fn thaw(cpu: &mut KvmCpu, vm: &Vm, restart: Restart<'_>) -> Result<Armed, RunError> {
    let Restart { policies, moment, adjusted, restored: _ } = restart;
    let Some(frozen) = cpu.frozen.take() else { return Ok(Armed::Disarmed) };
    let KvmLapicState { page, armed, due, mp_state, tsc_adjust, system_time, wall_clock } = frozen;
    let index = cpu.index;
    let bad = |error: crate::kvm::Error| RunError::BadState(format!("cpu {index}: {error}"));
    // Rearms with a page that is never ahead of the guest's. Then a deadline that is moved to the same VM time is never
    // early by the guest's clock.
    let page_now = adjusted.page;
    let behind = PageClock { system_time: VmTime(page_now.system_time.0.saturating_sub(ROUNDINGS_NS)), ..page_now };
    let adjusted = Adjusted { page: behind, ..*adjusted };
    let (armed, due) = rearm(armed, due, tsc_adjust, policies.deadline, moment, &adjusted);
    cpu.due = due;
    let new = std::mem::take(&mut cpu.new);
    // Whether the interrupt of an expired count was delivered is in KVM's LAPIC only. So the same LAPIC is left as it
    // is.
    if new || !timer::one_shot_is_over(&page) {
        let (page, deadline) = timer::to_set(&page, armed, vm.clock()?.vm);
        cpu.vcpu.set_lapic_timer(&page, deadline).map_err(bad)?;
    }
    if new {
        cpu.vcpu.set_tsc_adjust(tsc_adjust).map_err(bad)?;
        cpu.vcpu.set_kvmclock(system_time, wall_clock).map_err(bad)?;
        cpu.vcpu.set_mp_state(mp_state).map_err(bad)?;
    }
    // It fails if the guest has registered no page, or one outside RAM, which KVM ignores. Then there is no flag to
    // set.
    let _ = cpu.vcpu.mark_kvmclock_stopped();
    Ok(armed)
}
