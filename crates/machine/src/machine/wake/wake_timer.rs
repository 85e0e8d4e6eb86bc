//! The timer that kicks a vCPU's thread out of KVM_RUN or out of its sleep.
//!
//! In real time it expires a little before the guest's next deadline (see [`super::halt_poll`]). In virtual time it
//! expires when a guest has spun for too long.

use std::{sync::atomic::Ordering, time::Duration};

use vmtime::{GuestTsc, HostTsc};

use super::{halt_poll::HaltPoll, pulse::Pulse};
use crate::{
    host::{
        clock::HostClock,
        kick::{self, KickTimer},
        os_clocks::thread_cpu_time,
        start_pages::release_start_pages,
    },
    machine::{
        clock::Clock,
        config::TimeMode,
        error::RunError,
        shared::{Shared, VcpuShared, doorbell::Doorbell},
    },
};

/// Real time: the shortest time that a guest runs before this timer kicks it. An entry and an exit cost some 10 µs.
const SHORTEST_RUN: Duration = Duration::from_micros(30);

/// Real time: a wait of this length is polled, without setting the timer again. NTP slews the timer's clock by up to
/// 500 ppm against the TSC, so the timer may expire this much before the TSC reaches the deadline.
const SLEW_NS: u64 = 2_000;

/// Real time: a halt that is long enough for [`release_start_pages`].
const LONG_PAUSE: Duration = Duration::from_millis(5);

/// A long timer may expire this part of its time too soon: because of the same slewing, with a margin.
const SLEW_PART: u32 = 1024;

/// The wake timer of one vCPU's thread.
pub(crate) struct WakeTimer {
    timer: KickTimer,
    armed: Option<Armed>,
    /// Real time: kicks at the TSC at which the caller wants to stop. A timer of its own, so that it is set only once.
    stop_timer: KickTimer,
    /// The stop that it is set for, and the earliest host TSC at which it may expire.
    stop: Option<(GuestTsc, HostTsc)>,
    halt_poll: HaltPoll,
    pulse: Pulse,
    /// The host TSC of the last [`HaltPoll::add_credit`].
    credited_until: HostTsc,
    /// Virtual time: the last operation that was noticed, and this thread's CPU time then.
    spinning_since: Option<(HostTsc, Duration)>,
}

/// What the timer is set for, so that it is not set again on every exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Armed {
    /// Real time: the guest's next deadline.
    Deadline(Expiry),
    /// Real time: the timer has expired, and the thread is to poll until this host TSC.
    PollUntil(HostTsc),
    /// Virtual time: the spin limit.
    SpinLimit,
}

/// Real time: when the timer expires, and for which deadline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Expiry {
    /// The deadline, as a base TSC.
    target: GuestTsc,
    /// The deadline, as a host TSC.
    due: HostTsc,
    /// When the timer is to expire.
    expires: HostTsc,
    /// How long before `due` the thread may begin to poll.
    window_ns: u64,
}

impl Expiry {
    /// Whether `due` is near enough at `now` to poll for it.
    fn is_near(&self, host: HostClock, now: HostTsc) -> bool {
        ns(host, now, self.due) <= self.window_ns.saturating_add(SLEW_NS)
    }
}

impl WakeTimer {
    /// The wake timer of the calling thread.
    pub(crate) fn new(shared: &Shared) -> Result<Self, RunError> {
        let credited_until = shared.clock.lock().host().tsc();
        Ok(Self {
            timer: KickTimer::new()?,
            armed: None,
            stop_timer: KickTimer::new()?,
            stop: None,
            halt_poll: HaltPoll::new(shared.poll),
            pulse: Pulse::new()?,
            credited_until,
            spinning_since: None,
        })
    }

    /// Sets the timer before an entry, or before the thread sleeps because its vCPU is `halted`. `target` returns the
    /// base TSC of the vCPU's next deadline.
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
                    self.armed = Some(Armed::SpinLimit);
                    // CPU time is not more than the time that passes, so that the timer is not late.
                    let left = limit.saturating_sub(self.spun(shared));
                    self.arm(shared, left.max(SHORTEST_RUN));
                }
            }
            TimeMode::Real => {
                self.set_for_stop(shared, stop);
                self.set_for_deadline(shared, halted, target);
            }
        }
    }

    /// Real time: call it before an entry of the vCPU of `vcpu_shared`, with the host TSC at which the clock was
    /// `read`. False if the vCPU must not be entered: see [`Pulse::enter`].
    pub(crate) fn enter(&mut self, shared: &Shared, vcpu_shared: &VcpuShared, read: HostTsc) -> bool {
        let host = shared.clock.lock().host();
        self.pulse.enter(shared, vcpu_shared, host, read)
    }

    /// Real time: the deadline that the thread waits for, if it waits for one.
    pub(crate) fn due(&self) -> Option<HostTsc> {
        match self.armed {
            Some(Armed::Deadline(expiry)) => Some(expiry.due),
            Some(Armed::PollUntil(due)) => Some(due),
            Some(Armed::SpinLimit) | None => None,
        }
    }

    /// Real time: sets the timer that kicks the thread at `stop`.
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
            // The timer may still expire once. That kick has no effect.
            self.armed = None;
            return;
        };
        // While the vCPU is halted, the thread has yet to poll for the deadline of the timer that has expired.
        let same = match self.armed {
            Some(Armed::Deadline(expiry)) => expiry.target == target,
            Some(Armed::PollUntil(_)) => halted,
            Some(Armed::SpinLimit) | None => false,
        };
        if same {
            return;
        }
        let now = host.tsc();
        self.halt_poll.add_credit(ns(host, self.credited_until, now));
        self.credited_until = now;
        let left = host.duration(now, due);
        let window_ns = self.halt_poll.window_ns();
        let sooner = match left.checked_sub(Duration::from_nanos(window_ns)) {
            // A shorter timer could expire before the guest executes an instruction, each time.
            Some(sooner) if !halted => sooner.max(SHORTEST_RUN),
            None if !halted => SHORTEST_RUN,
            Some(sooner) => sooner,
            None => Duration::ZERO,
        };
        if !sooner.is_zero() {
            self.arm(shared, sooner);
        }
        self.armed = Some(Armed::Deadline(Expiry { target, due, expires: host.after(now, sooner), window_ns }));
    }

    /// Kicks the thread shortly after the entry, so that it tries again to inject.
    pub(crate) fn set_for_retry(&mut self, shared: &Shared) {
        self.arm(shared, SHORTEST_RUN);
        self.armed = None;
    }

    fn arm(&self, shared: &Shared, delay: Duration) {
        self.timer.arm(delay);
        shared.costs.timers_set.fetch_add(1, Ordering::Relaxed);
    }

    /// Real time: releases, once, the pages that only the start needed. That stops every thread for some hundred
    /// microseconds, so it is done only when the guest halts for longer than that.
    fn release_start_pages_in_long_halt(&self, shared: &Shared) {
        let long = match self.armed {
            Some(Armed::Deadline(expiry)) => {
                let host = shared.clock.lock().host();
                host.duration(host.tsc(), expiry.expires) >= LONG_PAUSE
            }
            Some(Armed::PollUntil(_)) => false,
            Some(Armed::SpinLimit) | None => true,
        };
        if long && !shared.start_pages_released.swap(true, Ordering::Relaxed) {
            release_start_pages();
        }
    }

    /// Real time: sleeps until `doorbell` rings or the timer expires. If the timer has expired, polls instead.
    ///
    /// A halted vCPU polls here, after the step that found nothing to do, and not before that step: the step that
    /// follows the poll then runs with warm caches, in a third of the time.
    pub(crate) fn sleep(&mut self, doorbell: &Doorbell, shared: &Shared, unwakeable: bool) {
        let expired = match self.armed {
            Some(Armed::Deadline(expiry)) => {
                let host = shared.clock.lock().host();
                expiry.is_near(host, host.tsc())
            }
            Some(Armed::PollUntil(_)) => {
                self.poll(shared);
                true
            }
            Some(Armed::SpinLimit) | None => false,
        };
        if !expired {
            // A CPU that waits for a start-up message does not show that the guest has booted.
            if !unwakeable && !shared.start_pages_released.load(Ordering::Relaxed) {
                self.release_start_pages_in_long_halt(shared);
            }
            shared.costs.sleeps.fetch_add(1, Ordering::Relaxed);
            doorbell.sleep();
        }
    }

    /// Real time: checks whether the timer has expired. `kicked`: the thread was kicked, perhaps by this timer, and
    /// perhaps before the TSC reached the instant (NTP slews the timer's clock). The timer is then set again.
    pub(crate) fn check_expiry(&mut self, kicked: bool, shared: &Shared) {
        let host = shared.clock.lock().host();
        let now = host.tsc();
        // The stop's timer has expired. If the stop is not reached, it is set again.
        if kicked && self.stop.is_some_and(|(_, soonest)| now >= soonest) {
            self.stop = None;
        }
        let for_pulse = kicked && self.pulse.take_expired(now);
        let Some(Armed::Deadline(expiry)) = self.armed else { return };
        if !expiry.is_near(host, now) {
            if kicked && !for_pulse {
                self.armed = None;
            }
            return;
        }
        if kicked {
            self.halt_poll.learn(ns(host, expiry.expires, now));
        }
        self.armed = Some(Armed::PollUntil(expiry.due));
    }

    /// Real time: if the timer has expired, polls the TSC until the deadline.
    pub(crate) fn poll(&mut self, shared: &Shared) {
        let Some(Armed::PollUntil(due)) = self.armed else { return };
        self.armed = None;
        let host = shared.clock.lock().host();
        let now = host.tsc();
        let mut end = now;
        while end < due && !kick::pending() {
            std::hint::spin_loop();
            end = host.tsc();
        }
        let polled = ns(host, now, end);
        self.halt_poll.spend(polled);
        shared.costs.polled_ns.fetch_add(polled, Ordering::Relaxed);
    }

    /// Virtual time: call it when the thread was kicked. Returns the spin limit if the guest has exceeded it.
    pub(crate) fn spin_limit_exceeded(&mut self, shared: &Shared) -> Option<Duration> {
        let was_armed = self.armed.take() == Some(Armed::SpinLimit);
        shared.spin_limit.filter(|limit| was_armed && self.spun(shared) >= *limit)
    }

    /// CPU time since the guest's last operation was noticed. Not wall time: on a busy host a guest that does not spin
    /// may have to wait for long. The operation is noticed one limit late at most.
    fn spun(&mut self, shared: &Shared) -> Duration {
        let (last, now) = (shared.clock.lock().last_operation(), thread_cpu_time());
        let (_, begun) = *self.spinning_since.insert(match self.spinning_since {
            Some(since @ (operation, _)) if operation == last => since,
            _ => (last, now),
        });
        now.saturating_sub(begun)
    }
}

fn ns(host: HostClock, from: HostTsc, to: HostTsc) -> u64 {
    u64::try_from(host.duration(from, to).as_nanos()).unwrap_or(u64::MAX)
}
