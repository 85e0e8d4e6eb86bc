//! When the next timer interrupts a vCPU.

use vmtime::GuestTsc;

use super::{Local, ioapic, lint0};
use crate::machine::{clock::Clock, shared::Shared};

/// The base TSC at which a timer wakes a vCPU: its LAPIC's, or the 8254. None if no timer can.
pub(crate) fn due(local: &Local, shared: &Shared, clock: &Clock) -> Option<GuestTsc> {
    let deadline = local.next_wake();
    let own = deadline.and_then(|deadline| clock.due(deadline));
    [own, of_devices(local, shared, clock)].into_iter().flatten().min()
}

/// The base TSC at which the 8254 wakes a vCPU, by whichever controller.
fn of_devices(local: &Local, shared: &Shared, clock: &Clock) -> Option<GuestTsc> {
    let devices = shared.devices.lock();
    [lint0::due(local, &devices, clock), ioapic::due(local, &devices, clock)].into_iter().flatten().min()
}

/// The base TSC at which the wake timer is to kick the thread of a vCPU that is about to be entered, or to sleep.
pub(crate) fn interrupt_due(local: &Local, shared: &Shared, clock: &Clock) -> Option<GuestTsc> {
    // If an interrupt waits already, an expiry of the timer changes nothing. Without this check a guest with a short
    // period and interrupts off would be kicked before each instruction.
    let waits = !local.halted && (local.apic.pending().is_some() || local.apic.blocked_by_priority());
    if waits { of_devices(local, shared, clock) } else { due(local, shared, clock) }
}
