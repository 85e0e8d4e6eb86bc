//! The tick layer: absolute expiries on a clockevent that may wake early.

use core::hint::cold_path;

use guest_abi::report::Record;

use crate::clockevent::{ClockEvent, Device, Port};
use crate::pvclock::{BadPage, Begun, Clock, Reading, Sample, Source};
use crate::report::{Sink, Totals};
use crate::scenarios::Scenario;

/// The hardware that the tick layer uses.
pub trait Hardware: Source + Port + Sink {}
impl<M: Source + Port + Sink> Hardware for M {}

/// Whether another tick is coming.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// A tick is armed.
    Waiting,
    /// The scenario is over; the device is shut down.
    Done,
}

/// One scenario on one clockevent.
#[derive(Clone, Copy, Debug)]
pub struct Ticks {
    clock: Clock,
    device: Device,
    scenario: Scenario,
    /// Expiry of the tick that is armed; `u64::MAX` before the start and after the end.
    expires_ns: u64,
    armed_ns: u64,
    deadline: u64,
    early: Early,
    /// A tick is armed.
    waiting: bool,
    totals: Totals,
}

/// Interrupts that came before the expiry of the tick that is armed.
#[derive(Clone, Copy, Debug)]
struct Early {
    wakes: u32,
    first_ns: u64,
}

impl Early {
    const NONE: Self = Self { wakes: 0, first_ns: 0 };
}

impl Ticks {
    /// Ready to [`start`](Self::start). `clock` must be the one that earlier readings were made with.
    #[must_use]
    pub const fn new(clock: Clock, device: Device, scenario: Scenario) -> Self {
        Self {
            clock,
            device,
            scenario,
            expires_ns: u64::MAX,
            armed_ns: 0,
            deadline: 0,
            early: Early::NONE,
            waiting: false,
            totals: Totals::NONE,
        }
    }

    /// Initialises the device and arms the first tick.
    ///
    /// # Errors
    /// [`BadPage`] if the device could not convert the expiry.
    pub fn start<M: Hardware>(&mut self, machine: &mut M) -> Result<State, BadPage> {
        self.begin(machine, None)
    }

    /// As [`start`](Self::start), with periods counted from VM time `origin_ns` and not from now: so the ticks of all
    /// CPUs keep their phase, whenever each CPU starts.
    ///
    /// # Errors
    /// [`BadPage`] if the device could not convert the expiry.
    pub fn start_from<M: Hardware>(&mut self, machine: &mut M, origin_ns: u64) -> Result<State, BadPage> {
        self.begin(machine, Some(origin_ns))
    }

    fn begin<M: Hardware>(&mut self, machine: &mut M, origin_ns: Option<u64>) -> Result<State, BadPage> {
        self.device.set_oneshot(machine);
        let now = self.clock.read(machine);
        self.first(machine, origin_ns.unwrap_or(now.ns), &now)
    }

    /// Arms the device for `at_ns` after the last tick. The interrupt only ends a halt, is no tick, and may come early.
    /// `now` is a recent reading.
    ///
    /// # Errors
    /// [`BadPage`] if the device could not convert the time.
    pub fn wake_at<M: Hardware>(&mut self, machine: &mut M, at_ns: u64, now: &Reading) -> Result<(), BadPage> {
        self.device.set_oneshot(machine);
        self.arm(machine, at_ns, now).map(|_| ())
    }

    /// Notes a reading that was sampled before; for the only CPU.
    pub fn sampled<M: Hardware>(&mut self, machine: &mut M, sample: &Sample) -> Reading {
        self.clock.sampled(machine, sample)
    }

    /// Reads the clock.
    pub fn now<M: Hardware>(&mut self, machine: &mut M) -> Reading {
        self.clock.read(machine)
    }

    /// Finishes a reading that an interrupt's entry code began; for the only CPU.
    #[inline(always)]
    pub fn finish<M: Hardware>(&mut self, machine: &mut M, begun: Begun) -> Reading {
        self.clock.finish(machine, begun)
    }

    /// Handles one timer interrupt, which came at `now`.
    ///
    /// The clock is not read again: with a trapped TSC each read is an exit to the VMM.
    ///
    /// # Errors
    /// [`BadPage`] if the device could not convert the expiry.
    #[inline(always)]
    pub fn interrupt<M: Hardware>(&mut self, machine: &mut M, now: &Reading) -> Result<State, BadPage> {
        if now.ns < self.expires_ns {
            cold_path();
            return self.woken_early(machine, *now);
        }
        let mut tick = Record {
            seq: self.totals.ticks,
            expires_ns: self.expires_ns,
            armed_ns: self.armed_ns,
            first_wake_ns: now.ns,
            fired_ns: now.ns,
            fired_tsc: now.tsc,
            deadline: self.deadline,
            page_version: now.version,
            early_wakes: 0,
            cpu: 0,
            reserved: 0,
        };
        if self.early.wakes != 0 {
            cold_path();
            (tick.early_wakes, tick.first_wake_ns) = (self.early.wakes, self.early.first_ns);
            self.totals.early_wakes += u64::from(self.early.wakes);
            self.early = Early::NONE;
        }
        machine.push(&tick);
        self.totals.add(&tick);
        let Some(expires_ns) = self.scenario.next(tick.expires_ns, now.ns) else {
            cold_path();
            return Ok(self.end(machine));
        };
        self.deadline = self.device.set_next_event(machine, expires_ns, now)?;
        self.expires_ns = expires_ns;
        self.armed_ns = now.ns;
        Ok(State::Waiting)
    }

    /// Handles an interrupt that came before the tick's expiry, or with no tick armed.
    #[cold]
    #[inline(never)]
    fn woken_early<M: Hardware>(&mut self, machine: &mut M, now: Reading) -> Result<State, BadPage> {
        if !self.waiting {
            return Ok(State::Done);
        }
        if self.early.wakes == 0 {
            self.early.first_ns = now.ns;
        }
        self.early.wakes = self.early.wakes.saturating_add(1);
        self.deadline = self.arm(machine, self.expires_ns, &now)?;
        Ok(State::Waiting)
    }

    /// Arms the first tick.
    fn first<M: Hardware>(&mut self, machine: &mut M, origin_ns: u64, now: &Reading) -> Result<State, BadPage> {
        let Some(expires_ns) = self.scenario.next(origin_ns, now.ns) else { return Ok(self.end(machine)) };
        self.deadline = self.arm(machine, expires_ns, now)?;
        (self.expires_ns, self.armed_ns, self.waiting) = (expires_ns, now.ns, true);
        Ok(State::Waiting)
    }

    /// Arms the device. A function of its own, so that only the usual tick has this code inlined.
    #[inline(never)]
    fn arm<M: Hardware>(&mut self, machine: &mut M, expires_ns: u64, now: &Reading) -> Result<u64, BadPage> {
        self.device.set_next_event(machine, expires_ns, now)
    }

    /// Ends the scenario.
    #[cold]
    #[inline(never)]
    fn end<M: Hardware>(&mut self, machine: &mut M) -> State {
        (self.expires_ns, self.waiting) = (u64::MAX, false);
        self.device.shutdown(machine);
        State::Done
    }

    /// Totals so far.
    #[must_use]
    pub fn totals(&self) -> Totals {
        self.totals
    }

    /// The clock that the ticks are read from.
    #[must_use]
    pub fn clock(&self) -> &Clock {
        &self.clock
    }
}

#[cfg(test)]
mod tests;
