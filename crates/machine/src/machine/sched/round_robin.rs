//! Virtual time: one thread steps all vCPUs, one at a time.
//!
//! A vCPU runs up to its next operation (or PAUSE site). Then a generator with a fixed seed chooses the next vCPU.
//! Exits that are no operations do not change the order, so that a signal or a single step cannot make two runs differ.

use oorandom::Rand32;
use vmtime::GuestTsc;

use crate::machine::{
    cpu_index::CpuIndex,
    error::RunError,
    shared::Shared,
    stop::{At, End, StopReason},
    vcpu::{
        Cpu, next_due,
        step::{self, Pace, Stepped},
    },
    wake::wake_timer::WakeTimer,
};

/// The base TSCs at which the vCPUs stop: the one that the caller wants, and the one at which the page is to be
/// renewed. The renewal wakes no idle vCPU.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Until {
    pub stop: Option<GuestTsc>,
    pub renewal: Option<GuestTsc>,
}

impl Until {
    /// The earlier of the two.
    pub(crate) fn first(self) -> Option<GuestTsc> {
        [self.stop, self.renewal].into_iter().flatten().min()
    }
}

/// Chooses which vCPU runs next. The order of a run depends on nothing else: a copy of this continues in the same
/// order.
#[derive(Clone, Debug)]
pub(crate) struct RoundRobin {
    order: Rand32,
    /// `Some(unwakeable)` for those that were idle at their last step.
    idle: Vec<Option<bool>>,
    /// The vCPU that has not reached its next operation yet, and the count of operations before it.
    current: Option<(usize, u64)>,
}

impl RoundRobin {
    /// The order that `seed` determines, for `cpus` vCPUs.
    pub(crate) fn new(seed: u64, cpus: usize) -> Self {
        Self::with(Rand32::new(seed), cpus)
    }

    /// The order that continues from `order`, a result of [`Self::state`].
    pub(crate) fn from_state(order: (u64, u64), cpus: usize) -> Self {
        Self::with(Rand32::from_state(order), cpus)
    }

    fn with(order: Rand32, cpus: usize) -> Self {
        Self { order, idle: vec![None; cpus], current: None }
    }

    /// The generator's state. Which vCPUs are idle is not saved: after a restore all are stepped once.
    pub(crate) fn state(&self) -> (u64, u64) {
        let Self { order, idle: _, current: _ } = self;
        order.state()
    }

    /// Steps the current vCPU, or chooses the next one if that has reached its operation; enters the guest once at
    /// most. If all vCPUs are idle, advances VM time instead.
    pub(crate) fn step(
        &mut self,
        cpus: &mut [Cpu],
        shared: &Shared,
        until: Until,
        wake_timer: &mut WakeTimer,
        pace: Pace,
    ) -> Result<Stepped, RunError> {
        let Some((chosen, before)) = self.current.or_else(|| self.choose(cpus, shared)) else {
            return Ok(self.advance_to_next(cpus, shared, until));
        };
        let Some(cpu) = cpus.get_mut(chosen) else { return Err(RunError::Cpus(0)) };
        let _binding = cpu.vcpu.bind();
        if cpu.vcpu.clear_kicks()
            && let Some(limit) = wake_timer.spin_limit_exceeded(shared)
        {
            let at = step::at(cpu.local.index, &mut cpu.vcpu);
            return Ok(Stepped::Stop(StopReason::Ended(End::Spins { at, limit })));
        }
        self.current = Some((chosen, before));
        let stepped = step::step(cpu, shared, wake_timer, until.first(), pace)?;
        match stepped {
            Stepped::Ran { .. } => {
                self.current = self.current.filter(|_| shared.clock.lock().operations() == before);
            }
            Stepped::Idle { unwakeable } => {
                if let Some(slot) = self.idle.get_mut(chosen) {
                    *slot = Some(unwakeable);
                }
                self.current = None;
                // Another vCPU may not be idle.
                return Ok(Stepped::Again);
            }
            Stepped::Again | Stepped::OutputFull | Stepped::Stop(_) => {}
        }
        Ok(stepped)
    }

    /// Chooses the next vCPU, and returns it with the count of operations so far; none if all are idle.
    fn choose(&mut self, cpus: &[Cpu], shared: &Shared) -> Option<(usize, u64)> {
        wake(cpus, shared, &mut self.idle);
        let chosen = draw(&self.idle, &mut self.order)?;
        Some((chosen, shared.clock.lock().operations()))
    }

    /// All vCPUs are idle: advances VM time to the next deadline, stop or renewal.
    fn advance_to_next(&mut self, cpus: &mut [Cpu], shared: &Shared, until: Until) -> Stepped {
        let mut clock = shared.clock.lock();
        let dues = cpus
            .iter()
            .zip(&self.idle)
            .filter(|(_, unwakeable)| **unwakeable != Some(true))
            .filter_map(|(cpu, _)| next_due::due(&cpu.local, shared, &clock));
        let Some(target) = dues.chain(until.stop).min() else {
            return Stepped::Idle { unwakeable: true };
        };
        if target.0 == u64::MAX && clock.tsc() == target {
            // The deadline is beyond the largest TSC: VM time never reaches it.
            drop(clock);
            return Stepped::Stop(StopReason::Ended(nothing_will_wake(cpus)));
        }
        clock.jump_to(until.renewal.map_or(target, |renewal| target.min(renewal)));
        // Steps all vCPUs again: one of them finds its deadline due, or the stop reached.
        self.idle.fill(None);
        Stepped::Again
    }
}

/// The end of a guest whose vCPUs are all idle, where no timer is armed and no request can come.
pub(crate) fn nothing_will_wake(cpus: &mut [Cpu]) -> End {
    let address = cpus.first_mut().map_or(0, |cpu| cpu.vcpu.registers().linear_rip);
    End::NothingWillWake(At { cpu: CpuIndex::FIRST, address })
}

/// Chooses one of those that are not idle. With one CPU it draws no number, so that the run does not depend on the
/// seed.
fn draw(idle: &[Option<bool>], order: &mut Rand32) -> Option<usize> {
    let mut awake = idle.iter().enumerate().filter(|(_, idle)| idle.is_none()).map(|(index, _)| index);
    let count = u32::try_from(awake.clone().count()).unwrap_or(u32::MAX);
    let drawn = if count > 1 { order.rand_range(0..count) } else { 0 };
    awake.nth(usize::try_from(drawn).unwrap_or(0))
}

/// Marks the vCPUs that have a message, or whose timer is due, as no longer idle; and those that had noted that no
/// timer can wake them, if another vCPU's access has changed that. An interrupt of what was typed while no vCPU ran is
/// for any of them. But for that, a request that only looks does not change the order.
fn wake(cpus: &[Cpu], shared: &Shared, idle: &mut [Option<bool>]) {
    if shared.devices.lock().has_message() {
        idle.fill(None);
    }
    let clock = shared.clock.lock();
    let now = clock.tsc();
    for ((cpu, vcpu_shared), slot) in cpus.iter().zip(&shared.vcpus).zip(idle) {
        if let Some(unwakeable) = *slot {
            let message = !vcpu_shared.inbox.lock().is_empty();
            let withdrawn = unwakeable && vcpu_shared.unwakeable.lock().is_none();
            if message
                || withdrawn
                || !unwakeable && next_due::due(&cpu.local, shared, &clock).is_some_and(|due| due <= now)
            {
                *slot = None;
            }
        }
    }
}
