//! Messages between LAPICs.
//!
//! Every vCPU publishes its [`Route`]: the destinations that its LAPIC answers to, and its priority. The sender finds
//! the targets by these routes, puts the message into their [`Inbox`](vlapic::Inbox)es, which hold any number, and
//! rings their doorbells. No vCPU accesses another one's LAPIC, so no LAPIC needs a lock while guests run.

use std::sync::atomic::Ordering;

use kvm_pv::WallRegistration;
use vlapic::{Delivery, DeliveryMode, Ipi, Route, lowest_priority};

use super::{Cpu, Local, Phase};
use crate::machine::{
    error::RunError,
    shared::{Shared, VcpuShared},
};

/// Publishes which destinations `local`'s LAPIC answers to.
pub(crate) fn publish_route(shared: &Shared, local: &Local) {
    if let Some(vcpu_shared) = shared.vcpu(local.index) {
        *vcpu_shared.route.lock() = Some(local.apic.route());
    }
}

/// Sends `ipi` from `local`.
pub(crate) fn send(shared: &Shared, local: &Local, ipi: Ipi) {
    publish_route(shared, local);
    let own = local.index.place();
    let _ = post(shared, ipi, own, Some(own));
}

/// Puts `ipi` into the inboxes of the vCPUs that it is for. `running` is the vCPU whose thread this is, which reads its
/// inbox before it enters the guest again; `sender` the one whose LAPIC sent it, if one did. Returns whether one of
/// them takes vectors.
pub(super) fn post(shared: &Shared, ipi: Ipi, running: usize, sender: Option<usize>) -> bool {
    let route = |vcpu_shared: &VcpuShared| -> Option<Route> { *vcpu_shared.route.lock() };
    let mut targets: Vec<(usize, Route)> = shared
        .vcpus
        .iter()
        .enumerate()
        .filter_map(|(index, vcpu_shared)| Some((index, route(vcpu_shared)?)))
        .filter(|(index, route)| route.addressed_by(ipi.destination, Some(*index) == sender))
        .collect();
    if ipi.mode == DeliveryMode::LowestPriority {
        let chosen = lowest_priority(targets.iter().copied());
        targets.retain(|(index, _)| Some(*index) == chosen);
    }
    let accepted = targets.iter().any(|(_, route)| route.enabled);
    for (index, _) in targets {
        let Some(vcpu_shared) = shared.vcpus.get(index) else { continue };
        vcpu_shared.inbox.lock().post(&ipi);
        if index != running {
            vcpu_shared.doorbell.ring();
        }
    }
    accepted
}

/// Takes all messages from `cpu`'s inbox and carries them out.
pub(crate) fn receive(cpu: &mut Cpu, shared: &Shared) -> Result<(), RunError> {
    loop {
        let Some(vcpu_shared) = shared.vcpu(cpu.local.index) else { return Ok(()) };
        let Some(ipi) = vcpu_shared.inbox.lock().take() else { return Ok(()) };
        let delivery = cpu.local.apic.deliver(&ipi);
        carry_out(cpu, shared, delivery)?;
    }
}

/// Carries out on `cpu` what its LAPIC passed on from a message or a pin.
pub(crate) fn carry_out(cpu: &mut Cpu, shared: &Shared, delivery: Delivery) -> Result<(), RunError> {
    match delivery {
        // There is no system management mode here. The interrupt of the 8259 pair is injected when it can enter.
        Delivery::None | Delivery::Accepted | Delivery::ExtInt | Delivery::Smi => {}
        Delivery::Nmi => {
            if cpu.local.phase == Phase::Running {
                cpu.drain(shared)?;
                cpu.vcpu.nmi()?;
                cpu.local.nmi = true;
                // NMIs are masked in an NMI handler: a CPU that halted there stays halted.
                cpu.local.halted &= cpu.vcpu.nmis().1;
            }
        }
        Delivery::Init => {
            cpu.drain(shared)?;
            cpu.vcpu.reset_after_init()?;
            init(&mut cpu.local, shared);
        }
        // The page number becomes CS (SDM vol. 3, "MP Initialization Protocol Algorithm"). A second SIPI is ignored.
        Delivery::StartUp { vector } => {
            if cpu.local.phase == Phase::WaitForSipi {
                cpu.vcpu.set_real_mode_entry(u16::from(vector) << 8)?;
                cpu.local.phase = Phase::Running;
            }
        }
    }
    Ok(())
}

/// The effect of INIT on what the VMM holds of a CPU. It removes every paravirtual registration (the nanosecond
/// deadline is the LAPIC's), so that the VMM no longer writes where the guest may since have put something else.
fn init(local: &mut Local, shared: &Shared) {
    let Local {
        index: _,
        apic,
        pvclock,
        pv_eoi,
        steal_time,
        // INIT changes neither TSC nor IA32_TSC_ADJUST.
        tsc_adjust: _,
        due,
        phase,
        halted,
        timer_interrupts: _,
        nmi,
        published_flags: _,
        sti_shadow,
        expired,
        timers,
    } = local;
    apic.init();
    (*expired, *due) = (None, None);
    if let Some(timers) = timers {
        timers.initialized();
    }
    pvclock.reset();
    if let Some(pv_eoi) = pv_eoi {
        pv_eoi.reset();
    }
    if let Some(steal_time) = steal_time {
        steal_time.reset();
    }
    // All CPUs share this registration. Only RDMSR uses it: the structure that it names was written when it was
    // registered.
    *shared.wall.lock() = WallRegistration::default();
    // The bootstrap processor restarts at the reset vector, where a PC has its firmware, others wait for a start-up
    // message (SDM vol. 3, "MP Initialization Protocol Algorithm").
    *phase = if apic.config().bsp { Phase::Running } else { Phase::WaitForSipi };
    (*halted, *nmi, *sti_shadow) = (false, false, false);
    if let Some(vcpu_shared) = shared.vcpu(local.index) {
        vcpu_shared.page.store(0, Ordering::Relaxed);
    }
    publish_route(shared, local);
}
