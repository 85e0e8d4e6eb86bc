//! One step of one vCPU: takes messages, reads the clock, injects, enters, handles the exit. [`crate::machine::sched`]
//! chooses the vCPU.

use guest_abi::sites::Kind;
use vmtime::{GuestTsc, Now};

use super::{
    Cpu, Local, Phase, assist,
    bus::{Changed, VcpuBus},
    disassembly, ioapic, ipi, lint0, next_due, single_step,
};
use crate::{
    kvm::{self, EMULATION_FAILED, Exit, Vcpu},
    machine::{
        config::TimeMode,
        cpu_index::CpuIndex,
        error::RunError,
        record::trace::Event,
        shared::{Shared, Unwakeable},
        stop::{At, End, StopReason},
        wake::wake_timer::WakeTimer,
    },
};

/// The vector of an NMI.
const NMI_VECTOR: u8 = 2;

/// The result of a step: of one vCPU ([`step`]), or in virtual time of the round robin, which steps one of all vCPUs
/// ([`RoundRobin::step`]). The loops in [`crate::machine::sched`] and the [`Stepper`](crate::machine::stepper::Stepper)
/// act on it.
///
/// [`RoundRobin::step`]: crate::machine::sched::round_robin::RoundRobin::step
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Stepped {
    /// The guest ran on this vCPU up to an exit of its own: an operation, HLT or a debug exit.
    Ran {
        /// The vCPU's number.
        cpu: CpuIndex,
    },
    /// The caller is to step again: a kick or an open interrupt window ended KVM_RUN, or prevented the entry. In the
    /// round robin also: the vCPU is idle, or VM time advanced to the next deadline.
    Again,
    /// The buffer of an output is full: wait until its reader has taken some of it.
    OutputFull,
    /// The vCPU waits in HLT or for a start-up message, and no interrupt can be delivered. In the round robin: all
    /// vCPUs wait, and no timer is armed.
    Idle {
        /// No timer can wake it, only a message from another vCPU or a request.
        unwakeable: bool,
    },
    /// There is no next step.
    Stop(StopReason),
}

/// How far one entry goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// To the next exit.
    Free,
    /// To the next instruction boundary; virtual time only. An interrupt that enters is a boundary of its own: before
    /// the handler's first instruction.
    Step,
}

/// One step of `cpu`: takes its messages, reads the clock, injects an interrupt, enters once and handles the exit.
///
/// Why in this order:
///
/// - Messages are taken, and the clock is read once, before the injection: the LAPIC chooses among all interrupts up to
///   that instant.
/// - The wake timer is set after the injection, which decides whether a halted vCPU runs. The next deadline to wait for
///   depends on that.
/// - The PV EOI bit and the interrupt window come after the injection too: they depend on what is still pending.
/// - The check for a gap comes directly before the entry. It compares the clock reading with the present TSC.
pub(crate) fn step(
    cpu: &mut Cpu,
    shared: &Shared,
    wake_timer: &mut WakeTimer,
    stop: Option<GuestTsc>,
    pace: Pace,
) -> Result<Stepped, RunError> {
    // An instruction that was completed after its exit may have ended the machine.
    if let Some(exit) = shared.devices.lock().take_exit() {
        return Ok(Stepped::Stop(StopReason::Ended(End::Guest(exit))));
    }
    // Before messages are taken. Otherwise the last of the other vCPUs to halt could find this vCPU marked as
    // unwakeable and its inbox already empty, and would end the machine although this vCPU is about to run.
    shared.set_wakeable(cpu.local.index);
    ipi::receive(cpu, shared)?;
    VcpuBus::new(&mut cpu.local, shared).refresh_page();
    // Polls for the deadline as late as possible: everything that is done before the deadline need not be done after
    // it. A halted vCPU polls in `WakeTimer::sleep` instead.
    if !cpu.local.halted {
        wake_timer.poll(shared);
    }
    let (now, base, mode, host) = {
        let (clock, host) = shared.read_clock();
        if clock.is_stopped() {
            return Ok(Stepped::Stop(StopReason::Requested));
        }
        let now = cpu.local.now(&clock, host);
        cpu.local.advance(&clock, now);
        (now, clock.tsc_at(host), clock.mode(), host)
    };
    let line = ioapic::advance(cpu, shared, now)?;
    lint0::sample(cpu, shared, line)?;
    if stop.is_some_and(|stop| base >= stop) {
        return Ok(Stepped::Stop(StopReason::Reached));
    }
    // An idle vCPU has not run since the clock was read. If a later instant were noted, a stop by the host between the
    // two would be missed.
    let vcpu_shared = shared.vcpu(cpu.local.index);
    let note_idle = |due| vcpu_shared.into_iter().for_each(|shared| shared.last_run.note_idle(host, due));
    if shared.waits_for_reader() {
        // This wait for a reader must not be taken for a stop by the host.
        note_idle(None);
        return Ok(Stepped::OutputFull);
    }
    if cpu.local.phase == Phase::WaitForSipi {
        note_idle(None);
        return Ok(match shared.set_unwakeable(cpu.local.index, Unwakeable::Parked) {
            Some(end) => Stepped::Stop(StopReason::Ended(end)),
            None => Stepped::Idle { unwakeable: true },
        });
    }
    let entry = inject(cpu, shared, now, base)?;
    if cpu.local.halted {
        shared.read_rings();
        let unwakeable = !cpu.vcpu.interrupts_enabled() && !ioapic::brings_nmi(&cpu.local, shared);
        // Another vCPU could still send an NMI or INIT.
        if unwakeable {
            let address = cpu.vcpu.registers().linear_rip;
            if let Some(end) = shared.set_unwakeable(cpu.local.index, Unwakeable::Halted { address }) {
                return Ok(Stepped::Stop(StopReason::Ended(end)));
            }
        } else if mode == TimeMode::Real {
            set_timer(wake_timer, &cpu.local, shared, mode, stop);
        }
        note_idle(wake_timer.due().filter(|_| !unwakeable));
        return Ok(Stepped::Idle { unwakeable });
    }
    VcpuBus::new(&mut cpu.local, shared).withdraw_pv_eoi();
    set_timer(wake_timer, &cpu.local, shared, mode, stop);
    if mode == TimeMode::Real
        && let Some(vcpu_shared) = vcpu_shared
        && !wake_timer.enter(shared, vcpu_shared, host)
    {
        return Ok(Stepped::Again);
    }
    cpu.vcpu.set_cr8(cpu.local.apic.cr8());
    let (exit, changed) = match entry {
        // Steps until the interrupt can enter. In virtual time it must enter at the first boundary at which it can. In
        // real time that is needed only if TPR blocks it: MOV CR8 does not exit on most hosts. All else that blocks an
        // interrupt ends with an exit, or with the window that is requested below.
        Injection::Blocked if pace == Pace::Free && (mode == TimeMode::Virtual || cpu.local.apic.blocked_by_tpr()) => {
            single_step::one_instruction(cpu, shared)?
        }
        Injection::Injected { vector, .. } if pace == Pace::Step => single_step::into_handler(cpu, shared, vector)?,
        _ if pace == Pace::Step => match cpu.vcpu.entering() {
            // A kick ended the last KVM_RUN before the injected interrupt could enter.
            Some(vector) => single_step::into_handler(cpu, shared, vector)?,
            None => single_step::one_instruction(cpu, shared)?,
        },
        _ => {
            if entry == Injection::Masked && mode == TimeMode::Real {
                wake_timer.set_for_retry(shared);
            }
            // In virtual time another pending interrupt enters at the next operation. A window exit would come at an
            // instant that depends on the host.
            let more = mode == TimeMode::Real && matches!(entry, Injection::Injected { more: true, .. });
            cpu.vcpu.request_window(entry == Injection::Blocked || more);
            // The first instruction that the guest executes ends the STI shadow.
            cpu.local.sti_shadow = false;
            let mut access = VcpuBus::new(&mut cpu.local, shared);
            let exit = assist::run(&mut cpu.vcpu, shared, &mut access)?;
            (exit, access.changed)
        }
    };
    if changed != Changed::default() {
        cpu.drain(shared)?;
        cpu.apply_to_kvm(changed, shared)?;
    }
    match handle_exit(cpu, shared, exit)? {
        None if matches!(exit, Exit::Interrupted | Exit::WindowOpen) => Ok(Stepped::Again),
        None => Ok(Stepped::Ran { cpu: cpu.local.index }),
        Some(end) => {
            shared.read_rings();
            Ok(Stepped::Stop(StopReason::Ended(end)))
        }
    }
}

fn set_timer(wake_timer: &mut WakeTimer, local: &Local, shared: &Shared, mode: TimeMode, stop: Option<GuestTsc>) {
    wake_timer.set(shared, mode, stop, local.halted, |clock| next_due::interrupt_due(local, shared, clock));
}

/// Ends single-stepping and the window request, and completes the last instruction, so that the vCPU's state can be
/// read.
pub(crate) fn quiesce(cpu: &mut Cpu, shared: &Shared) -> Result<(), RunError> {
    cpu.vcpu.stop_stepping()?;
    cpu.vcpu.request_window(false);
    let drained = cpu.drain(shared);
    shared.costs.add(cpu.vcpu.take_calls());
    drained
}

/// How the vCPU is to be entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Injection {
    /// No interrupt is pending.
    Free,
    /// This vector was injected: it enters before the guest executes an instruction.
    Injected {
        /// Its number.
        vector: u8,
        /// Another interrupt is pending.
        more: bool,
    },
    /// An interrupt is pending and cannot enter yet.
    Blocked,
    /// An interrupt is pending behind an NMI, which KVM holds until the handler of an earlier NMI ends. No exit reports
    /// that end, so the VMM tries again shortly after. (It cannot step: the NMI would enter in the step that ends the
    /// handler, and its frame would hold the trap flag.)
    Masked,
}

/// Injects the highest pending interrupt if it can enter at once. NMIs come first, then the interrupt of the 8259 pair,
/// which has no LAPIC priority, then the LAPIC's.
fn inject(cpu: &mut Cpu, shared: &Shared, now: Now, base: GuestTsc) -> Result<Injection, RunError> {
    if cpu.local.nmi {
        // KVM delivers the NMI as soon as it can enter. Until then nothing else is injected, although interrupts may
        // have been pending longer: an injected interrupt would enter before the NMI on these hosts.
        cpu.drain(shared)?;
        let (waiting, masked) = cpu.vcpu.nmis();
        cpu.local.nmi = waiting > 0;
        if waiting > 0 {
            let more = cpu.local.apic.pending().is_some() || cpu.local.apic.external_interrupt();
            return Ok(match (masked, more && cpu.vcpu.interrupts_enabled()) {
                (true, true) => Injection::Masked,
                (true, false) if more => Injection::Blocked,
                (true, false) => Injection::Free,
                (false, _) => Injection::Injected { vector: NMI_VECTOR, more },
            });
        }
    }
    if cpu.local.apic.pending().is_none() && !cpu.local.apic.external_interrupt() {
        let waits = cpu.local.apic.blocked_by_tpr() && !cpu.local.halted;
        return Ok(if waits { Injection::Blocked } else { Injection::Free });
    }
    // Completes the last access first: until then RFLAGS, which decides below, is that of the beginning of the
    // instruction.
    cpu.drain(shared)?;
    let (pending, external) = (cpu.local.apic.pending(), cpu.local.apic.external_interrupt());
    if pending.is_none() && !external {
        return Ok(Injection::Free);
    }
    if cpu.local.sti_shadow || !cpu.vcpu.ready_for_injection() {
        return Ok(Injection::Blocked);
    }
    if external {
        let vector = lint0::acknowledge(&mut cpu.local, shared);
        cpu.vcpu.inject(vector);
        cpu.local.halted = false;
        shared.event(cpu.local.index, now, &Event::Inject { vector });
        return Ok(Injection::Injected { vector, more: pending.is_some() });
    }
    let Some(vector) = pending else { return Ok(Injection::Free) };
    cpu.local.apic.acknowledge(vector);
    VcpuBus::new(&mut cpu.local, shared).lend_pv_eoi();
    cpu.vcpu.inject(vector);
    cpu.local.halted = false;
    if vector == cpu.local.apic.timer_vector() {
        cpu.local.timer_interrupts = cpu.local.timer_interrupts.saturating_add(1);
        let reference = shared.clock.lock().reference_time(base);
        let due = cpu.local.expired.take();
        shared.audit.lock().injected(shared.ring_of(cpu.local.index), reference, due);
        if let Some(timers) = &mut cpu.local.timers {
            timers.entered(reference);
        }
    }
    shared.event(cpu.local.index, now, &Event::Inject { vector });
    Ok(Injection::Injected { vector, more: false })
}

fn handle_exit(cpu: &mut Cpu, shared: &Shared, exit: Exit) -> Result<Option<End>, RunError> {
    match exit {
        Exit::Operation(_) => Ok(shared.devices.lock().take_exit().map(End::Guest)),
        Exit::Halt => {
            let registers = cpu.vcpu.registers();
            match shared.site_at(registers.linear_rip.wrapping_sub(1)) {
                Some(kind) => perform_site(cpu, shared, kind, registers.rip.wrapping_sub(1))?,
                None => {
                    let now = VcpuBus::new(&mut cpu.local, shared).operation();
                    shared.event(cpu.local.index, now, &Event::Halt);
                    cpu.local.halted = true;
                }
            }
            Ok(None)
        }
        // After a kick the caller's loop checks for messages and requests.
        Exit::Interrupted | Exit::WindowOpen | Exit::Debug => Ok(None),
        exit => fatal_end(cpu.local.index, &mut cpu.vcpu, shared, exit),
    }
}

/// The end of the guest, if the exit of vCPU number `cpu` is one after which it cannot continue.
pub(crate) fn fatal_end(cpu: CpuIndex, vcpu: &mut Vcpu, shared: &Shared, exit: Exit) -> Result<Option<End>, RunError> {
    match exit {
        Exit::Operation(_) | Exit::Halt | Exit::Interrupted | Exit::WindowOpen | Exit::Debug => Ok(None),
        Exit::Shutdown => Ok(Some(End::TripleFault { cpu })),
        Exit::InternalError(suberror) => {
            let reason = match suberror {
                EMULATION_FAILED => "KVM cannot emulate this instruction, and vmm does not perform it".to_owned(),
                other => format!("KVM internal error, suberror {other}"),
            };
            cannot_execute(cpu, vcpu, shared, reason).map(Some)
        }
        Exit::FailEntry(reason) => {
            let reason = match kvm::entry_failure(reason) {
                Some(words) => format!("the CPU refused to enter the guest: {words} ({reason:#x})"),
                None => format!("the CPU refused to enter the guest (hardware reason {reason:#x})"),
            };
            cannot_execute(cpu, vcpu, shared, reason).map(Some)
        }
        Exit::Other(reason) => cannot_execute(cpu, vcpu, shared, format!("KVM exit reason {reason}")).map(Some),
    }
}

fn cannot_execute(cpu: CpuIndex, vcpu: &mut Vcpu, shared: &Shared, reason: String) -> Result<End, RunError> {
    let at = at(cpu, vcpu);
    let bytes = single_step::instruction_at(vcpu, shared, at.address)?;
    if bytes.is_empty() {
        return Ok(End::NoMemory(at));
    }
    let instruction = disassembly::describe(&bytes, at.address, vcpu.code_bits());
    Ok(End::CannotExecute { at, instruction, reason })
}

/// The address of vCPU number `cpu`'s next instruction, as of the last exit.
pub(crate) fn at(cpu: CpuIndex, vcpu: &mut Vcpu) -> At {
    At { cpu, address: vcpu.registers().linear_rip }
}

/// Emulates the guest's own instruction at a trap site. All of them are two bytes long.
fn perform_site(cpu: &mut Cpu, shared: &Shared, kind: Kind, at: u64) -> Result<(), RunError> {
    let next = at.wrapping_add(2);
    let registers = cpu.vcpu.registers();
    let mut access = VcpuBus::new(&mut cpu.local, shared);
    match kind {
        Kind::Rdtsc => {
            let now = access.operation();
            shared.event(access.local.index, now, &Event::Rdtsc { rip: at, value: now.tsc });
            cpu.vcpu.continue_with(next, now.tsc.0);
        }
        Kind::DeadlineWrmsr => {
            // WRMSR ignores the upper halves of its registers.
            let [index, low, high] =
                [registers.rcx, registers.rax, registers.rdx].map(|r| u32::try_from(r & 0xffff_ffff).unwrap_or(0));
            let written = access.msr_write_at_site(index, u64::from(high) << 32 | u64::from(low));
            let changed = access.changed;
            cpu.apply_to_kvm(changed, shared)?;
            match written {
                Ok(()) => cpu.vcpu.continue_at(next),
                Err(_) => cpu.vcpu.raise_gp_at(at),
            }
        }
        Kind::Pause => {
            access.operation();
            cpu.vcpu.continue_at(next);
        }
    }
    Ok(())
}
