//! Single-steps a guest until an interrupt that waits can enter.
//!
//! In virtual time an interrupt must enter at the first instruction boundary at which it can, or two runs would differ.
//! Hosts that check only now and then for an open interrupt window would miss a short one. Hosts also differ in what
//! they report when HLT, a trap site or IRETQ is stepped over. So the VMM performs the first two itself, and stops
//! after the third with a breakpoint. A step over a fence also runs the next instruction on kvm_pvm 6.18; the VMM skips
//! fences, since an exit has their effect. It does not in code that single-steps itself, which traps behind the fence.

use vm_memory::{Bytes, GuestAddress};

use super::{
    Cpu,
    assist::{self, RFLAGS_TF},
    bus::{Changed, VcpuBus},
    disassembly::INSTRUCTION_MAX,
    gate::{handler, u64_at},
};
use crate::{
    kvm::{Exit, Vcpu},
    machine::{error::RunError, shared::Shared},
};

const HLT: u8 = 0xf4;
const STI: u8 = 0xfb;
const IRET: u8 = 0xcf;
const REX_W: u8 = 0x48;
/// LFENCE, MFENCE and SFENCE are 0F AE with a third byte from this one on: it names no memory, and SFENCE is the last.
const FIRST_FENCE: u8 = 0xe8;
const FENCE_BYTES: usize = 3;

/// Runs one instruction. Also returns what must then be set in KVM.
pub(crate) fn one_instruction(cpu: &mut Cpu, shared: &Shared) -> Result<(Exit, Changed), RunError> {
    cpu.drain(shared)?;
    if let Some(vector) = cpu.vcpu.exception() {
        // It enters before the instruction at RIP, which the guest may never execute.
        return into_handler(cpu, shared, vector);
    }
    let registers = cpu.vcpu.registers();
    cpu.local.sti_shadow = false;
    if shared.site_at(registers.linear_rip).is_some() {
        // As if its HLT had exited: the caller finds the site at RIP - 1.
        cpu.vcpu.continue_at(registers.rip.wrapping_add(1));
        return Ok((Exit::Halt, Changed::default()));
    }
    let code = bytes_at(&cpu.vcpu, shared, registers.linear_rip)?;
    let breakpoint = match code {
        [HLT, _] if registers.cpl == 0 => {
            cpu.vcpu.continue_at(registers.rip.wrapping_add(1));
            return Ok((Exit::Halt, Changed::default()));
        }
        [REX_W, IRET] | [IRET, _] => u64_at(&cpu.vcpu, shared, registers.rsp)?,
        [0x0f, 0xae] if registers.rflags & RFLAGS_TF == 0 && is_fence(&cpu.vcpu, shared, registers.linear_rip)? => {
            let bits = cpu.vcpu.code_bits();
            cpu.vcpu.continue_at(assist::behind(registers.rip, FENCE_BYTES, bits));
            return Ok((Exit::Debug, Changed::default()));
        }
        [STI, _] => {
            cpu.local.sti_shadow = !cpu.vcpu.interrupts_enabled();
            None
        }
        _ => None,
    };
    let mut access = VcpuBus::new(&mut cpu.local, shared);
    let exit = assist::step(&mut cpu.vcpu, shared, &mut access, breakpoint)?;
    let changed = access.changed;
    Ok((debug_if_arrived(cpu, exit, |rip| rip != registers.rip), changed))
}

/// Lets the injected `vector` enter, and stops before its handler's first instruction. Returns the same as
/// [`one_instruction`].
///
/// It uses a breakpoint, not a step: some hosts stop only after the handler's first instruction, and the interrupt
/// frame would hold the trap flag. If the handler's address cannot be found, runs to the next exit.
pub(crate) fn into_handler(cpu: &mut Cpu, shared: &Shared, vector: u8) -> Result<(Exit, Changed), RunError> {
    let handler = handler(&mut cpu.vcpu, shared, vector)?;
    let mut access = VcpuBus::new(&mut cpu.local, shared);
    let exit = match handler {
        Some(handler) => cpu.vcpu.run_to(&mut access, handler)?,
        None => assist::run(&mut cpu.vcpu, shared, &mut access)?,
    };
    let changed = access.changed;
    Ok((debug_if_arrived(cpu, exit, |rip| Some(rip) == handler), changed))
}

/// Returns a debug exit in place of `exit` if a kick ended KVM_RUN after the vCPU had already arrived `there`.
/// Otherwise this instruction boundary would be missing in the run.
fn debug_if_arrived(cpu: &mut Cpu, exit: Exit, there: impl Fn(u64) -> bool) -> Exit {
    if exit == Exit::Interrupted && there(cpu.vcpu.registers().rip) { Exit::Debug } else { exit }
}

/// Whether the instruction at the linear address `rip` is a fence.
fn is_fence(vcpu: &Vcpu, shared: &Shared, rip: u64) -> Result<bool, RunError> {
    Ok(matches!(instruction_at(vcpu, shared, rip)?.as_slice(), [0x0f, 0xae, third, ..] if *third >= FIRST_FENCE))
}

/// The first bytes of the instruction at the linear address `rip`; zeros where there is no RAM.
pub(crate) fn bytes_at(vcpu: &Vcpu, shared: &Shared, rip: u64) -> Result<[u8; 2], RunError> {
    let mut bytes = [0; 2];
    // KVM_TRANSLATE costs as much as the step. So it is called once, unless the two bytes are in different pages.
    if rip & 0xfff != 0xfff {
        if let Some(physical) = vcpu.translate(rip)? {
            let _ = shared.memory.read_slice(&mut bytes, GuestAddress(physical));
        }
        return Ok(bytes);
    }
    for (offset, byte) in (0u64..).zip(&mut bytes) {
        if let Some(physical) = vcpu.translate(rip.wrapping_add(offset))? {
            let mut one = [0];
            if shared.memory.read_slice(&mut one, GuestAddress(physical)).is_ok() {
                [*byte] = one;
            }
        }
    }
    Ok(bytes)
}

/// The bytes at linear address `rip`, as far as there is RAM: at most as many as the longest instruction has.
pub(crate) fn instruction_at(vcpu: &Vcpu, shared: &Shared, rip: u64) -> Result<Vec<u8>, RunError> {
    let mut bytes = Vec::new();
    for offset in (0..).take(INSTRUCTION_MAX) {
        let physical = vcpu.translate(rip.wrapping_add(offset))?;
        let byte: Option<u8> = physical.and_then(|physical| shared.memory.read_obj(GuestAddress(physical)).ok());
        let Some(byte) = byte else { break };
        bytes.push(byte);
    }
    Ok(bytes)
}
