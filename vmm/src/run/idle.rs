//! When an idle vCPU goes on.

use std::time::Duration;

use super::{Platform, clock::Clock, cpu::Cpu, wire};
use crate::time::GuestTsc;

/// A guest may ask for wakes a nanosecond apart; the host's scheduler is asked for nothing shorter than this.
const SHORTEST_SLEEP: Duration = Duration::from_micros(1);

/// The base TSC at which a timer wakes `cpu`, its LAPIC's or the 8254; none if there is none that could, or it is `deaf`.
pub(super) fn due(cpu: &Cpu, platform: &Platform, clock: &Clock, deaf: bool) -> Option<GuestTsc> {
    if deaf {
        return None;
    }
    let deadline = cpu.local.apic.next_wake();
    let own = deadline.and_then(|deadline| clock.due(deadline, cpu.local.tsc_adjust));
    [own, wire::due(&cpu.local, platform, clock)].into_iter().flatten().min()
}

/// Real time: how long to sleep for `target`; none = until called.
///
/// The sleep runs on CLOCK_MONOTONIC, which NTP may slew: the caller reads the TSC again and comes back if it woke early.
pub(super) fn sleep_for(clock: &Clock, target: Option<GuestTsc>) -> Option<Duration> {
    let left = clock.until(target?)?;
    Some(if left.is_zero() { left } else { left.max(SHORTEST_SLEEP) })
}
