//! Resumes a vCPU whose LAPIC is in user space.

use std::sync::atomic::Ordering;

use vmtime::{Adjusted, DowntimePolicy, Moment, Now};

use crate::machine::{
    error::RunError,
    policy::{
        Policies, Restart,
        deadline::rearm,
        restorer::{RestoredCpu, SavedCpu},
    },
    shared::{Ram, Shared},
    vcpu::{Cpu, Local, ipi},
};

/// A stopped vCPU, and what its timer waits for after this VMM's own restore.
pub(crate) fn saved(cpu: &Cpu, policies: &Policies, moment: &Moment, adjusted: &Adjusted) -> SavedCpu {
    let Local { apic, tsc_adjust, due, .. } = &cpu.local;
    let (own_armed, own_due) = rearm(apic.armed(), *due, *tsc_adjust, policies.deadline, moment, adjusted);
    SavedCpu {
        tsc_adjust: *tsc_adjust,
        armed: apic.armed(),
        own_armed,
        own_due,
        in_deadline_mode: apic.in_deadline_mode(),
    }
}

/// Prepares one vCPU to run again, after the machine's clock was started.
///
/// Returns the vCPU's steal time, if the stop was added to it.
pub(crate) fn thaw(local: &mut Local, shared: &Shared, restart: Restart<'_>) -> Result<Option<u64>, RunError> {
    let Restart { policies, moment, adjusted, restored } = restart;
    let other = local.index.of(restored);
    if let Some(other) = other {
        local.tsc_adjust = other.tsc_adjust;
    }
    let now = Now::new(adjusted.tsc, adjusted.vm).ahead(local.tsc_adjust);
    // LAPIC registers are in place already: writing a deadline before LVTT selects deadline mode would drop it.
    let (armed, due) = match other {
        Some(other) => (other.armed, other.due),
        None => rearm(local.apic.armed(), local.due, local.tsc_adjust, policies.deadline, moment, adjusted),
    };
    local.due = due;
    local.apic.rearm(armed, now).map_err(|error| RunError::BadState(error.to_string()))?;
    if let Some(timers) = &mut local.timers {
        let clock = shared.clock.lock();
        let due = local.apic.next_deadline().map(|deadline| clock.due_time(deadline));
        timers.resumed(due, clock.reference_time(adjusted.tsc));
    }
    ipi::publish_route(shared, local);
    if let Some(vcpu_shared) = shared.vcpu(local.index) {
        vcpu_shared.page.store(local.pvclock.address().unwrap_or(0), Ordering::Relaxed);
        vcpu_shared.tsc_adjust.store(local.tsc_adjust.0, Ordering::Relaxed);
    }
    // The page last: its numbers describe the TSC and the timer, which are now in place. GUEST_STOPPED is set with it,
    // at resume and not at save, so that two saves of one stop make the same snapshot.
    let flags = shared.page_flags();
    local.published_flags = flags;
    let (page, stopped) = match other {
        Some(RestoredCpu { page, guest_stopped, .. }) => (*page, *guest_stopped),
        None => (Some(shared.clock.lock().page(local.tsc_adjust)), true),
    };
    if let Some(page) = page {
        local
            .pvclock
            .publish(&Ram(&shared.memory), &page, flags, stopped)
            .map_err(|fault| RunError::BadState(fault.to_string()))?;
    }
    match (policies.downtime, &local.steal_time) {
        // On every vCPU, halted or not: nobody knows which of them would have run.
        (DowntimePolicy::Steal, Some(steal_time)) => steal_time
            .add(adjusted.downtime_ns, &Ram(&shared.memory))
            .map_err(|fault| RunError::BadState(fault.to_string())),
        _ => Ok(None),
    }
}
