//! One step of one vCPU: messages, time, injection, entry, exit. [`crate::machine::sched`] chooses the vCPU.

use guest_abi::sites::Kind;
use vmtime::{GuestTsc, Now};

use super::{
    Cpu, Local, Phase,
    bus::{Changed, VcpuBus},
    disassembly, ipi, lint0, next_due, single_step,
};
use crate::{
    kvm::{self, Exit, Vcpu},
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

/// What a step came to: that of one vCPU ([`step`]), or in virtual time that of the round robin, which steps one of all vCPUs
/// ([`RoundRobin::step`]). The loops in [`crate::machine::sched`] and the [`Stepper`](crate::machine::stepper::Stepper) act on
/// it.
///
/// [`RoundRobin::step`]: crate::machine::sched::round_robin::RoundRobin::step
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Stepped {
    /// The guest ran on this vCPU up to an exit of its own: an operation, HLT or a debug exit.
    Ran {
        /// The vCPU's number.
        cpu: CpuIndex,
    },
    /// Nothing to act on: a kick or an open interrupt window ended KVM_RUN, or kept it from being called. In the round robin
    /// also: the vCPU is idle, or VM time advanced to the next deadline. Step again.
    Again,
    /// The buffer of an output is full: wait until its reader has taken some of it.
    OutputFull,
    /// The vCPU waits in HLT or for a start-up message, and no interrupt can be delivered. In the round robin: all of them do,
    /// and no timer is armed.
    Idle {
        /// No timer will end that: only a message from another vCPU can, or a request.
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
    /// To the next instruction boundary; virtual time only. An interrupt that enters is a boundary of its own: before the
    /// handler's first instruction.
    Step,
}

/// One step of `cpu`: take messages, read the clock, inject, enter once, answer the exit.
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
    shared.set_wakeable(cpu.local.index);
    ipi::receive(cpu, shared)?;
    VcpuBus::new(&mut cpu.local, shared).refresh_page();
    // As late as can be: what is done before the wait is not done after it. A halted guest has less to lose: see
    // `WakeTimer::sleep`.
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
    lint0::sample(cpu, shared, now)?;
    if stop.is_some_and(|stop| base >= stop) {
        return Ok(Stepped::Stop(StopReason::Reached));
    }
    if shared.waits_for_reader() {
        // It is not the host that keeps it from running.
        if let Some(vcpu_shared) = shared.vcpu(cpu.local.index) {
            vcpu_shared.last_run.idle(host, None);
        }
        return Ok(Stepped::OutputFull);
    }
    if cpu.local.phase == Phase::WaitForSipi {
        return Ok(match shared.set_unwakeable(cpu.local.index, Unwakeable::Parked) {
            Some(end) => Stepped::Stop(StopReason::Ended(end)),
            None => Stepped::Idle { unwakeable: true },
        });
    }
    let entry = inject(cpu, shared, now, base)?;
    if cpu.local.halted {
        shared.read_rings();
        let unwakeable = !cpu.vcpu.interrupts_enabled();
        // Another CPU could still send an NMI or INIT.
        if unwakeable {
            let address = cpu.vcpu.registers().linear_rip;
            if let Some(end) = shared.set_unwakeable(cpu.local.index, Unwakeable::Halted { address }) {
                return Ok(Stepped::Stop(StopReason::Ended(end)));
            }
        } else if mode == TimeMode::Real {
            set_timer(wake_timer, &cpu.local, shared, mode, stop);
        }
        return Ok(Stepped::Idle { unwakeable });
    }
    VcpuBus::new(&mut cpu.local, shared).settle_eoi();
    set_timer(wake_timer, &cpu.local, shared, mode, stop);
    if mode == TimeMode::Real
        && let Some(vcpu_shared) = shared.vcpu(cpu.local.index)
        && !wake_timer.enter(shared, vcpu_shared, host)
    {
        return Ok(Stepped::Again);
    }
    cpu.vcpu.set_cr8(cpu.local.apic.cr8());
    let (exit, changed) = match entry {
        // What waits for priority may be let in by MOV CR8, which exits on no host that we know of but one.
        Injection::Blocked if pace == Pace::Free && (mode == TimeMode::Virtual || blocked_by_tpr(&cpu.local)) => {
            single_step::one(cpu, shared)?
        }
        Injection::Injected { vector, .. } if pace == Pace::Step => single_step::into_handler(cpu, shared, vector)?,
        _ if pace == Pace::Step => match cpu.vcpu.entering() {
            // A kick came before it could enter.
            Some(vector) => single_step::into_handler(cpu, shared, vector)?,
            None => single_step::one(cpu, shared)?,
        },
        _ => {
            cpu.vcpu.stop_stepping()?;
            if entry == Injection::Masked && mode == TimeMode::Real {
                wake_timer.set_soon(shared);
            }
            // In virtual time what else waits enters at the next operation: windows open when the host looks.
            let more = mode == TimeMode::Real && matches!(entry, Injection::Injected { more: true, .. });
            cpu.vcpu.request_window(entry == Injection::Blocked || more);
            // Whatever the guest executes first ends it.
            cpu.local.sti_shadow = false;
            let mut access = VcpuBus::new(&mut cpu.local, shared);
            let exit = cpu.vcpu.run(&mut access)?;
            (exit, access.changed)
        }
    };
    if changed != Changed::default() {
        cpu.drain(shared)?;
        cpu.tell_kvm(changed, shared)?;
    }
    match handle(cpu, shared, exit)? {
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

/// Leaves the vCPU in a state that may be read: no step, no window, nothing incomplete.
pub(crate) fn settle(cpu: &mut Cpu, shared: &Shared) -> Result<(), RunError> {
    cpu.vcpu.stop_stepping()?;
    cpu.vcpu.request_window(false);
    let drained = cpu.drain(shared);
    shared.costs.add(cpu.vcpu.take_calls());
    drained
}

/// How the vCPU is to be entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Injection {
    /// Nothing waits.
    Free,
    /// This vector waits no longer: it enters first.
    Injected {
        /// Its number.
        vector: u8,
        /// Another interrupt waits for it to end.
        more: bool,
    },
    /// An interrupt waits and cannot enter yet.
    Blocked,
    /// An interrupt waits for an NMI, which waits for the end of another one's handler. No host tells of that: look again
    /// soon. (Not by stepping: the NMI would enter in the step that ends the handler, and push a trap flag.)
    Masked,
}

/// Injects the highest pending interrupt if it would enter at once; that of the 8259 pair, which knows no priority of the
/// LAPIC's, before all.
fn inject(cpu: &mut Cpu, shared: &Shared, now: Now, base: GuestTsc) -> Result<Injection, RunError> {
    if cpu.local.nmi {
        // KVM lets it in when it can enter. It comes before all interrupts, also before those that came before it: hosts
        // would let in what is injected first.
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
        let waits = cpu.local.apic.blocked_by_priority() && blocked_by_tpr(&cpu.local);
        return Ok(if waits && !cpu.local.halted { Injection::Blocked } else { Injection::Free });
    }
    // Before it is drained, the last access is incomplete and the flags below are those of its beginning.
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
    VcpuBus::new(&mut cpu.local, shared).lend_eoi();
    cpu.vcpu.inject(vector);
    cpu.local.halted = false;
    if vector == cpu.local.apic.timer_vector() {
        cpu.local.timer_interrupts = cpu.local.timer_interrupts.saturating_add(1);
        let reference = shared.clock.lock().reference_time(base);
        let due = cpu.local.expired.take();
        shared.audit.lock().injected(shared.ring_of(cpu.local.index), reference, due);
    }
    shared.event(cpu.local.index, now, &Event::Inject { vector });
    Ok(Injection::Injected { vector, more: false })
}

/// Whether TPR alone (not an interrupt in service, whose EOI exits) could hold back what is requested.
fn blocked_by_tpr(local: &Local) -> bool {
    local.apic.blocked_by_priority() && local.apic.cr8() != 0
}

fn handle(cpu: &mut Cpu, shared: &Shared, exit: Exit) -> Result<Option<End>, RunError> {
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
        // Kicked: the loop looks why.
        Exit::Interrupted | Exit::WindowOpen | Exit::Debug => Ok(None),
        exit => cannot_go_on(cpu.local.index, &mut cpu.vcpu, shared, exit),
    }
}

/// The end that an exit of vCPU number `cpu` means which nothing can be done about; none for the others.
pub(crate) fn cannot_go_on(
    cpu: CpuIndex,
    vcpu: &mut Vcpu,
    shared: &Shared,
    exit: Exit,
) -> Result<Option<End>, RunError> {
    match exit {
        Exit::Operation(_) | Exit::Halt | Exit::Interrupted | Exit::WindowOpen | Exit::Debug => Ok(None),
        Exit::Shutdown => Ok(Some(End::TripleFault { cpu })),
        Exit::InternalError(suberror) => {
            let reason = match suberror {
                1 => "KVM cannot emulate this instruction".to_owned(),
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

/// Where vCPU number `cpu` is, as of the last exit.
pub(crate) fn at(cpu: CpuIndex, vcpu: &mut Vcpu) -> At {
    At { cpu, address: vcpu.registers().linear_rip }
}

/// Does what the guest's own instruction at a trap site would have done. All are two bytes long.
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
            cpu.tell_kvm(changed, shared)?;
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
