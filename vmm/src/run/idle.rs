//! A halted vCPU: sleep until its next deadline (real time), or jump there (virtual time).

use std::time::Duration;

use super::{Platform, TimeMode, cpu::Cpu, mailbox::Interruptions, platform::lock};
use crate::time::GuestTsc;

/// How a halted vCPU goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wake {
    /// Look again: something may be due, or somebody waits.
    Look,
    /// Virtual time: no timer is armed and nobody could come.
    Never,
}

/// A guest may ask for wakes a nanosecond apart; the host's scheduler is asked for nothing shorter than this.
const SHORTEST_SLEEP: Duration = Duration::from_micros(1);

/// Waits until the next deliverable deadline or `stop`, whichever is first, or until somebody waits.
pub(super) fn wait(cpu: &Cpu, platform: &Platform, mailbox: &impl Interruptions, stop: Option<GuestTsc>) -> Wake {
    let mut clock = lock(&platform.clock);
    let due = cpu.local.apic.next_wake().and_then(|deadline| clock.due(deadline, cpu.local.tsc_adjust));
    let target = [due, stop].into_iter().flatten().min();
    match (clock.mode(), target) {
        (TimeMode::Virtual, Some(target)) => clock.jump_to(target),
        (TimeMode::Virtual, None) if !mailbox.can_come() => return Wake::Never,
        (_, None) => {
            drop(clock);
            mailbox.sleep(None);
        }
        (TimeMode::Real, Some(target)) => {
            // The wait runs on CLOCK_MONOTONIC, which NTP may slew: the caller reads the TSC again and comes back if it
            // woke early.
            let left = clock.until(target);
            drop(clock);
            if left != Some(Duration::ZERO) {
                mailbox.sleep(left.map(|left| left.max(SHORTEST_SLEEP)));
            }
        }
    }
    Wake::Look
}
