//! When an idle vCPU goes on.

use vmtime::GuestTsc;

use super::{Local, lint0};
use crate::machine::{clock::Clock, shared::Shared};

/// The base TSC at which a timer wakes a vCPU, its LAPIC's or the 8254; none if there is none that could.
pub(crate) fn due(local: &Local, shared: &Shared, clock: &Clock) -> Option<GuestTsc> {
    let deadline = local.next_wake();
    let own = deadline.and_then(|deadline| clock.due(deadline));
    [own, lint0::due(local, shared, clock)].into_iter().flatten().min()
}

/// The base TSC at which a timer is to bring back a vCPU that is about to be entered, or to sleep.
pub(crate) fn interrupt_due(local: &Local, shared: &Shared, clock: &Clock) -> Option<GuestTsc> {
    // An expiry whose interrupt waits already changes nothing: a guest with a short period and interrupts off would be
    // kicked before each instruction.
    let waits = !local.halted && (local.apic.pending().is_some() || local.apic.blocked_by_priority());
    if waits { lint0::due(local, shared, clock) } else { due(local, shared, clock) }
}
