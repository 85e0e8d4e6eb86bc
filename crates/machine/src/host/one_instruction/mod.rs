//! Executes one instruction on the host's CPU, on registers and an operand that are passed to it.
//!
//! What it is: a [`Form`] is an instruction of a list of features (`allowed`), encoded anew so that its memory
//! operand, if it has one, is a buffer of this module's. It is written to a page of code, and called with the
//! registers that it may use.
//!
//! What it is not: a way to run a guest's code. No form jumps, traps, or touches memory but for the one operand. It
//! cannot fault: the CPU has the feature, the buffer is aligned and large enough, and exceptions are masked.

mod allowed;
mod code;
mod enter;
#[cfg(test)]
mod tests;

use iced_x86::{Encoder, Instruction, InstructionInfoFactory, OpAccess, OpKind, Register};

pub use self::enter::OPERAND_BYTES;
use self::{
    allowed::is_allowed,
    code::{Code, with_code},
    enter::{Context, Image, Operand, enter},
};
use super::xstate::{mxcsr_mask, xcr0};

/// XCR0's bits of components.
const X87: u64 = 1;
const SSE: u64 = 2;
const AVX: u64 = 4;
/// Mask registers, and the vector registers and halves of them that only AVX-512 has.
const AVX512: u64 = 7 << 5;

/// CF, PF, AF, ZF, SF, OF.
const ARITHMETIC: u64 = 0x8d5;
/// The bit of RFLAGS that is always set.
const FIXED: u64 = 2;
/// RSP's number.
const RSP: usize = 4;
/// MXCSR: all exceptions masked; the exceptions that have been raised.
const MASKED: u32 = 0x1f80;
const RAISED: u32 = 0x3f;

/// Which registers, besides the general ones, a form has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Uses {
    /// MMX registers, which are x87's.
    pub mmx: bool,
    /// Vector registers, and MXCSR.
    pub vector: bool,
    /// Vector registers by an encoding of AVX's or AVX-512's, which change their upper parts.
    pub avx: bool,
    /// AVX-512's encoding, or mask registers.
    pub avx512: bool,
}

/// The operand in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Its number among the operands.
    pub number: u32,
    /// Its size.
    pub bytes: usize,
    /// What its address must be a multiple of.
    pub alignment: u64,
    /// Whether the instruction reads it.
    pub is_read: bool,
    /// Whether the instruction writes it.
    pub is_written: bool,
}

/// An instruction that can be executed here.
#[derive(Clone, Copy, Debug)]
pub struct Form {
    code: Code,
    memory: Option<Memory>,
    uses: Uses,
    /// The number of the register that has the operand's address.
    base: usize,
    /// The number of the register that stands for RSP.
    stack: Option<usize>,
}

/// General registers by their numbers, the arithmetic flags, the other registers, and the operand in memory.
pub struct Registers<'a> {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15.
    pub general: [u64; 16],
    /// The arithmetic flags; others read as 0 afterwards.
    pub flags: u64,
    /// An XSAVE area of 4,096 bytes in standard form, if the form [uses](Form::uses) more than general registers. MXCSR
    /// has the exceptions that were raised, and all masked, afterwards.
    pub area: &'a mut [u8],
    /// The operand in memory.
    pub operand: [u8; OPERAND_BYTES],
}

impl Form {
    /// The form of `instruction`; none if it is not on the list, or if the host's CPU lacks its feature.
    #[must_use]
    pub fn new(instruction: &Instruction) -> Option<Self> {
        if !is_allowed(instruction) {
            return None;
        }
        let memory = memory(instruction)?;
        // Without the registers of its address.
        let mut bare = *instruction;
        let is_memory = memory.is_some();
        if is_memory {
            bare.set_memory_base(Register::None);
            bare.set_memory_index(Register::None);
            bare.set_memory_index_scale(1);
            bare.set_memory_displacement64(0);
            bare.set_memory_displ_size(0);
            bare.set_segment_prefix(Register::None);
        }
        let mut factory = InstructionInfoFactory::new();
        let used: Vec<_> = factory.info(&bare).used_registers().iter().map(|used| used.register()).collect();
        let uses = allowed::uses(instruction, &used);
        let is_free = |register: &Register| used.iter().all(|used| used.full_register() != *register);
        let free = || [Register::R8, Register::R9, Register::R10, Register::R11].into_iter().filter(is_free);
        let stack = if is_free(&Register::RSP) { None } else { Some(free().next()?) };
        let others = [Register::RBX, Register::RSI, Register::RDI].into_iter().filter(is_free);
        let base = free().chain(others).find(|register| Some(*register) != stack)?;
        if let Some(stack) = stack {
            for number in 0..bare.op_count() {
                let is_register = bare.op_kind(number) == OpKind::Register;
                if is_register && bare.op_register(number).full_register() == Register::RSP {
                    bare.set_op_register(number, part(stack, bare.op_register(number).size())?);
                }
            }
        }
        if is_memory {
            bare.set_memory_base(base);
        }
        let mut encoder = Encoder::new(64);
        encoder.encode(&bare, 0).ok()?;
        let bytes = encoder.take_buffer();
        let code = Code::new(&bytes)?;
        let is_same = allowed::decodes_to(&bytes, &bare);
        is_same.then_some(Self { code, memory, uses, base: base.number(), stack: stack.map(Register::number) })
    }

    /// Which registers it has.
    #[must_use]
    pub fn uses(&self) -> Uses {
        self.uses
    }

    /// Its operand in memory.
    #[must_use]
    pub fn memory(&self) -> Option<Memory> {
        self.memory
    }

    /// The components of the state that it needs.
    fn components(&self) -> u64 {
        let Uses { mmx, vector, avx, avx512: _ } = self.uses;
        let all = [(mmx, X87), (vector, SSE), (avx, AVX | xcr0() & AVX512)];
        all.into_iter().filter(|(used, _)| *used).fold(0, |bits, (_, bit)| bits | bit)
    }

    /// Executes it. Returns none, with `registers` unchanged, if the area has not the right size, or if this host does
    /// not let the process make code.
    pub fn execute(&self, registers: &mut Registers<'_>) -> Option<()> {
        let components = self.components();
        let mut image = Image::new(if components == 0 { &[] } else { registers.area }, components)?;
        let mut operand = Operand::new(registers.operand);
        let mut general = registers.general;
        if let Some(stack) = self.stack {
            *general.get_mut(stack)? = registers.general[RSP];
        }
        if self.memory.is_some() {
            *general.get_mut(self.base)? = operand.address();
        }
        let flags = registers.flags & ARITHMETIC | FIXED;
        let mut context = Context::new(general, flags, components, &mut image);
        // SAFETY: the code is a form's, so it is on the list, its feature is there, and its operand is in `operand`,
        // which is aligned and as large as any. `image` masks all exceptions.
        with_code(&self.code, |code| unsafe { enter(&mut context, code) })?;
        let mut general = context.general();
        if let Some(stack) = self.stack {
            general[RSP] = *general.get(stack)?;
            *general.get_mut(stack)? = *registers.general.get(stack)?;
        } else {
            general[RSP] = registers.general[RSP];
        }
        if self.memory.is_some() {
            *general.get_mut(self.base)? = *registers.general.get(self.base)?;
        }
        registers.flags = context.flags() & ARITHMETIC;
        registers.general = general;
        registers.operand = operand.bytes();
        if components != 0 {
            image.read_back(registers.area, components);
        }
        Some(())
    }
}

/// The operand of `instruction` that is in memory, if there is one; none if that is in a form that is not covered.
fn memory(instruction: &Instruction) -> Option<Option<Memory>> {
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info(instruction);
    let mut numbers = (0..instruction.op_count()).filter(|number| instruction.op_kind(*number) == OpKind::Memory);
    let Some(number) = numbers.next() else {
        return info.used_memory().is_empty().then_some(None);
    };
    let [used] = info.used_memory() else { return None };
    let (is_read, is_written) = match used.access() {
        OpAccess::Read => (true, false),
        OpAccess::Write => (false, true),
        OpAccess::ReadWrite => (true, true),
        _ => return None,
    };
    let bytes = instruction.memory_size().size();
    // With a mask parts of it need not be there.
    let is_whole = !instruction.is_vsib() && instruction.op_mask() == Register::None;
    let is_covered = (1..=OPERAND_BYTES).contains(&bytes) && is_whole && numbers.next().is_none();
    let alignment = allowed::alignment(instruction, bytes);
    is_covered.then_some(Some(Memory { number, bytes, alignment, is_read, is_written }))
}

/// The part of `bytes` of a register R8 to R11.
fn part(register: Register, bytes: usize) -> Option<Register> {
    let parts = match register {
        Register::R8 => [Register::R8L, Register::R8W, Register::R8D],
        Register::R9 => [Register::R9L, Register::R9W, Register::R9D],
        Register::R10 => [Register::R10L, Register::R10W, Register::R10D],
        _ => [Register::R11L, Register::R11W, Register::R11D],
    };
    let [byte, word, double] = parts;
    match bytes {
        1 => Some(byte),
        2 => Some(word),
        4 => Some(double),
        8 => Some(register),
        _ => None,
    }
}
