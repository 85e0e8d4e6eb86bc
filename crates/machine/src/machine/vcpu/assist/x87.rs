//! Performs x87 instructions: those for the control and status words here, the others on the host's CPU.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::{
    RFLAGS_ARITHMETIC, Stop,
    instruction::{CR0_EM, CR0_NE, CR0_TS, Extended},
    operand::State,
    walk::Purpose,
};
use crate::{
    host::x87::{EXCEPTIONS, OPERAND_BYTES, SUMMARY, X87, execute, has},
    kvm::Exception,
};

/// The status word's copy of [`SUMMARY`].
const BUSY: u16 = 1 << 15;
/// The exceptions, the stack fault and both summaries.
const CLEARED_BY_FNCLEX: u16 = 0x80ff;
/// FINIT's control word, and a bit of it that reads as one.
const INITIAL_CONTROL: u16 = 0x37f;
const CONTROL_FIXED: u16 = 1 << 6;

/// Opcode and ModRM byte of an x87 instruction; none if `code` is none. Prefixes are never D8 to DF.
pub(super) fn opcode(code: &[u8]) -> Option<[u8; 2]> {
    let at = code.iter().position(|byte| (0xd8..=0xdf).contains(byte))?;
    Some([*code.get(at)?, *code.get(at + 1)?])
}

/// Whether [`perform`] has `instruction`, whose bytes `code` begins with.
pub(super) fn is_x87(instruction: &Instruction, code: &[u8]) -> bool {
    is_control(instruction.mnemonic())
        || instruction.mnemonic() == Mnemonic::Fnop
        || code.get(..instruction.len()).and_then(opcode).is_some_and(|[opcode, modrm]| {
            // Other instructions may have such bytes in an operand.
            is_first(code) && has(opcode, modrm)
        })
}

/// Whether the first byte that is no prefix is an x87 opcode.
fn is_first(code: &[u8]) -> bool {
    let is_prefix = |byte: &&u8| matches!(**byte, 0x26 | 0x2e | 0x36 | 0x3e | 0x40..=0x4f | 0x64..=0x67 | 0xf2 | 0xf3);
    let first = code.iter().find(|byte| !is_prefix(byte));
    first.is_some_and(|byte| (0xd8..=0xdf).contains(byte))
}

fn is_control(mnemonic: Mnemonic) -> bool {
    waits(mnemonic).is_some()
}

/// Whether a control instruction first takes an exception that waits; none for others.
fn waits(mnemonic: Mnemonic) -> Option<bool> {
    match mnemonic {
        Mnemonic::Fninit | Mnemonic::Fnclex | Mnemonic::Fnstcw | Mnemonic::Fnstsw => Some(false),
        Mnemonic::Fldcw => Some(true),
        _ => None,
    }
}

/// Performs `instruction`, for which [`is_x87`] is true.
pub(super) fn perform(
    state: &mut State<'_>,
    instruction: &Instruction,
    code: &[u8],
    extended: &impl Extended,
) -> Result<(), Stop> {
    let cr0 = state.system.cr0;
    if cr0 & (CR0_EM | CR0_TS) != 0 {
        return Err(Stop::Raise(Exception::DEVICE_NOT_AVAILABLE));
    }
    let mut area = extended.xsave_area()?;
    let before = area.x87();
    let mnemonic = instruction.mnemonic();
    if waits(mnemonic) != Some(false) && before.fsw & SUMMARY != 0 {
        // Without CR0.NE a PC reports it by FERR# and IRQ 13, which this machine does not have.
        return Err(if cr0 & CR0_NE != 0 { Stop::Raise(Exception::X87) } else { Stop::NotCovered });
    }
    let mut after = before;
    match mnemonic {
        Mnemonic::Fninit => (after.fcw, after.fsw, after.tags) = (INITIAL_CONTROL, 0, 0),
        Mnemonic::Fnclex => after.fsw &= !CLEARED_BY_FNCLEX,
        Mnemonic::Fnstcw => return store(state, instruction, &before.fcw.to_le_bytes()),
        Mnemonic::Fnstsw => {
            return match instruction.op0_kind() {
                OpKind::Register => state.set_word(instruction.op0_register(), before.fsw),
                _ => store(state, instruction, &before.fsw.to_le_bytes()),
            };
        }
        Mnemonic::Fldcw => {
            let mut word = [0; 2];
            load(state, instruction, &mut word)?;
            after.fcw = u16::from_le_bytes(word) & 0x1f7f | CONTROL_FIXED;
            let waits = after.fsw & !after.fcw & EXCEPTIONS != 0;
            after.fsw = after.fsw & !(SUMMARY | BUSY) | if waits { SUMMARY | BUSY } else { 0 };
        }
        _ => on_the_cpu(state, instruction, code, &mut after)?,
    }
    if after != before {
        area.set_x87(&after);
        extended.set_xsave_area(&area)?;
    }
    Ok(())
}

fn on_the_cpu(state: &mut State<'_>, instruction: &Instruction, code: &[u8], registers: &mut X87) -> Result<(), Stop> {
    let [opcode, modrm] = opcode(code).ok_or(Stop::NotCovered)?;
    let mut operand = [0; OPERAND_BYTES];
    let size = instruction.memory_size().size();
    let stores = matches!(
        instruction.mnemonic(),
        Mnemonic::Fst | Mnemonic::Fstp | Mnemonic::Fist | Mnemonic::Fistp | Mnemonic::Fisttp | Mnemonic::Fbstp
    );
    let bytes = operand.get_mut(..size).ok_or(Stop::NotCovered)?;
    if size != 0 && !stores {
        load(state, instruction, bytes)?;
    }
    // None with an exception that is not masked: what it leaves is not what the CPU would leave with a mask.
    let flags = execute(registers, opcode, modrm, &mut operand, state.registers.rflags).ok_or(Stop::NotCovered)?;
    if size != 0 && stores {
        store(state, instruction, operand.get(..size).ok_or(Stop::NotCovered)?)?;
    }
    state.registers.rflags = state.registers.rflags & !RFLAGS_ARITHMETIC | flags;
    Ok(())
}

fn load(state: &mut State<'_>, instruction: &Instruction, bytes: &mut [u8]) -> Result<(), Stop> {
    let linear = state.linear(instruction, memory_operand(instruction), bytes.len(), Purpose::Load)?;
    state.load_bytes(linear, bytes)
}

fn store(state: &mut State<'_>, instruction: &Instruction, bytes: &[u8]) -> Result<(), Stop> {
    let linear = state.linear(instruction, memory_operand(instruction), bytes.len(), Purpose::Store)?;
    state.store_bytes(linear, bytes)
}

/// The number of the operand that is in memory.
fn memory_operand(instruction: &Instruction) -> u32 {
    (0..instruction.op_count()).find(|number| instruction.op_kind(*number) == OpKind::Memory).unwrap_or(0)
}
