//! From the I/O APIC to the LAPICs.
//!
//! What it sends goes into the vCPUs' inboxes, as what LAPICs send each other. A vCPU that has made it send something
//! (by an access, or because it found the 8254 due) takes the messages from it and posts them.
//!
//! The vCPUs that the 8254's interrupt is for wait for its next edge as for their own timers: the first that finds it
//! due sends it.

use vlapic::DeliveryMode;
use vmtime::{GuestTsc, Now};

use super::{Cpu, Local, ipi};
use crate::{
    devices::Devices,
    machine::{clock::Clock, cpu_index::CpuIndex, error::RunError, shared::Shared},
};

/// Advances the devices to `now`, sends and takes what that makes the I/O APIC send, and returns the output of the 8259
/// pair.
pub(crate) fn advance(cpu: &mut Cpu, shared: &Shared, now: Now) -> Result<bool, RunError> {
    let (line, has_message) = {
        let mut devices = shared.devices.lock();
        devices.advance(now.vm);
        (devices.interrupts(), devices.has_message())
    };
    if has_message {
        send(shared, &cpu.local);
        ipi::receive(cpu, shared)?;
    }
    Ok(line)
}

/// Accesses the devices, and sends what that makes the I/O APIC send; `local` is of the vCPU whose thread this is.
pub(crate) fn access<T>(shared: &Shared, local: &Local, access: impl FnOnce(&mut Devices) -> T) -> T {
    let (result, has_message) = {
        let mut devices = shared.devices.lock();
        (access(&mut devices), devices.has_message())
    };
    if has_message {
        send(shared, local);
    }
    result
}

/// Sends all that the I/O APIC has to send.
fn send(shared: &Shared, local: &Local) {
    loop {
        // The lock is free again while the message is posted: inboxes come after devices.
        let message = shared.devices.lock().take_message();
        let Some((pin, message)) = message else { return };
        if !ipi::post(shared, message, local.index.place(), None) {
            shared.devices.lock().not_accepted(pin);
        }
    }
}

/// `local` has ended the level-triggered interrupt `vector`.
pub(crate) fn end_of_interrupt(shared: &Shared, local: &Local, vector: u8) {
    access(shared, local, |devices| devices.end_of_interrupt(vector));
}

/// The base TSC at which the 8254 next interrupts this CPU through the I/O APIC; none if it will not.
pub(crate) fn due(local: &Local, devices: &Devices, clock: &Clock) -> Option<GuestTsc> {
    let (at, (_, destination)) = devices.next_message()?;
    local.apic.addressed_by(destination, false).then(|| clock.least_tsc(at)).flatten()
}

/// Whether the 8254's next interrupt is an NMI for this CPU, which wakes it from any HLT but one in an NMI handler.
pub(crate) fn brings_nmi(local: &Local, shared: &Shared) -> bool {
    let next = shared.devices.lock().next_message();
    next.is_some_and(|(_, (mode, destination))| {
        mode == DeliveryMode::Nmi && local.apic.addressed_by(destination, false)
    })
}

/// After an access by `local` that may have changed when the 8254 next interrupts, or whom: makes the other vCPUs that
/// wait for it look again. The first is one of them, because LINT0 is its.
pub(crate) fn ring_waiting(shared: &Shared, local: &Local) {
    let next = shared.devices.lock().next_message().map(|(_, message)| message);
    for (index, vcpu_shared) in CpuIndex::all().zip(&shared.vcpus).filter(|(index, _)| *index != local.index) {
        let route = *vcpu_shared.route.lock();
        let mode = next.zip(route).and_then(|((mode, to), route)| route.addressed_by(to, false).then_some(mode));
        // One that halted with interrupts off has noted that no timer can wake it.
        if mode == Some(DeliveryMode::Nmi) {
            shared.set_wakeable(index);
        }
        if mode.is_some() || index == CpuIndex::FIRST {
            vcpu_shared.doorbell.ring();
        }
    }
}
