//! Performs instructions by executing them on the host's CPU, on the guest's registers and operand.
//!
//! The checks that the CPU would make of the guest's state are made here; [`Form`] decides what may be executed.
//! Exceptions are masked then, and what they would have raised is found by MXCSR's flags: they are the same but for
//! overflow and underflow, with which a result is another one.

use iced_x86::{EncodingKind, Instruction, Mnemonic};

use super::{
    RFLAGS_ARITHMETIC, Stop,
    instruction::{CR0_EM, CR0_NE, CR0_TS, Extended},
    operand::State,
    walk::Purpose,
    xsave::CR4_OSXSAVE,
};
use crate::{
    host::{
        one_instruction::{Form, Memory, OPERAND_BYTES, Registers, Uses},
        x87::SUMMARY,
        xstate::mxcsr_mask,
    },
    kvm::{
        Exception,
        state::{AVX_BIT, AVX512_BITS, SSE_BIT, XsaveArea},
    },
    machine::record::assists::Assist,
};

const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXMMEXCPT: u64 = 1 << 10;

/// MXCSR: the flags, how far to their masks, and the masks of overflow and underflow; AMD's misaligned accesses.
const FLAGS: u32 = 0x3f;
const MASKS_FROM: u32 = 7;
const MASKS_OF_RESULTS: u32 = 3 << 10;
const MISALIGNED: u32 = 1 << 17;
/// Invalid operation, denormal and zero divide: if one of these is raised, no result is computed, nor its flags (SDM
/// vol. 1, "Exception Priority").
const BEFORE_RESULTS: u32 = 7;

/// What kind of instruction `instruction` is, of which this is the form.
pub(super) fn kind(instruction: &Instruction, form: &Form) -> Assist {
    let Uses { mmx, vector, avx, avx512: _ } = form.uses();
    match instruction.mnemonic() {
        Mnemonic::Popcnt => Assist::Popcnt,
        Mnemonic::Movbe => Assist::Movbe,
        Mnemonic::Adcx | Mnemonic::Adox => Assist::Adx,
        _ if avx => Assist::Avx,
        _ if vector => Assist::Sse,
        _ if mmx => Assist::Mmx,
        _ if instruction.encoding() == EncodingKind::VEX => Assist::Bmi,
        _ => Assist::Sse,
    }
}

/// The kind of an instruction that loads or stores MXCSR.
pub(super) fn mxcsr_kind(mnemonic: Mnemonic) -> Option<Assist> {
    match mnemonic {
        Mnemonic::Ldmxcsr | Mnemonic::Stmxcsr => Some(Assist::Sse),
        Mnemonic::Vldmxcsr | Mnemonic::Vstmxcsr => Some(Assist::Avx),
        _ => None,
    }
}

/// Performs `instruction`, of which this is the form.
pub(super) fn perform(
    state: &mut State<'_>,
    instruction: &Instruction,
    form: &Form,
    extended: &impl Extended,
) -> Result<(), Stop> {
    let uses = form.uses();
    let before = if uses == Uses::default() { None } else { Some(available(state, uses, extended)?) };
    let mxcsr = before.as_ref().filter(|_| uses.vector).map(XsaveArea::mxcsr);
    if mxcsr.is_some_and(|mxcsr| mxcsr & MASKS_OF_RESULTS != MASKS_OF_RESULTS) {
        return Err(Stop::NotCovered);
    }
    let mut operand = [0; OPERAND_BYTES];
    let place = match form.memory() {
        Some(memory) => Some((memory, access(state, instruction, memory, mxcsr, &mut operand)?)),
        None => None,
    };
    let mut after = before.clone();
    let mut registers = Registers {
        general: state.general(),
        flags: state.registers.rflags,
        area: after.as_mut().map_or(&mut [], XsaveArea::bytes_mut),
        operand,
    };
    form.execute(&mut registers).ok_or(Stop::NotCovered)?;
    let Registers { general, flags, operand, area: _ } = registers;
    if let (Some(before), Some(after), Some(mxcsr)) = (&before, &mut after, mxcsr) {
        let raised = after.mxcsr() & FLAGS;
        if raised & !(mxcsr >> MASKS_FROM) != 0 {
            return Err(raise(state, extended, before, raised));
        }
        after.set_mxcsr(mxcsr | raised);
    }
    if let Some((memory, linear)) = place
        && memory.is_written
    {
        state.store_bytes(linear, operand.get(..memory.bytes).ok_or(Stop::NotCovered)?)?;
    }
    if let Some(after) = after.filter(|after| before.as_ref() != Some(after)) {
        extended.set_xsave_area(&after)?;
    }
    state.set_general(general);
    state.registers.rflags = state.registers.rflags & !RFLAGS_ARITHMETIC | flags;
    Ok(())
}

/// Performs `instruction`, which loads or stores MXCSR.
pub(super) fn perform_mxcsr(
    state: &mut State<'_>,
    instruction: &Instruction,
    extended: &impl Extended,
) -> Result<(), Stop> {
    let avx = instruction.encoding() == EncodingKind::VEX;
    let mut area = available(state, Uses { vector: true, avx, ..Uses::default() }, extended)?;
    let mut bytes = area.mxcsr().to_le_bytes();
    if matches!(instruction.mnemonic(), Mnemonic::Stmxcsr | Mnemonic::Vstmxcsr) {
        let linear = state.linear(instruction, 0, bytes.len(), Purpose::Store)?;
        return state.store_bytes(linear, &bytes);
    }
    let linear = state.linear(instruction, 0, bytes.len(), Purpose::Load)?;
    state.load_bytes(linear, &mut bytes)?;
    let mxcsr = u32::from_le_bytes(bytes);
    if mxcsr & !mxcsr_mask() != 0 {
        return Err(Stop::Raise(Exception::GENERAL_PROTECTION));
    }
    area.set_mxcsr(mxcsr);
    Ok(extended.set_xsave_area(&area)?)
}

/// The registers that are not general ones, if the guest has enabled those that are used (SDM vol. 2, "Exceptions").
fn available(state: &State<'_>, uses: Uses, extended: &impl Extended) -> Result<XsaveArea, Stop> {
    let (cr0, cr4) = (state.system.cr0, state.system.cr4);
    let is_enabled = if uses.avx {
        let all = SSE_BIT | AVX_BIT | if uses.avx512 { AVX512_BITS } else { 0 };
        cr4 & CR4_OSXSAVE != 0 && extended.xcr0()?.unwrap_or(0) & all == all
    } else {
        cr0 & CR0_EM == 0 && (!uses.vector || cr4 & CR4_OSFXSR != 0)
    };
    if !is_enabled {
        return Err(Stop::Raise(Exception::INVALID_OPCODE));
    }
    if cr0 & CR0_TS != 0 {
        return Err(Stop::Raise(Exception::DEVICE_NOT_AVAILABLE));
    }
    let area = extended.xsave_area()?;
    match (uses.mmx && area.x87().fsw & SUMMARY != 0, cr0 & CR0_NE != 0) {
        (false, _) => Ok(area),
        (true, true) => Err(Stop::Raise(Exception::X87)),
        // A PC reports it by FERR# and IRQ 13, which this machine does not have.
        (true, false) => Err(Stop::NotCovered),
    }
}

/// Reads the operand in memory if the instruction does, and checks that it can be written if that is to come. Returns
/// its linear address.
fn access(
    state: &mut State<'_>,
    instruction: &Instruction,
    memory: Memory,
    mxcsr: Option<u32>,
    operand: &mut [u8; OPERAND_BYTES],
) -> Result<u64, Stop> {
    let Memory { number, bytes, alignment, is_read, is_written } = memory;
    let purpose = if is_written { Purpose::Store } else { Purpose::Load };
    let linear = state.linear(instruction, number, bytes, purpose)?;
    if !linear.is_multiple_of(alignment) {
        let may_be = mxcsr.is_some_and(|mxcsr| mxcsr & MISALIGNED != 0);
        return Err(if may_be { Stop::NotCovered } else { Stop::Raise(Exception::GENERAL_PROTECTION) });
    }
    if is_written {
        state.check_store(linear, bytes)?;
    }
    if is_read {
        state.load_bytes(linear, operand.get_mut(..bytes).ok_or(Stop::NotCovered)?)?;
    }
    Ok(linear)
}

/// The exception of an instruction that has `raised` one that is not masked: nothing changes but MXCSR's flags.
fn raise(state: &State<'_>, extended: &impl Extended, before: &XsaveArea, raised: u32) -> Stop {
    let mut area = before.clone();
    let mxcsr = before.mxcsr();
    let is_early = raised & !(mxcsr >> MASKS_FROM) & BEFORE_RESULTS != 0;
    area.set_mxcsr(mxcsr | if is_early { raised & BEFORE_RESULTS } else { raised });
    if let Err(error) = extended.set_xsave_area(&area) {
        return error.into();
    }
    let is_reported = state.system.cr4 & CR4_OSXMMEXCPT != 0;
    Stop::Raise(if is_reported { Exception::SIMD } else { Exception::INVALID_OPCODE })
}
