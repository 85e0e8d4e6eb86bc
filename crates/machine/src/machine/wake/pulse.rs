//! The end of each entry after a while, so that a gap in which no vCPU ran can be told from a guest that computes.

use vmtime::HostTsc;

use crate::{
    host::{clock::HostClock, kick::KickTimer},
    machine::{
        error::RunError,
        shared::{
            Shared, VcpuShared,
            host_stop::{GAP, Gap, HostInstant, PULSE, slept},
        },
    },
};

/// Whether the host has slept, without counting, since some vCPU last ran; if not, one runs now.
fn did_sleep(shared: &Shared, host: HostClock) -> bool {
    let now = HostInstant::now(host);
    let known = std::mem::replace(&mut *shared.known_to_run.lock(), now);
    let Some(slept) = slept(host, known, now) else { return false };
    let from = HostInstant { tsc: now.tsc, boot: now.boot.before(slept) };
    shared.found_gap(Gap { from, tsc_restarted: false });
    true
}

/// Ends the entries of one vCPU, by a timer of its thread's.
pub(crate) struct Pulse {
    timer: KickTimer,
    /// When the timer kicks or kicked.
    due: Option<HostTsc>,
}

impl Pulse {
    /// For the calling thread.
    pub(crate) fn new() -> Result<Self, RunError> {
        Ok(Self { timer: KickTimer::new()?, due: None })
    }

    /// The thread was kicked, at `now`: whether this timer did it, or did it too.
    pub(crate) fn came(&mut self, now: HostTsc) -> bool {
        let came = self.due.is_some_and(|due| due <= now);
        self.due = self.due.filter(|_| !came);
        came
    }

    /// The vCPU of `vcpu_shared` is about to be entered, as the clock was when the host's TSC was `read`. False if it must not be:
    /// there was a gap in between.
    pub(crate) fn enter(&mut self, shared: &Shared, vcpu_shared: &VcpuShared, host: HostClock, read: HostTsc) -> bool {
        let now = host.tsc();
        if host.duration(read, now) > GAP {
            return false;
        }
        let due = match self.due.filter(|due| now < *due) {
            Some(due) => due,
            None => {
                if did_sleep(shared, host) {
                    return false;
                }
                self.timer.arm(PULSE);
                host.after(now, PULSE)
            }
        };
        self.due = Some(due);
        vcpu_shared.last_run.note(due, Some(HostTsc(0)));
        true
    }
}
