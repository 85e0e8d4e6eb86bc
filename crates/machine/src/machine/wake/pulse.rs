//! Ends each entry after [`PULSE`]. Otherwise a guest that computes without exits would look like a gap in which no
//! vCPU ran.

use vmtime::HostTsc;

use crate::{
    host::{clock::HostClock, kick::KickTimer},
    machine::{
        error::RunError,
        instant::HostInstant,
        shared::{
            Shared, VcpuShared,
            host_stop::{GAP, Gap, PULSE, slept},
        },
    },
};

/// Whether the host has slept, and its TSC has not counted meanwhile, since some vCPU last ran. If not, notes that one
/// runs now.
fn did_sleep(shared: &Shared, host: HostClock) -> bool {
    let now = HostInstant::now(host);
    let known = std::mem::replace(&mut *shared.last_known_running.lock(), now);
    let Some(slept) = slept(host, known, now) else { return false };
    let from = HostInstant { boot: now.boot.before(slept), slept: known.slept, ..now };
    shared.found_gap(Gap { from, tsc_restarted: false });
    true
}

/// The timer that ends the entries of one vCPU, by a kick of its thread.
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

    /// Call it when the thread was kicked, with the time: whether this timer has expired. It is then no longer set.
    pub(crate) fn take_expired(&mut self, now: HostTsc) -> bool {
        let expired = self.due.is_some_and(|due| due <= now);
        self.due = self.due.filter(|_| !expired);
        expired
    }

    /// Call it before an entry: sets the timer, and notes until when the vCPU of `vcpu_shared` may run. False if the
    /// vCPU must not be entered, because there was a gap since the clock was read, when the host's TSC was `read`.
    pub(crate) fn enter(&mut self, shared: &Shared, vcpu_shared: &VcpuShared, host: HostClock, read: HostTsc) -> bool {
        let now = host.tsc();
        let due = match self.due.filter(|due| now < *due) {
            Some(due) => due,
            None => {
                if did_sleep(shared, host) {
                    return false;
                }
                self.timer.arm(PULSE);
                host.after(host.tsc(), PULSE)
            }
        };
        // After the timer was set: a gap that begins later than this check is longer than the timer, so that the entry
        // ends at once.
        if host.duration(read, host.tsc()) > GAP {
            return false;
        }
        self.due = Some(due);
        vcpu_shared.last_run.note(due, Some(HostTsc(0)));
        true
    }
}
