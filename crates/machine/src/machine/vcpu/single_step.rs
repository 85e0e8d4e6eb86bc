//! One instruction at a time: until an interrupt that waits can enter.
//!
//! In virtual time an interrupt must enter at the first boundary that lets it, or two runs would differ; and hosts that
//! look for an open window only now and then would miss a short one. HLT, trap sites and IRETQ need care: hosts differ
//! in what stepping over them reports, so the VMM performs the first two itself and catches the third with a breakpoint.

use vm_memory::{Bytes, GuestAddress};

use super::{
    Cpu,
    bus::{Changed, VcpuBus},
    disassembly::INSTRUCTION_MAX,
};
use crate::{
    kvm::{Exit, Vcpu},
    machine::{error::RunError, shared::Shared},
};

const HLT: u8 = 0xf4;
const STI: u8 = 0xfb;
const IRET: u8 = 0xcf;
const REX_W: u8 = 0x48;

/// Runs one instruction; also gives what KVM must be told.
pub(crate) fn one(cpu: &mut Cpu, shared: &Shared) -> Result<(Exit, Changed), RunError> {
    cpu.drain(shared)?;
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
        [REX_W, IRET] | [IRET, _] => u64_at(cpu, shared, registers.rsp)?,
        [STI, _] => {
            cpu.local.sti_shadow = !cpu.vcpu.interrupts_enabled();
            None
        }
        _ => None,
    };
    let mut access = VcpuBus::new(&mut cpu.local, shared);
    let exit = cpu.vcpu.step(&mut access, breakpoint)?;
    let changed = access.changed;
    Ok((arrived(cpu, exit, |rip| rip != registers.rip), changed))
}

/// Lets the injected `vector` enter, up to its handler's first instruction; gives what [`one`] gives.
///
/// By a breakpoint, not by a step: some hosts stop only after the handler's first instruction, and the frame that the
/// guest returns by would hold the trap flag. Without a table to find the handler in, this is a run to the next exit.
pub(crate) fn into_handler(cpu: &mut Cpu, shared: &Shared, vector: u8) -> Result<(Exit, Changed), RunError> {
    let handler = handler(cpu, shared, vector)?;
    let mut access = VcpuBus::new(&mut cpu.local, shared);
    let exit = match handler {
        Some(handler) => cpu.vcpu.run_to(&mut access, handler)?,
        None => cpu.vcpu.run(&mut access)?,
    };
    let changed = access.changed;
    Ok((arrived(cpu, exit, |rip| Some(rip) == handler), changed))
}

/// A kick that comes as the step is done must not hide that it is: a boundary would be missing.
fn arrived(cpu: &mut Cpu, exit: Exit, there: impl Fn(u64) -> bool) -> Exit {
    if exit == Exit::Interrupted && there(cpu.vcpu.registers().rip) { Exit::Debug } else { exit }
}

/// Where `vector` goes, by the interrupt descriptor table (SDM vol. 3, "IDT Descriptors"); none outside long mode, or if
/// the table is not in RAM.
fn handler(cpu: &mut Cpu, shared: &Shared, vector: u8) -> Result<Option<u64>, RunError> {
    /// Size of a gate in long mode.
    const GATE: u64 = 16;
    let Some(table) = cpu.vcpu.long_mode_idt() else { return Ok(None) };
    let gate = table.wrapping_add(u64::from(vector) * GATE);
    let (low, high) = (u64_at(cpu, shared, gate)?, u64_at(cpu, shared, gate.wrapping_add(8))?);
    // Offset bits 15:0 and 31:16 stand around the selector and the attributes, 63:32 in the upper half.
    Ok(low.zip(high).map(|(low, high)| low & 0xffff | low >> 32 & 0xffff_0000 | high << 32))
}

/// The first bytes of the instruction at the linear address `rip`; zeros where there is no RAM.
pub(crate) fn bytes_at(vcpu: &Vcpu, shared: &Shared, rip: u64) -> Result<[u8; 2], RunError> {
    let mut bytes = [0; 2];
    // Asking KVM for an address costs as much as the step: once, unless the two are in different pages.
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

/// What stands at linear address `rip`, as far as there is RAM: at most the longest instruction.
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

fn u64_at(cpu: &Cpu, shared: &Shared, linear: u64) -> Result<Option<u64>, RunError> {
    let physical = cpu.vcpu.translate(linear)?;
    Ok(physical.and_then(|physical| shared.memory.read_obj(GuestAddress(physical)).ok()))
}
