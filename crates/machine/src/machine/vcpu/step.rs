//! One turn of one vCPU: messages, time, injection, entry, exit. [`crate::machine::sched`] says whose turn it is.

use guest_abi::sites::Kind;
use vmtime::{GuestTsc, Now};

use super::{
    Cpu, Local, Phase,
    bus::{Access, Changed},
    disassembly, ipi, lint0, single_step,
};
use crate::{
    kvm::{self, Exit, Vcpu},
    machine::{
        config::TimeMode,
        error::{At, End, RunError},
        record::trace::Event,
        shared::{Deaf, Platform, lock},
        wake::wake_timer::Alarm,
    },
};

/// The vector of an NMI.
const NMI_VECTOR: u8 = 2;

/// Why a vCPU does not go on for now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// The guest does not go on at all.
    Ended(End),
    /// The VM time that the caller named is reached.
    Reached,
    /// Somebody asked for it.
    Asked,
}

/// What came of one turn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// The vCPU was entered.
    Ran,
    /// It was entered in vain: a kick or an open window brought it back.
    Kicked,
    /// It waits for somebody to read what the machine produced.
    Unread,
    /// It waits: nothing is there for it to do. `deaf`: no interrupt could wake it, only a message from another CPU.
    Idle { deaf: bool },
    /// See [`Stop`].
    Stop(Stop),
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

/// One turn of `cpu`: take messages, look at the time, inject, enter once, answer.
pub(crate) fn turn(
    cpu: &mut Cpu,
    platform: &Platform,
    alarm: &mut Alarm,
    stop: Option<GuestTsc>,
    pace: Pace,
) -> Result<Turn, RunError> {
    // An instruction that was completed after its exit may have ended the machine.
    if let Some(exit) = lock(&platform.devices).take_exit() {
        return Ok(Turn::Stop(Stop::Ended(End::Guest(exit))));
    }
    platform.hears(cpu.local.index);
    ipi::receive(cpu, platform)?;
    Access::new(&mut cpu.local, platform).refresh_page();
    // As late as can be: what is done before the wait is not done after it. A halted guest has less to lose: see
    // `Alarm::sleep`.
    if !cpu.local.halted {
        alarm.poll(platform);
    }
    let (now, base, mode, host) = {
        let (clock, host) = platform.read_clock();
        if clock.is_stopped() {
            return Ok(Turn::Stop(Stop::Asked));
        }
        let now = cpu.local.now(&clock, host);
        cpu.local.advance(&clock, now);
        (now, clock.tsc_at(host), clock.mode(), host)
    };
    lint0::sample(cpu, platform, now)?;
    if stop.is_some_and(|stop| base >= stop) {
        return Ok(Turn::Stop(Stop::Reached));
    }
    if platform.waits_for_reader() {
        // It is not the host that keeps it from running.
        if let Some(post) = platform.post(cpu.local.index) {
            post.last_run.idle(host, None);
        }
        return Ok(Turn::Unread);
    }
    if cpu.local.phase == Phase::WaitForSipi {
        return Ok(match platform.deafened(cpu.local.index, Deaf::Parked) {
            Some(end) => Turn::Stop(Stop::Ended(end)),
            None => Turn::Idle { deaf: true },
        });
    }
    let entry = inject(cpu, platform, now, base)?;
    if cpu.local.halted {
        lock(&platform.judge).read_rings(platform);
        let deaf = !cpu.vcpu.interrupts_enabled();
        // Another CPU could still send an NMI or INIT.
        if deaf {
            let address = cpu.vcpu.registers().linear_rip;
            if let Some(end) = platform.deafened(cpu.local.index, Deaf::Halted { address }) {
                return Ok(Turn::Stop(Stop::Ended(end)));
            }
        } else if mode == TimeMode::Real {
            alarm.set(&cpu.local, platform, mode, stop);
        }
        return Ok(Turn::Idle { deaf });
    }
    Access::new(&mut cpu.local, platform).settle_eoi();
    alarm.set(&cpu.local, platform, mode, stop);
    if mode == TimeMode::Real
        && let Some(post) = platform.post(cpu.local.index)
        && !alarm.enter(platform, post, host)
    {
        return Ok(Turn::Kicked);
    }
    cpu.vcpu.set_cr8(cpu.local.apic.cr8());
    let (exit, changed) = match entry {
        // What waits for priority may be let in by MOV CR8, which exits on no host that we know of but one.
        Entry::Blocked if pace == Pace::Free && (mode == TimeMode::Virtual || blocked_by_tpr(&cpu.local)) => {
            single_step::one(cpu, platform)?
        }
        Entry::Injected { vector, .. } if pace == Pace::Step => single_step::into_handler(cpu, platform, vector)?,
        _ if pace == Pace::Step => match cpu.vcpu.entering() {
            // A kick came before it could enter.
            Some(vector) => single_step::into_handler(cpu, platform, vector)?,
            None => single_step::one(cpu, platform)?,
        },
        _ => {
            cpu.vcpu.stop_stepping()?;
            if entry == Entry::Masked && mode == TimeMode::Real {
                alarm.set_soon(platform);
            }
            // In virtual time what else waits enters at the next operation: windows open when the host looks.
            let more = mode == TimeMode::Real && matches!(entry, Entry::Injected { more: true, .. });
            cpu.vcpu.request_window(entry == Entry::Blocked || more);
            // Whatever the guest executes first ends it.
            cpu.local.sti_shadow = false;
            let mut access = Access::new(&mut cpu.local, platform);
            let exit = cpu.vcpu.run(&mut access)?;
            (exit, access.changed)
        }
    };
    if changed != Changed::default() {
        cpu.drain(platform)?;
        cpu.tell_kvm(changed, platform)?;
    }
    match handle(cpu, platform, exit)? {
        None if matches!(exit, Exit::Interrupted | Exit::WindowOpen) => Ok(Turn::Kicked),
        None => Ok(Turn::Ran),
        Some(end) => {
            lock(&platform.judge).read_rings(platform);
            Ok(Turn::Stop(Stop::Ended(end)))
        }
    }
}

/// Leaves the vCPU in a state that may be read: no step, no window, nothing incomplete.
pub(crate) fn settle(cpu: &mut Cpu, platform: &Platform) -> Result<(), RunError> {
    cpu.vcpu.stop_stepping()?;
    cpu.vcpu.request_window(false);
    let drained = cpu.drain(platform);
    platform.costs.add(cpu.vcpu.take_calls());
    drained
}

/// How the vCPU is to be entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Entry {
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
fn inject(cpu: &mut Cpu, platform: &Platform, now: Now, base: GuestTsc) -> Result<Entry, RunError> {
    if cpu.local.nmi {
        // KVM lets it in when it can enter. It comes before all interrupts, also before those that came before it: hosts
        // would let in what is injected first.
        cpu.drain(platform)?;
        let (waiting, masked) = cpu.vcpu.nmis();
        cpu.local.nmi = waiting > 0;
        if waiting > 0 {
            let more = cpu.local.apic.pending().is_some() || cpu.local.apic.external_interrupt();
            return Ok(match (masked, more && cpu.vcpu.interrupts_enabled()) {
                (true, true) => Entry::Masked,
                (true, false) if more => Entry::Blocked,
                (true, false) => Entry::Free,
                (false, _) => Entry::Injected { vector: NMI_VECTOR, more },
            });
        }
    }
    if cpu.local.apic.pending().is_none() && !cpu.local.apic.external_interrupt() {
        let waits = cpu.local.apic.blocked_by_priority() && blocked_by_tpr(&cpu.local);
        return Ok(if waits && !cpu.local.halted { Entry::Blocked } else { Entry::Free });
    }
    // Before it is drained, the last access is incomplete and the flags below are those of its beginning.
    cpu.drain(platform)?;
    let (pending, external) = (cpu.local.apic.pending(), cpu.local.apic.external_interrupt());
    if pending.is_none() && !external {
        return Ok(Entry::Free);
    }
    if cpu.local.sti_shadow || !cpu.vcpu.ready_for_injection() {
        return Ok(Entry::Blocked);
    }
    if external {
        let vector = lint0::acknowledge(&mut cpu.local, platform);
        cpu.vcpu.inject(vector);
        cpu.local.halted = false;
        platform.event(cpu.local.index, now, &Event::Inject { vector });
        return Ok(Entry::Injected { vector, more: pending.is_some() });
    }
    let Some(vector) = pending else { return Ok(Entry::Free) };
    cpu.local.apic.acknowledge(vector);
    Access::new(&mut cpu.local, platform).lend_eoi();
    cpu.vcpu.inject(vector);
    cpu.local.halted = false;
    if vector == cpu.local.apic.timer_vector() {
        cpu.local.timer_interrupts = cpu.local.timer_interrupts.saturating_add(1);
        let judged = lock(&platform.clock).judged(base);
        let due = cpu.local.expired.take();
        lock(&platform.judge).injected(platform.ring_of(cpu.local.index), judged, due);
    }
    platform.event(cpu.local.index, now, &Event::Inject { vector });
    Ok(Entry::Injected { vector, more: false })
}

/// Whether TPR alone (not an interrupt in service, whose EOI exits) could hold back what is requested.
fn blocked_by_tpr(local: &Local) -> bool {
    local.apic.blocked_by_priority() && local.apic.cr8() != 0
}

fn handle(cpu: &mut Cpu, platform: &Platform, exit: Exit) -> Result<Option<End>, RunError> {
    match exit {
        Exit::Operation(_) => Ok(lock(&platform.devices).take_exit().map(End::Guest)),
        Exit::Halt => {
            let registers = cpu.vcpu.registers();
            match platform.site_at(registers.linear_rip.wrapping_sub(1)) {
                Some(kind) => perform_site(cpu, platform, kind, registers.rip.wrapping_sub(1))?,
                None => {
                    let now = Access::new(&mut cpu.local, platform).operation();
                    platform.event(cpu.local.index, now, &Event::Halt);
                    cpu.local.halted = true;
                }
            }
            Ok(None)
        }
        // Kicked: the loop looks why.
        Exit::Interrupted | Exit::WindowOpen | Exit::Debug => Ok(None),
        exit => cannot_go_on(cpu.local.index, &mut cpu.vcpu, platform, exit),
    }
}

/// The end that an exit of vCPU number `cpu` means which nothing can be done about; none for the others.
pub(crate) fn cannot_go_on(
    cpu: u32,
    vcpu: &mut Vcpu,
    platform: &Platform,
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
            cannot_execute(cpu, vcpu, platform, reason).map(Some)
        }
        Exit::FailEntry(reason) => {
            let reason = match kvm::entry_failure(reason) {
                Some(words) => format!("the CPU refused to enter the guest: {words} ({reason:#x})"),
                None => format!("the CPU refused to enter the guest (hardware reason {reason:#x})"),
            };
            cannot_execute(cpu, vcpu, platform, reason).map(Some)
        }
        Exit::Other(reason) => cannot_execute(cpu, vcpu, platform, format!("KVM exit reason {reason}")).map(Some),
    }
}

fn cannot_execute(cpu: u32, vcpu: &mut Vcpu, platform: &Platform, reason: String) -> Result<End, RunError> {
    let at = at(cpu, vcpu);
    let bytes = single_step::instruction_at(vcpu, platform, at.address)?;
    if bytes.is_empty() {
        return Ok(End::NoMemory(at));
    }
    let instruction = disassembly::describe(&bytes, at.address, vcpu.code_bits());
    Ok(End::CannotExecute { at, instruction, reason })
}

/// Where vCPU number `cpu` is, as of the last exit.
pub(crate) fn at(cpu: u32, vcpu: &mut Vcpu) -> At {
    At { cpu, address: vcpu.registers().linear_rip }
}

/// Does what the guest's own instruction at a trap site would have done. All are two bytes long.
fn perform_site(cpu: &mut Cpu, platform: &Platform, kind: Kind, at: u64) -> Result<(), RunError> {
    let next = at.wrapping_add(2);
    let registers = cpu.vcpu.registers();
    let mut access = Access::new(&mut cpu.local, platform);
    match kind {
        Kind::Rdtsc => {
            let now = access.operation();
            platform.event(access.local.index, now, &Event::Rdtsc { rip: at, value: now.tsc });
            cpu.vcpu.continue_with(next, now.tsc.0);
        }
        Kind::DeadlineWrmsr => {
            // WRMSR ignores the upper halves of its registers.
            let [index, low, high] =
                [registers.rcx, registers.rax, registers.rdx].map(|r| u32::try_from(r & 0xffff_ffff).unwrap_or(0));
            let written = access.msr_write_at_site(index, u64::from(high) << 32 | u64::from(low));
            let changed = access.changed;
            cpu.tell_kvm(changed, platform)?;
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
