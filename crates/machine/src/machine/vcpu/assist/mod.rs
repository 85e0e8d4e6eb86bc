//! Instruction assists: performs an instruction of the guest's that this host's KVM cannot emulate.
//!
//! What it is: some KVM backends run supervisor code in KVM's instruction emulator, which has not every instruction.
//! For one that it lacks KVM_RUN returns with [`EMULATION_FAILED`]. Then the instruction at RIP is decoded from guest
//! memory, performed on the vCPU's registers and memory if it is one of a list, and KVM_RUN is called again: as if KVM
//! had emulated it. No operation is counted, VM time does not move, no interrupt is injected in between, and in
//! single-stepping it is one step.
//!
//! What it is not: an emulator. Where the CPU executes the guest's code itself this is never reached, and what is not
//! on the list ends the guest with a message that names it. Real mode, user code and a guest that single-steps itself
//! are not covered: KVM reports no user code, and the others have not been needed.
//!
//! Why from guest memory: not every kernel reports the bytes. If the guest has changed them meanwhile, the vCPU
//! executes the new ones, as a CPU does that fetches them later.

mod instruction;
mod on_cpu;
mod operand;
mod syscall;
#[cfg(test)]
mod tests;
mod walk;
mod x87;
mod xsave;
mod xsave_area;

use iced_x86::{Decoder, DecoderOptions, Instruction};
use vm_memory::{Bytes, GuestAddress};

use self::{
    instruction::{kind, perform},
    operand::State,
    walk::{Paging, Purpose},
};
use super::{disassembly::INSTRUCTION_MAX, gate};
use crate::{
    kvm::{self, Bus, EMULATION_FAILED, Exception, Exit, Vcpu, state::GeneralRegisters},
    machine::{error::RunError, shared::Shared},
};

const CR0_PE: u64 = 1;
/// Vectors beyond are interrupts only, which KVM injects otherwise.
const LAST_EXCEPTION: u8 = 31;
/// CF, PF, AF, ZF, SF, OF.
const RFLAGS_ARITHMETIC: u64 = 0x8d5;
pub(super) const RFLAGS_TF: u64 = 1 << 8;
const RFLAGS_RF: u64 = 1 << 16;
const RFLAGS_VM: u64 = 1 << 17;
const RFLAGS_AC: u64 = 1 << 18;

/// Why an instruction was not performed.
#[derive(Debug)]
enum Stop {
    /// It faults: the guest takes this exception, and RIP stays.
    Raise(Exception),
    /// Another vCPU changed a page table meanwhile: the guest is to execute the instruction again.
    Again,
    /// It is not on the list, or in a form that is not.
    NotCovered,
    /// KVM refused to tell a register.
    Kvm(kvm::Error),
}

impl From<kvm::Error> for Stop {
    fn from(error: kvm::Error) -> Self {
        Self::Kvm(error)
    }
}

/// As [`Vcpu::run`], but without stepping, and goes on after instructions that could be performed.
///
/// A kick ends it as it ends one KVM_RUN: it sets `immediate_exit`, so that the next KVM_RUN returns at once.
pub(crate) fn run(vcpu: &mut Vcpu, shared: &Shared, bus: &mut impl Bus) -> Result<Exit, RunError> {
    loop {
        syscall::watch(vcpu, shared)?;
        vcpu.stop_stepping()?;
        let mut exit = vcpu.run(bus)?;
        if exit == Exit::Debug && !syscall::finish(vcpu, shared)? {
            exit = syscall::pass(vcpu, shared, bus)?;
        }
        let exit = stepped(vcpu, shared, bus, exit)?;
        if exit != Exit::Debug {
            return Ok(exit);
        }
    }
}

/// As [`Vcpu::step`], also over an instruction that could be performed.
pub(crate) fn step(
    vcpu: &mut Vcpu,
    shared: &Shared,
    bus: &mut impl Bus,
    breakpoint: Option<u64>,
) -> Result<Exit, RunError> {
    syscall::watch_but_here(vcpu, shared)?;
    let exit = vcpu.step(bus, breakpoint)?;
    stepped(vcpu, shared, bus, exit)
}

/// What `exit` is to the caller: [`Exit::Debug`] if it was over an instruction that could be performed.
fn stepped(vcpu: &mut Vcpu, shared: &Shared, bus: &mut impl Bus, exit: Exit) -> Result<Exit, RunError> {
    // Also after a kick: the guest must not be saved in between.
    syscall::finish(vcpu, shared)?;
    Ok(assist(vcpu, shared, bus, exit)?.unwrap_or(exit))
}

/// Performs the instruction at RIP, if `exit` says that KVM cannot and it is covered. Returns [`Exit::Debug`] if the
/// guest is to go on, or the exit that came instead.
fn assist(vcpu: &mut Vcpu, shared: &Shared, bus: &mut impl Bus, exit: Exit) -> Result<Option<Exit>, RunError> {
    if exit != Exit::InternalError(EMULATION_FAILED) {
        return Ok(None);
    }
    let (before, system, bits) = (vcpu.general_registers(), vcpu.system_registers(), vcpu.code_bits());
    let is_supervisor = system.ss.dpl & 3 == 0 && before.rflags & RFLAGS_VM == 0;
    if !is_supervisor || system.cr0 & CR0_PE == 0 || before.rflags & RFLAGS_TF != 0 {
        return Ok(None);
    }
    let paging = Paging::new(&system, before.rflags & RFLAGS_AC != 0);
    let mut state = State { registers: before, system: &system, paging, memory: &shared.memory, bits };
    let Some((instruction, code)) = fetch(&state) else { return Ok(None) };
    let Some(kind) = kind(&instruction, &code) else { return Ok(None) };
    let performed = perform(&mut state, &instruction, &code, vcpu);
    let after = GeneralRegisters {
        rip: next_rip(&state, &instruction),
        rflags: state.registers.rflags & !RFLAGS_RF,
        ..state.registers
    };
    let mut went_on = Exit::Debug;
    match performed {
        Ok(None) => {
            vcpu.continue_from(after);
            vcpu.drop_exception();
        }
        Ok(Some(trap)) => went_on = take_trap(vcpu, shared, bus, (before, after), trap)?,
        Err(Stop::Raise(exception)) => {
            vcpu.continue_from(before);
            vcpu.raise(exception);
        }
        Err(Stop::Again) => {
            vcpu.continue_from(before);
            vcpu.drop_exception();
            return Ok(Some(Exit::Debug));
        }
        Err(Stop::NotCovered) => return Ok(None),
        Err(Stop::Kvm(error)) => return Err(error.into()),
    }
    if went_on != Exit::Interrupted && shared.assists.count(kind) {
        log::info!("KVM cannot emulate {} at {:#x}: performed here", kind.name(), before.rip);
    }
    Ok(Some(went_on))
}

/// Makes the guest take `trap` after an instruction, up to its handler's first instruction: [`Exit::Debug`]. If a kick
/// comes first, the guest is put back before the instruction.
///
/// It cannot wait for the next entry as a fault does: KVM does not tell of a #BP that waits, so that a snapshot taken
/// meanwhile, or an interrupt injected, would lose it.
fn take_trap(
    vcpu: &mut Vcpu,
    shared: &Shared,
    bus: &mut impl Bus,
    (before, after): (GeneralRegisters, GeneralRegisters),
    trap: Exception,
) -> Result<Exit, RunError> {
    let handler = gate::handler(vcpu, shared, trap.vector)?;
    let window = vcpu.window_requested();
    vcpu.continue_from(after);
    if trap.vector > LAST_EXCEPTION {
        vcpu.drop_exception();
        vcpu.inject(trap.vector);
    } else {
        vcpu.raise(trap);
    }
    let exit = match handler {
        Some(handler) => vcpu.run_to(bus, handler)?,
        // The CPU finds no handler either: as a rule a triple fault. Kernels reboot so.
        None => vcpu.run(bus)?,
    };
    vcpu.request_window(window);
    let now = vcpu.registers();
    if exit != Exit::Interrupted || Some(now.rip) == handler {
        return Ok(if exit == Exit::Interrupted { Exit::Debug } else { exit });
    }
    if (now.rip, now.rsp) == (after.rip, after.rsp) {
        vcpu.continue_from(before);
        vcpu.drop_exception();
        vcpu.drop_interrupt();
    }
    Ok(exit)
}

/// The instruction at RIP and the bytes from there on; none if it is not in RAM or is none.
fn fetch(state: &State<'_>) -> Option<(Instruction, [u8; INSTRUCTION_MAX])> {
    /// Size of the smallest page.
    const PAGE: u64 = 0x1000;
    let rip = state.registers.rip;
    let wrap = |at: u64| if state.bits == 64 { at } else { at & 0xffff_ffff };
    let start = if state.bits == 64 { rip } else { wrap(state.system.cs.base.wrapping_add(rip)) };
    let mut bytes = [0; INSTRUCTION_MAX];
    let in_first = usize::try_from(PAGE - start % PAGE).unwrap_or(usize::MAX).min(INSTRUCTION_MAX);
    let (first, second) = bytes.split_at_mut(in_first);
    let read = |linear: u64, part: &mut [u8]| {
        let at = state.paging.translate(state.memory, linear, Purpose::Look).ok()?;
        // RAM may end within the page's bytes that are looked at.
        state.memory.read(part, GuestAddress(at)).ok()
    };
    let mut length = read(start, first)?;
    if length == in_first && !second.is_empty() {
        length += read(wrap(start.wrapping_add(PAGE - start % PAGE)), second).unwrap_or(0);
    }
    let instruction = Decoder::with_ip(state.bits, bytes.get(..length)?, rip, DecoderOptions::NONE).decode();
    (!instruction.is_invalid()).then_some((instruction, bytes))
}

/// RIP behind `instruction`.
fn next_rip(state: &State<'_>, instruction: &Instruction) -> u64 {
    behind(state.registers.rip, instruction.len(), state.bits)
}

/// RIP behind an instruction of `length` bytes at `rip`, in as many bits as the code segment has.
pub(super) fn behind(rip: u64, length: usize, bits: u32) -> u64 {
    let next = rip.wrapping_add(u64::try_from(length).unwrap_or(0));
    match bits {
        64 => next,
        32 => next & 0xffff_ffff,
        _ => next & 0xffff,
    }
}
