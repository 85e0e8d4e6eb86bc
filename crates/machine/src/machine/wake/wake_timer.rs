//! The timer that calls a vCPU's thread, out of KVM_RUN or out of its sleep.
//!
//! In real time: for what the guest waits for, a little before it (see [`super::halt_poll`]). In virtual time: when a guest has
//! spun for longer than it may.

use std::{sync::atomic::Ordering, time::Duration};

use vmtime::{GuestTsc, HostTsc};

use super::{halt_poll::HaltPoll, pulse::Pulse};
use crate::{
    host::{
        clock::HostClock,
        kick::{self, KickTimer},
        start_pages::release_start_pages,
    },
    machine::{
        clock::Clock,
        config::TimeMode,
        error::RunError,
        shared::{Shared, VcpuShared, doorbell::Doorbell},
    },
};

/// Real time: what a guest may at least run before a timer kicks it. An entry and an exit cost some 10 µs.
const SHORTEST_RUN: Duration = Duration::from_micros(30);

/// Real time: what is too short to set a timer for: the timer's clock and the TSC go apart by up to 500 ppm, as NTP slews
/// the one, and a timer that came so much sooner than the TSC says would be set once more.
const SLEW_NS: u64 = 2_000;

/// Real time: a halt that is long enough to give pages back in.
const LONG_PAUSE: Duration = Duration::from_millis(5);

/// By what part of its time a long timer may come too soon, for the same reason and with room to spare.
const SLEW_PART: u32 = 1024;

/// The timer of one thread.
pub(crate) struct WakeTimer {
    timer: KickTimer,
    armed: Option<Armed>,
    /// Real time: kicks at the instant that the caller wants the vCPU back. Apart, so that it is set once, and not each
    /// time that the guest waits for nothing.
    stop_timer: KickTimer,
    /// What that is set for, and the host TSC from which on it may come.
    stop: Option<(GuestTsc, HostTsc)>,
    early: HaltPoll,
    pulse: Pulse,
    /// Up to when time was counted for [`HaltPoll::earn`].
    earned: HostTsc,
}

/// What the alarm is set for, so that it is not set again on every exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Armed {
    /// Real time.
    At(Call),
    /// Real time: the call came, and this host TSC is to be waited for.
    Come(HostTsc),
    /// Virtual time: the spin budget.
    Budget,
}

/// Real time: a call, and what it is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Call {
    /// The base TSC that is waited for.
    target: GuestTsc,
    /// The host TSC at which it is reached.
    due: HostTsc,
    /// When the call is to come.
    at: HostTsc,
    /// How long before `due` it may come, in nanoseconds.
    window: u64,
}

impl Call {
    /// Whether the rest is to be polled for.
    fn came(&self, host: HostClock, now: HostTsc) -> bool {
        ns(host, now, self.due) <= self.window.saturating_add(SLEW_NS)
    }
}

impl WakeTimer {
    /// An alarm for the calling thread.
    pub(crate) fn new(shared: &Shared) -> Result<Self, RunError> {
        let earned = shared.clock.lock().host().tsc();
        Ok(Self {
            timer: KickTimer::new()?,
            armed: None,
            stop_timer: KickTimer::new()?,
            stop: None,
            early: HaltPoll::new(shared.poll),
            pulse: Pulse::new()?,
            earned,
        })
    }

    /// Sets it before an entry, or before the vCPU's thread sleeps because it is `halted`; `target` gives the base TSC at
    /// which something is to interrupt the vCPU.
    pub(crate) fn set(
        &mut self,
        shared: &Shared,
        mode: TimeMode,
        stop: Option<GuestTsc>,
        halted: bool,
        target: impl FnOnce(&Clock) -> Option<GuestTsc>,
    ) {
        match mode {
            TimeMode::Virtual => {
                if let Some(limit) = shared.spin_limit.filter(|_| self.armed.is_none()) {
                    self.armed = Some(Armed::Budget);
                    // What is left of it: each run has an alarm of its own, the budget is the guest's.
                    self.arm(shared, limit.saturating_sub(shared.clock.lock().since_operation()));
                }
            }
            TimeMode::Real => {
                self.set_for_stop(shared, stop);
                self.set_for_deadline(shared, halted, target);
            }
        }
    }

    /// Real time: the vCPU of `vcpu_shared` is about to be entered, as the clock was when the host's TSC was `read`. False if it must
    /// not be: see [`Pulse::enter`].
    pub(crate) fn enter(&mut self, shared: &Shared, vcpu_shared: &VcpuShared, read: HostTsc) -> bool {
        let host = shared.clock.lock().host();
        self.pulse.enter(shared, vcpu_shared, host, read)
    }

    /// Real time: the vCPU of `vcpu_shared` waits; `unwakeable`: for nothing that a timer could bring.
    pub(crate) fn idle(&self, shared: &Shared, vcpu_shared: &VcpuShared, unwakeable: bool) {
        let due = match self.armed {
            Some(Armed::At(call)) if !unwakeable => Some(call.due),
            Some(Armed::Come(due)) if !unwakeable => Some(due),
            _ => None,
        };
        let now = shared.clock.lock().host().tsc();
        vcpu_shared.last_run.idle(now, due);
    }

    /// Real time: kicks at `stop`, whatever the vCPU then does.
    pub(crate) fn set_for_stop(&mut self, shared: &Shared, stop: Option<GuestTsc>) {
        let Some(stop) = stop.filter(|stop| self.stop.is_none_or(|(set, _)| set != *stop)) else { return };
        let (host, at) = {
            let clock = shared.clock.lock();
            (clock.host(), clock.host_at(stop))
        };
        if let Some(at) = at {
            let now = host.tsc();
            let left = host.duration(now, at);
            self.stop_timer.arm(left);
            self.stop = Some((stop, host.after(now, left.saturating_sub(left / SLEW_PART))));
        }
    }

    fn set_for_deadline(&mut self, shared: &Shared, halted: bool, target: impl FnOnce(&Clock) -> Option<GuestTsc>) {
        let (host, target, due) = {
            let clock = shared.clock.lock();
            let target = target(&clock);
            (clock.host(), target, target.and_then(|target| clock.host_at(target)))
        };
        let (Some(target), Some(due)) = (target, due) else {
            // What it is still set for comes for nothing, once.
            self.armed = None;
            return;
        };
        // A halted guest still waits for what the call came for.
        let same = match self.armed {
            Some(Armed::At(call)) => call.target == target,
            Some(Armed::Come(_)) => halted,
            Some(Armed::Budget) | None => false,
        };
        if same {
            return;
        }
        let now = host.tsc();
        self.early.earn(ns(host, self.earned, now));
        self.earned = now;
        let left = host.duration(now, due);
        let window = self.early.window();
        let sooner = match left.checked_sub(Duration::from_nanos(window)) {
            // Sooner than a guest gets to its next instruction would keep it from it.
            Some(sooner) if !halted => sooner.max(SHORTEST_RUN),
            None if !halted => SHORTEST_RUN,
            Some(sooner) => sooner,
            None => Duration::ZERO,
        };
        if !sooner.is_zero() {
            self.arm(shared, sooner);
        }
        self.armed = Some(Armed::At(Call { target, due, at: host.after(now, sooner), window }));
    }

    /// Kicks the thread as soon as the guest got anywhere.
    pub(crate) fn set_soon(&mut self, shared: &Shared) {
        self.arm(shared, SHORTEST_RUN);
        self.armed = None;
    }

    fn arm(&self, shared: &Shared, delay: Duration) {
        self.timer.arm(delay);
        shared.costs.timers_set.fetch_add(1, Ordering::Relaxed);
    }

    /// Real time: gives back, once, the pages that only the start needed. That stops every thread for some hundred
    /// microseconds, so it waits for a guest that halts for longer than that.
    fn settle_down(&self, shared: &Shared) {
        let long = match self.armed {
            Some(Armed::At(call)) => {
                let host = shared.clock.lock().host();
                host.duration(host.tsc(), call.at) >= LONG_PAUSE
            }
            Some(Armed::Come(_)) => false,
            Some(Armed::Budget) | None => true,
        };
        if long && !shared.settled_down.swap(true, Ordering::Relaxed) {
            release_start_pages();
        }
    }

    /// Real time: sleeps until `doorbell` rings or the call comes; if it has come, polls. (What there was to do before that
    /// has then just been done once, in vain: it is done again in a third of the time, with warm caches.)
    pub(crate) fn sleep(&mut self, doorbell: &Doorbell, shared: &Shared, unwakeable: bool) {
        let came = match self.armed {
            Some(Armed::At(call)) => {
                let host = shared.clock.lock().host();
                call.came(host, host.tsc())
            }
            Some(Armed::Come(_)) => {
                self.poll(shared);
                true
            }
            Some(Armed::Budget) | None => false,
        };
        if !came {
            // A CPU that was not started yet is no sign that the guest's start is over.
            if !unwakeable && !shared.settled_down.load(Ordering::Relaxed) {
                self.settle_down(shared);
            }
            shared.costs.sleeps.fetch_add(1, Ordering::Relaxed);
            doorbell.sleep();
        }
    }

    /// Real time: looks whether the call has come. `kicked`: the thread was kicked, perhaps by this timer, perhaps sooner
    /// than the TSC says (NTP slews the timer's clock): then it is set again.
    pub(crate) fn look(&mut self, kicked: bool, shared: &Shared) {
        let host = shared.clock.lock().host();
        let now = host.tsc();
        // If it came for the stop and the stop is not reached, it is set once more.
        if kicked && self.stop.is_some_and(|(_, soonest)| now >= soonest) {
            self.stop = None;
        }
        let for_pulse = kicked && self.pulse.came(now);
        let Some(Armed::At(call)) = self.armed else { return };
        if !call.came(host, now) {
            if kicked && !for_pulse {
                self.armed = None;
            }
            return;
        }
        if kicked {
            self.early.woke(ns(host, call.at, now));
        }
        self.armed = Some(Armed::Come(call.due));
    }

    /// Real time: if the call has come, waits for what it was for.
    pub(crate) fn poll(&mut self, shared: &Shared) {
        let Some(Armed::Come(due)) = self.armed else { return };
        self.armed = None;
        let host = shared.clock.lock().host();
        let now = host.tsc();
        let mut end = now;
        while end < due && !kick::pending() {
            std::hint::spin_loop();
            end = host.tsc();
        }
        let polled = ns(host, now, end);
        self.early.spend(polled);
        shared.costs.polled_ns.fetch_add(polled, Ordering::Relaxed);
    }

    /// Virtual time: the thread was kicked, perhaps because the budget is over. If it is: what it was.
    pub(crate) fn rang(&mut self, shared: &Shared) -> Option<Duration> {
        let budget = self.armed.take() == Some(Armed::Budget);
        shared.spin_limit.filter(|limit| budget && shared.clock.lock().since_operation() >= *limit)
    }
}

fn ns(host: HostClock, from: HostTsc, to: HostTsc) -> u64 {
    u64::try_from(host.duration(from, to).as_nanos()).unwrap_or(u64::MAX)
}
