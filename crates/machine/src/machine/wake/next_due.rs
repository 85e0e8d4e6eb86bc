//! When an idle vCPU goes on.

use vmtime::GuestTsc;

use crate::machine::{
    clock::Clock,
    shared::Shared,
    vcpu::{Local, lint0},
};

/// The base TSC at which a timer wakes a vCPU, its LAPIC's or the 8254; none if there is none that could.
pub(crate) fn due(local: &Local, shared: &Shared, clock: &Clock) -> Option<GuestTsc> {
    let deadline = local.next_wake();
    let own = deadline.and_then(|deadline| clock.due(deadline));
    [own, lint0::due(local, shared, clock)].into_iter().flatten().min()
}
