//! When an idle vCPU goes on.

use std::time::Duration;

use super::{clock::Clock, cpu::Cpu};
use crate::time::GuestTsc;

/// A guest may ask for wakes a nanosecond apart; the host's scheduler is asked for nothing shorter than this.
const SHORTEST_SLEEP: Duration = Duration::from_micros(1);

/// The base TSC at which `cpu`'s own timer wakes it; none if it has no timer that could, or is `deaf`.
pub(super) fn due(cpu: &Cpu, clock: &Clock, deaf: bool) -> Option<GuestTsc> {
    let deadline = cpu.local.apic.next_wake().filter(|_| !deaf)?;
    clock.due(deadline, cpu.local.tsc_adjust)
}

/// Real time: how long to sleep for `target`; none = until called.
///
/// The sleep runs on CLOCK_MONOTONIC, which NTP may slew: the caller reads the TSC again and comes back if it woke early.
pub(super) fn sleep_for(clock: &Clock, target: Option<GuestTsc>) -> Option<Duration> {
    let left = clock.until(target?)?;
    Some(if left.is_zero() { left } else { left.max(SHORTEST_SLEEP) })
}
