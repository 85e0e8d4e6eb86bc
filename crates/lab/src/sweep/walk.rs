//! Steps a guest through a stretch, instruction boundary by instruction boundary.

use std::sync::atomic::{AtomicBool, Ordering};

use guest_abi::sites::Kind;
use machine::{
    BootOptions, CpuIndex, HostEnvironment, Machine, Outputs, Pace, Place, RunError, Stepper, StopReason, TimeMode,
    audit::Handled, boot::Image, config::source::SourceChoice,
};
use vmtime::VmTime;

use super::{Depth, Edge, Every, Options, SweepError, code::Program};

/// VM time by which the stretch must have begun.
const BEGINS_WITHIN: VmTime = VmTime(600_000_000_000);
/// CPU 0's timer interrupt at which the search for a function or address begins. By then the guest has left its
/// start-up code, and each tick is like the next.
pub(super) const SETTLED: u64 = 3;

/// An [`Edge`] with its symbol resolved to an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mark {
    /// CPU 0 enters its handler for the timer interrupt of this number.
    Tick(u64),
    /// Any CPU is about to execute the instruction here.
    Address(u64),
}

impl Mark {
    fn is_at(self, place: &Place) -> bool {
        match self {
            Self::Tick(number) => place.cpu == CpuIndex::FIRST && place.timer_interrupts == number,
            Self::Address(address) => place.rip == address,
        }
    }
}

/// The walk's state at one boundary. Going back to a checkpoint must set it back, too.
#[derive(Clone, Debug)]
pub(super) struct Track {
    /// Where the CPU that ran last is.
    pub place: Place,
    /// Per CPU: ticks that it had handled when it last entered its timer's handler.
    handled_at_entry: Vec<u64>,
    /// Per CPU: timer interrupts so far.
    timer_interrupts: Vec<u64>,
    /// Per CPU: address of the next instruction.
    rip: Vec<u64>,
    /// Kind of the instruction before this boundary.
    kind: Every,
}

impl Track {
    /// Whether `--every` makes this boundary a point.
    pub(super) fn is_point(&self, every: Every) -> bool {
        match every {
            Every::Instruction => true,
            Every::Exit => self.kind != Every::Instruction,
            Every::Read => self.kind == Every::Read,
        }
    }

    /// Per CPU: how many ticks will have been handled when `ticks` more have come after the one being handled.
    pub(super) fn targets(&self, ticks: u64) -> Vec<u64> {
        self.handled_at_entry.iter().map(|handled| handled.saturating_add(1).saturating_add(ticks)).collect()
    }
}

/// Refuses a host whose single steps may run several instructions: the boundaries in between would be missing.
fn can_step(env: &HostEnvironment) -> Result<(), RunError> {
    if env.step().map_err(RunError::from)?.exact {
        return Ok(());
    }
    Err(RunError::HostLacks(
        "this host's single steps are not exact (probed): one ran more than one instruction, and a sweep stops at each; use \
         a host of which vmm doctor says that they are (QEMU's emulation: 10.0 or later), or vmm --migrate-every, which does \
         not step"
            .to_owned(),
    ))
}

/// A guest, the place where it is, and the end of the stretch.
pub(super) struct Walk {
    pub stepper: Stepper,
    pub track: Track,
    to: Mark,
    cpus: usize,
}

impl Walk {
    /// Boots the guest and runs it to the beginning of the stretch.
    ///
    /// It runs freely to shortly before the stretch, since stepping is slow, and is stepped from there. The free run
    /// must end at least one interrupt early: an edge is found only by a step that arrives at it.
    pub(super) fn begin(
        env: &HostEnvironment,
        image: &Image,
        program: &Program,
        options: &Options,
        outputs: Outputs,
        cancel: &AtomicBool,
    ) -> Result<Self, SweepError> {
        let mark = |edge: &Edge| match edge {
            Edge::Tick(number) => Ok(Mark::Tick(*number)),
            Edge::Symbol(name) => program.address_of(name).map(Mark::Address),
            Edge::Address(address) => Ok(Mark::Address(*address)),
        };
        let (from, to) = (mark(&options.from)?, options.to.as_ref().map(mark).transpose()?);
        let boot = BootOptions {
            time: TimeMode::Virtual,
            source: SourceChoice::Auto,
            khz: Some(options.khz),
            ..options.boot.clone()
        };
        can_step(env)?;
        let machine = Machine::boot(env, image, &boot, outputs)?;
        if image.ring().is_none() && options.depth != Depth::One {
            return Err(SweepError::Usage(format!(
                "{} reports no ticks (ELF section {}), so that it is judged by its timer interrupts, after one migration; use \
                 --depth 1",
                image.name(),
                guest_abi::report::SECTION
            )));
        }
        let cpus = usize::try_from(options.boot.cpus).unwrap_or(1);
        let place =
            Place { cpu: CpuIndex::FIRST, rip: 0, halted: false, operations: 0, timer_interrupts: 0, vm: VmTime(0) };
        let track = Track {
            place,
            handled_at_entry: vec![0; cpus],
            timer_interrupts: vec![0; cpus],
            rip: vec![0; cpus],
            kind: Every::Instruction,
        };
        let mut walk = Self { stepper: Stepper::new(machine)?, track, to: to.unwrap_or(Mark::Tick(0)), cpus };
        let first = match from {
            Mark::Tick(number) => number,
            Mark::Address(_) => SETTLED,
        };
        walk.approach(first, cancel)?;
        walk.step_to(Mark::Tick(first), &options.from, cancel)?;
        if from != Mark::Tick(first) {
            walk.step_to(from, &options.from, cancel)?;
        }
        if to.is_none() {
            // One tick later, whichever function it began in.
            let so_far = walk.track.timer_interrupts.first().copied().unwrap_or(0);
            walk.to = Mark::Tick(so_far.saturating_add(1));
        }
        if let Mark::Tick(number) = walk.to
            && walk.track.timer_interrupts.first().is_some_and(|so_far| number <= *so_far)
        {
            let to = options.to.as_ref().map_or_else(|| format!("tick:{number}"), ToString::to_string);
            return Err(SweepError::Usage(format!("--to {to} is not after --from {}", options.from)));
        }
        // Only the CPU that is in its handler has a tick in the making, but `targets` counts one for each. The others
        // start at the ticks handled so far: a run then waits for one tick more than needed there, which does no harm.
        for (cpu, handled) in walk.handled_so_far().into_iter().enumerate() {
            if cpu != walk.track.place.cpu.place()
                && let Some(slot) = walk.track.handled_at_entry.get_mut(cpu)
            {
                *slot = handled;
            }
        }
        Ok(walk)
    }

    /// Runs freely to shortly before CPU 0's timer interrupt number `number`.
    fn approach(&mut self, number: u64, cancel: &AtomicBool) -> Result<(), SweepError> {
        let before = number.saturating_sub(1);
        let stopped = self.stepper.run(Pace::Free, Some(BEGINS_WITHIN), |machine, cpu| {
            cancel.load(Ordering::Relaxed)
                || (cpu == CpuIndex::FIRST
                    && machine.timer_interrupts(0) >= before
                    && (before != 0 || machine.has_timer_armed(0)))
        })?;
        let what = format!("timer interrupt {number} of CPU 0");
        match stopped {
            StopReason::Requested if cancel.load(Ordering::Relaxed) => Err(SweepError::Interrupted),
            StopReason::Requested => Ok(()),
            // In virtual time, the host never stops a machine.
            StopReason::Reached | StopReason::HostStopped { .. } => Err(SweepError::Usage(format!(
                "the guest did not get to {what} within {} s of VM time",
                BEGINS_WITHIN.0 / 1_000_000_000
            ))),
            StopReason::Ended(end) => Err(SweepError::GuestEnded { before: what, end }),
        }
    }

    fn step_to(&mut self, mark: Mark, edge: &Edge, cancel: &AtomicBool) -> Result<(), SweepError> {
        for _ in 0..super::workers::STRETCH_MAX {
            if cancel.load(Ordering::Relaxed) {
                return Err(SweepError::Interrupted);
            }
            self.step(&edge.to_string())?;
            if mark.is_at(&self.track.place) {
                return Ok(());
            }
        }
        Err(SweepError::TooLong {
            from: format!("timer interrupt {SETTLED}"),
            to: edge.to_string(),
            limit: super::workers::STRETCH_MAX,
        })
    }

    /// Steps to the next boundary; false at the end of the stretch, which is not part of it.
    pub(super) fn next(&mut self) -> Result<bool, SweepError> {
        self.step("the end of the stretch (--to)")?;
        Ok(!self.to.is_at(&self.track.place))
    }

    /// Steps to the next boundary. `goal` is for the error if the guest ends before it.
    pub(super) fn step(&mut self, goal: &str) -> Result<(), SweepError> {
        let operations = self.track.place.operations;
        let place = self.stepper.step()?.map_err(|end| SweepError::GuestEnded { before: goal.to_owned(), end })?;
        let cpu = place.cpu.place();
        let entered = self.track.timer_interrupts.get(cpu).is_some_and(|so_far| *so_far != place.timer_interrupts);
        if entered {
            let handled = self.handled_by(cpu);
            if let (Some(interrupts), Some(at_entry)) =
                (self.track.timer_interrupts.get_mut(cpu), self.track.handled_at_entry.get_mut(cpu))
            {
                (*interrupts, *at_entry) = (place.timer_interrupts, handled);
            }
        }
        // An instruction that exits is looked up by the address it began at, which is the last boundary's.
        self.track.kind = Every::Instruction;
        if let Some(rip) = self.track.rip.get_mut(cpu) {
            if place.operations != operations {
                let read = self.stepper.machine().patched_site(*rip) == Some(Kind::Rdtsc);
                self.track.kind = if read { Every::Read } else { Every::Exit };
            }
            *rip = place.rip;
        }
        self.track.place = place;
        Ok(())
    }

    /// Timer interrupts that each CPU has had so far.
    pub(super) fn timer_interrupts(&self) -> Vec<u64> {
        (0..self.cpus).map(|cpu| self.stepper.machine().timer_interrupts(cpu)).collect()
    }

    /// The timer interrupt of CPU 0 that ends the stretch, if one does.
    pub(super) fn ends_at_interrupt(&self) -> Option<u64> {
        match self.to {
            Mark::Tick(number) => Some(number),
            Mark::Address(_) => None,
        }
    }

    /// Ticks that each CPU has handled so far.
    pub(super) fn handled_so_far(&self) -> Vec<u64> {
        (0..self.cpus).map(|cpu| self.handled_by(cpu)).collect()
    }

    fn handled_by(&self, cpu: usize) -> u64 {
        self.stepper.machine().ticks_handled(cpu).unwrap_or(0)
    }

    /// The ticks since the last call.
    pub(super) fn take_handled(&mut self) -> Vec<Handled> {
        self.stepper.take_handled_ticks()
    }
}
