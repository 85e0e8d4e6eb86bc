//! The tick layer: absolute expiries on a clockevent that may wake early.

use guest_abi::report::Record;

use crate::clockevent::{ClockEvent, Device, Port};
use crate::pvclock::{BadPage, Clock, Reading, Source};
use crate::report::{Sink, Totals};
use crate::scenarios::Scenario;

/// All that the tick layer touches.
pub trait Machine: Source + Port + Sink {}
impl<M: Source + Port + Sink> Machine for M {}

/// Whether there is a tick to wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// One is armed.
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
    /// The tick in flight; its `fired_*` fields are not set yet. `None` before the start and after the end.
    current: Option<Record>,
    totals: Totals,
}

impl Ticks {
    /// Ready to [`start`](Self::start). `clock` has the readings that were made before.
    #[must_use]
    pub fn new(clock: Clock, device: Device, scenario: Scenario) -> Self {
        Self { clock, device, scenario, current: None, totals: Totals::default() }
    }

    /// Takes the device into use and arms the first tick.
    ///
    /// # Errors
    /// [`BadPage`] if the device could not convert the expiry.
    pub fn start<M: Machine>(&mut self, machine: &mut M) -> Result<State, BadPage> {
        self.begin(machine, None)
    }

    /// As [`start`](Self::start), with periods counted from VM time `origin_ns` and not from now: so CPUs tick by one
    /// plan, whenever each of them comes to begin.
    ///
    /// # Errors
    /// [`BadPage`] if the device could not convert the expiry.
    pub fn start_from<M: Machine>(&mut self, machine: &mut M, origin_ns: u64) -> Result<State, BadPage> {
        self.begin(machine, Some(origin_ns))
    }

    fn begin<M: Machine>(&mut self, machine: &mut M, origin_ns: Option<u64>) -> Result<State, BadPage> {
        self.device.set_oneshot(machine);
        let now = self.clock.read(machine);
        self.next(machine, 0, origin_ns.unwrap_or(now.ns), &now)
    }

    /// Arms the device for `at_ns` after the last tick, for nobody's tick: the interrupt only ends a halt, and may come
    /// early. `now` is a reading that is not old.
    ///
    /// # Errors
    /// [`BadPage`] if the device could not convert the time.
    pub fn wake_at<M: Machine>(&mut self, machine: &mut M, at_ns: u64, now: &Reading) -> Result<(), BadPage> {
        self.device.set_oneshot(machine);
        self.device.set_next_event(machine, at_ns, now).map(|_| ())
    }

    /// Reads the clock outside a tick.
    pub fn now<M: Machine>(&mut self, machine: &mut M) -> Reading {
        self.clock.read(machine)
    }

    /// Handles one timer interrupt.
    ///
    /// The clock is read once: with a trapped TSC each read is an exit to the VMM.
    ///
    /// # Errors
    /// [`BadPage`] if the device could not convert the expiry.
    pub fn interrupt<M: Machine>(&mut self, machine: &mut M) -> Result<State, BadPage> {
        let Some(mut tick) = self.current else { return Ok(State::Done) };
        let now = self.clock.read(machine);
        if tick.first_wake_ns == 0 {
            tick.first_wake_ns = now.ns;
        }
        if now.ns < tick.expires_ns {
            tick.early_wakes = tick.early_wakes.saturating_add(1);
            tick.deadline = self.device.set_next_event(machine, tick.expires_ns, &now)?;
            self.current = Some(tick);
            return Ok(State::Waiting);
        }
        tick.fired_ns = now.ns;
        tick.fired_tsc = now.tsc;
        tick.page_version = now.version;
        machine.push(&tick);
        self.totals.add(&tick);
        self.next(machine, tick.seq.wrapping_add(1), tick.expires_ns, &now)
    }

    /// Arms tick number `seq`, or ends.
    fn next<M: Machine>(&mut self, m: &mut M, seq: u64, last_ns: u64, now: &Reading) -> Result<State, BadPage> {
        let Some(expires_ns) = self.scenario.next(last_ns, now.ns) else {
            self.current = None;
            self.device.shutdown(m);
            return Ok(State::Done);
        };
        let deadline = self.device.set_next_event(m, expires_ns, now)?;
        self.current = Some(Record { seq, expires_ns, armed_ns: now.ns, deadline, ..Record::default() });
        Ok(State::Waiting)
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
