//! Drives a machine in virtual time: one instruction at a time or freely, back to checkpoints, with migrations in
//! place.
//!
//! [`Machine::run`] runs a guest; a stepper can stop at every instruction. It has the thread's wake timer and the
//! copies of RAM. It does not change the order of the vCPUs, so that stepping does not change what the guest will do.

use vmtime::{GuestTsc, Khz, ReferenceClock, TscAdjust, VmTime};

use super::{
    Machine,
    audit::Handled,
    checkpoint::{Checkpoint, ram::RamCheckpoint},
    config::{HostEnvironment, TimeMode},
    cpu_index::CpuIndex,
    error::RunError,
    policy::{Policies, restorer::Restorer},
    sched::round_robin::{Until, nothing_will_wake},
    stop::{End, StopReason},
    vcpu::{
        Cpu,
        step::{self, Pace, Stepped},
    },
    wake::wake_timer::WakeTimer,
};
use crate::kvm::Resting;

/// See the module's documentation.
pub struct Stepper {
    machine: Machine,
    wake_timer: WakeTimer,
    copies: RamCheckpoint,
    checkpoints: Vec<Checkpoint>,
}

/// Where a vCPU is, between two instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The vCPU that ran last.
    pub cpu: CpuIndex,
    /// The instruction that it executes next.
    pub rip: u64,
    /// It executed HLT and waits.
    pub halted: bool,
    /// Guest operations so far.
    pub operations: u64,
    /// Timer interrupts that entered this vCPU so far.
    pub timer_interrupts: u64,
    /// VM time.
    pub vm: VmTime,
}

impl Stepper {
    /// Takes over a machine in virtual time and starts it.
    ///
    /// # Errors
    /// [`RunError`].
    pub fn new(mut machine: Machine) -> Result<Self, RunError> {
        if machine.shared.clock.lock().mode() != TimeMode::Virtual {
            return Err(RunError::Usage(
                "only a machine in virtual time can be driven instruction by instruction".to_owned(),
            ));
        }
        if machine.is_paused() {
            machine.resume(&Policies::default())?;
        }
        machine.shared.audit.lock().keep_log();
        if machine.tracks_changes() {
            return Err(RunError::BadState("KVM's account of written pages is in use already".to_owned()));
        }
        let copies = RamCheckpoint::new(&machine.vm)?;
        let wake_timer = WakeTimer::new(&machine.shared)?;
        let mut stepper = Self { machine, wake_timer, copies, checkpoints: Vec::new() };
        stepper.drain()?;
        Ok(stepper)
    }

    /// The machine.
    #[must_use]
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Runs at `pace` until the guest ends, VM time reaches `limit`, or `stop_here` returns true
    /// ([`StopReason::Requested`]). `stop_here` is called after each step in which the guest ran, with the number of
    /// its vCPU. [`StopReason::HostStopped`] is never returned: a host that stops does not move virtual time.
    ///
    /// # Errors
    /// [`RunError`].
    pub fn run(
        &mut self,
        pace: Pace,
        limit: Option<VmTime>,
        mut stop_here: impl FnMut(&mut Machine, CpuIndex) -> bool,
    ) -> Result<StopReason, RunError> {
        self.machine.shared.clock.lock().restart_spin_budget();
        loop {
            let (until, renewal) = {
                let clock = self.machine.shared.clock.lock();
                let renewal = clock.renewal();
                let stop = limit.and_then(|limit| clock.least_tsc(limit));
                (Until { stop, renewal: clock.least_tsc(renewal) }, renewal)
            };
            let Machine { vcpus, round_robin, shared, .. } = &mut self.machine;
            match round_robin.step(vcpus.user_mut(), shared, until, &mut self.wake_timer, pace)? {
                Stepped::Ran { cpu } => {
                    if stop_here(&mut self.machine, cpu) {
                        return Ok(StopReason::Requested);
                    }
                }
                // A stepped machine does not wait for a reader of its outputs.
                Stepped::Again | Stepped::OutputFull => {}
                Stepped::Idle { .. } => {
                    return Ok(StopReason::Ended(nothing_will_wake(self.machine.vcpus.user_mut())));
                }
                Stepped::Stop(ended @ StopReason::Ended(_)) => return Ok(ended),
                // VM time shows which of the two is reached, the limit or the renewal of the page.
                Stepped::Stop(StopReason::Reached | StopReason::Requested | StopReason::HostStopped { .. }) => {
                    let now = self.machine.shared.clock.lock().now(TscAdjust::ZERO);
                    if now.vm >= renewal {
                        self.machine.renew_page(now)?;
                    }
                    if limit.is_some_and(|limit| now.vm >= limit) {
                        return Ok(StopReason::Reached);
                    }
                }
            }
        }
    }

    /// Runs to the next instruction boundary of any vCPU.
    ///
    /// # Errors
    /// [`RunError`].
    pub fn step(&mut self) -> Result<Result<Place, End>, RunError> {
        let mut stepped = CpuIndex::FIRST;
        let stopped = self.run(Pace::Step, None, |_, cpu| {
            stepped = cpu;
            true
        })?;
        if let StopReason::Ended(end) = stopped {
            return Ok(Err(end));
        }
        self.drain()?;
        Ok(Ok(self.place(stepped)))
    }

    /// Where vCPU number `cpu` is. Call after [`Self::step`].
    fn place(&mut self, cpu: CpuIndex) -> Place {
        let clock = self.machine.shared.clock.lock();
        let (operations, vm) = (clock.operations(), clock.now(TscAdjust::ZERO).vm);
        drop(clock);
        let nowhere = Place { cpu, rip: 0, halted: false, operations, timer_interrupts: 0, vm };
        cpu.of_mut(self.machine.vcpus.user_mut()).map_or(nowhere, |Cpu { vcpu, local }| Place {
            rip: vcpu.registers().rip,
            halted: local.halted,
            timer_interrupts: local.timer_interrupts,
            ..nowhere
        })
    }

    /// Takes checkpoint number `level` now, replacing an older one of that number and all later ones.
    ///
    /// # Errors
    /// [`RunError`].
    pub fn take_checkpoint(&mut self, level: usize) -> Result<(), RunError> {
        self.drain()?;
        self.copies.take(&self.machine.vm, level)?;
        let checkpoint = self.machine.checkpoint();
        self.checkpoints.truncate(level);
        self.checkpoints.push(checkpoint);
        Ok(())
    }

    /// Returns to checkpoint number `level`.
    ///
    /// # Errors
    /// [`RunError`].
    pub fn restore_checkpoint(&mut self, level: usize) -> Result<(), RunError> {
        self.quiesce()?;
        self.copies.go_back(&self.machine.vm, level)?;
        let checkpoint = self.checkpoints.get(level);
        let checkpoint =
            checkpoint.ok_or_else(|| RunError::BadState(format!("there is no checkpoint number {level}")))?;
        self.machine.restore_checkpoint(checkpoint)
    }

    /// Whether every byte of RAM is as it was at checkpoint number `level`.
    #[must_use]
    pub fn ram_is(&self, level: usize) -> bool {
        self.copies.is(level)
    }

    /// Pauses and resumes the machine with the TSC frequency `khz`: the guest sees the same as in a migration to
    /// another host.
    ///
    /// Returns the reference clock as it was before, and the last TSC for which it is valid.
    ///
    /// # Errors
    /// [`RunError`].
    pub fn migrate(&mut self, khz: Khz, policies: &Policies) -> Result<(ReferenceClock, GuestTsc), RunError> {
        let before = self.pause()?;
        self.machine.resume_at(khz, policies)?;
        Ok(before)
    }

    /// As [`Self::migrate`], but by the rules of another VMM.
    ///
    /// # Errors
    /// [`RunError`].
    pub fn migrate_as(
        &mut self,
        khz: Khz,
        policies: &Policies,
        restorer: &dyn Restorer,
    ) -> Result<(ReferenceClock, GuestTsc), RunError> {
        let before = self.pause()?;
        self.machine.resume_as(khz, policies, restorer)?;
        Ok(before)
    }

    fn pause(&mut self) -> Result<(ReferenceClock, GuestTsc), RunError> {
        self.quiesce()?;
        let before = {
            let clock = self.machine.shared.clock.lock();
            (*clock.reference(), clock.tsc())
        };
        self.machine.pause()?;
        Ok(before)
    }

    /// Takes the ticks that the guest handled since the last call or the last [`Self::restore_checkpoint`].
    pub fn take_handled_ticks(&mut self) -> Vec<Handled> {
        self.machine.shared.read_rings();
        self.machine.shared.audit.lock().take_log()
    }

    /// The state of every vCPU that a checkpoint does not contain.
    ///
    /// # Errors
    /// [`RunError`].
    pub fn state_outside_checkpoint(&mut self, env: &HostEnvironment) -> Result<Vec<Resting>, RunError> {
        self.quiesce()?;
        let msrs = env.msrs()?;
        self.machine.vcpus.user().iter().map(|cpu| cpu.vcpu.resting_state(msrs).map_err(RunError::from)).collect()
    }

    /// Ends the stepping and returns the machine, with its vCPUs quiesced.
    ///
    /// # Errors
    /// [`RunError`].
    pub fn into_machine(mut self) -> Result<Machine, RunError> {
        self.quiesce()?;
        Ok(self.machine)
    }

    fn drain(&mut self) -> Result<(), RunError> {
        let Machine { vcpus, shared, .. } = &mut self.machine;
        vcpus.user_mut().iter_mut().try_for_each(|cpu| cpu.drain(shared))
    }

    fn quiesce(&mut self) -> Result<(), RunError> {
        let Machine { vcpus, shared, .. } = &mut self.machine;
        vcpus.user_mut().iter_mut().try_for_each(|cpu| step::quiesce(cpu, shared))
    }
}
