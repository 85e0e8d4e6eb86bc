//! When an idle vCPU goes on.

use super::{Platform, clock::Clock, cpu::Local, wire};
use crate::time::GuestTsc;

/// The base TSC at which a timer wakes a vCPU, its LAPIC's or the 8254; none if there is none that could.
pub(super) fn due(local: &Local, platform: &Platform, clock: &Clock) -> Option<GuestTsc> {
    let deadline = local.next_wake();
    let own = deadline.and_then(|deadline| clock.due(deadline));
    [own, wire::due(local, platform, clock)].into_iter().flatten().min()
}
