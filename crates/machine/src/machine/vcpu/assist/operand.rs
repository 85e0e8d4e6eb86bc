//! An instruction's operands: registers, immediates, and memory through segments and paging.

use iced_x86::{Instruction, OpKind, Register};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::{
    Stop,
    integer::Width,
    walk::{Paging, Purpose},
};
use crate::{
    kvm::{
        Exception,
        state::{GeneralRegisters, Segment, SystemRegisters},
    },
    mem::ram::GuestRam,
};

/// Size of the smallest page.
const PAGE: u64 = 0x1000;

/// A vCPU between two instructions, and its memory.
pub(super) struct State<'a> {
    /// General registers, RIP and RFLAGS.
    pub registers: GeneralRegisters,
    /// Segments and control registers.
    pub system: &'a SystemRegisters,
    /// How addresses are translated.
    pub paging: Paging,
    /// RAM.
    pub memory: &'a GuestRam,
    /// The size of the code segment: 16, 32 or 64.
    pub bits: u32,
}

impl State<'_> {
    fn register(&mut self, register: Register) -> Option<&mut u64> {
        let all = &mut self.registers;
        Some(match register.full_register() {
            Register::RAX => &mut all.rax,
            Register::RBX => &mut all.rbx,
            Register::RCX => &mut all.rcx,
            Register::RDX => &mut all.rdx,
            Register::RSI => &mut all.rsi,
            Register::RDI => &mut all.rdi,
            Register::RSP => &mut all.rsp,
            Register::RBP => &mut all.rbp,
            Register::R8 => &mut all.r8,
            Register::R9 => &mut all.r9,
            Register::R10 => &mut all.r10,
            Register::R11 => &mut all.r11,
            Register::R12 => &mut all.r12,
            Register::R13 => &mut all.r13,
            Register::R14 => &mut all.r14,
            Register::R15 => &mut all.r15,
            _ => return None,
        })
    }

    /// The value of a register of 16, 32 or 64 bits.
    pub(super) fn get(&mut self, register: Register) -> Result<u64, Stop> {
        let width = Width::of_bytes(register.size()).ok_or(Stop::NotCovered)?;
        Ok(*self.register(register).ok_or(Stop::NotCovered)? & width.mask())
    }

    /// Sets a register. One of 32 bits clears the upper half, one of 16 leaves the rest as it is.
    pub(super) fn set(&mut self, register: Register, value: u64) -> Result<(), Stop> {
        let width = Width::of_bytes(register.size()).ok_or(Stop::NotCovered)?;
        let full = self.register(register).ok_or(Stop::NotCovered)?;
        let kept = if width == Width::W16 { *full & !width.mask() } else { 0 };
        *full = kept | value & width.mask();
        Ok(())
    }

    /// The value of operand number `operand`, which is read with `width`.
    pub(super) fn read(&mut self, instruction: &Instruction, operand: u32, width: Width) -> Result<u64, Stop> {
        match instruction.op_kind(operand) {
            OpKind::Register => self.get(instruction.op_register(operand)),
            OpKind::Immediate8 => Ok(u64::from(instruction.immediate8())),
            OpKind::Memory => {
                let linear = self.linear(instruction, operand, width.bytes(), Purpose::Load)?;
                self.load(linear, width)
            }
            _ => Err(Stop::NotCovered),
        }
    }

    fn load(&self, linear: u64, width: Width) -> Result<u64, Stop> {
        let mut bytes = [0; 8];
        self.load_bytes(linear, bytes.get_mut(..width.bytes()).ok_or(Stop::NotCovered)?)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Reads at most a page at a linear address.
    pub(super) fn load_bytes(&self, linear: u64, bytes: &mut [u8]) -> Result<(), Stop> {
        let (in_first, [at_first, at_second]) = self.pages(linear, bytes.len(), Purpose::Load)?;
        let (first, second) = bytes.split_at_mut(in_first);
        for (part, at) in [(first, at_first), (second, at_second)] {
            // An access to a device.
            self.memory.read_slice(part, GuestAddress(at)).map_err(|_| Stop::NotCovered)?;
        }
        Ok(())
    }

    /// Writes at most a page at a linear address.
    pub(super) fn store_bytes(&self, linear: u64, bytes: &[u8]) -> Result<(), Stop> {
        let (in_first, [at_first, at_second]) = self.check_store(linear, bytes.len())?;
        let (first, second) = bytes.split_at(in_first);
        for (part, at) in [(first, at_first), (second, at_second)] {
            self.memory.write_slice(part, GuestAddress(at)).map_err(|_| Stop::NotCovered)?;
        }
        Ok(())
    }

    /// Whether at most a page at a linear address can be written: as [`Self::pages`], if it is RAM.
    pub(super) fn check_store(&self, linear: u64, length: usize) -> Result<(usize, [u64; 2]), Stop> {
        let (in_first, [first, second]) = self.pages(linear, length, Purpose::Store)?;
        let parts = [(in_first, first), (length - in_first, second)];
        let is_ram = |bytes: usize, at| bytes == 0 || self.memory.check_range(GuestAddress(at), bytes);
        if parts.iter().all(|(bytes, at)| is_ram(*bytes, *at)) {
            Ok((in_first, [first, second]))
        } else {
            Err(Stop::NotCovered)
        }
    }

    /// How many of `length` bytes are in the first page, and the physical addresses of these and of those in the next
    /// page. Both are translated before either is accessed: an access faults as a whole.
    fn pages(&self, linear: u64, length: usize, purpose: Purpose) -> Result<(usize, [u64; 2]), Stop> {
        let in_first = usize::try_from(PAGE - linear % PAGE).unwrap_or(usize::MAX).min(length);
        let first = self.paging.translate(self.memory, linear, purpose)?;
        let next = self.wrap(linear.wrapping_add(PAGE - linear % PAGE));
        let second = if in_first == length { first } else { self.paging.translate(self.memory, next, purpose)? };
        Ok((in_first, [first, second]))
    }

    /// Outside 64-bit mode linear addresses have 32 bits.
    fn wrap(&self, linear: u64) -> u64 {
        if self.bits == 64 { linear } else { linear & 0xffff_ffff }
    }

    /// The linear address of memory operand number `operand` of `bytes`, which its segment and, in 64-bit mode, its
    /// canonical form allow.
    pub(super) fn linear(
        &mut self,
        instruction: &Instruction,
        operand: u32,
        bytes: usize,
        purpose: Purpose,
    ) -> Result<u64, Stop> {
        let name = instruction.memory_segment();
        let fault =
            Stop::Raise(if name == Register::SS { Exception::STACK_FAULT } else { Exception::GENERAL_PROTECTION });
        // The effective address: as if segments began at 0.
        let offset = instruction.virtual_address(operand, 0, |register, _, _| {
            if register.is_segment_register() { Some(0) } else { self.get(register).ok() }
        });
        let offset = offset.ok_or(Stop::NotCovered)?;
        let last = u64::try_from(bytes).unwrap_or(u64::MAX).saturating_sub(1);
        if self.bits == 64 {
            let base = match name {
                Register::FS => self.system.fs.base,
                Register::GS => self.system.gs.base,
                _ => 0,
            };
            let linear = base.wrapping_add(offset);
            let unused = 64 - self.paging.linear_bits();
            let is_canonical = |at: u64| (at << unused).cast_signed() >> unused == at.cast_signed();
            let canonical = is_canonical(linear) && is_canonical(linear.wrapping_add(last));
            return if canonical { Ok(linear) } else { Err(fault) };
        }
        let SystemRegisters { es, cs, ss, ds, fs, gs, .. } = self.system;
        let segment = match name {
            Register::ES => es,
            Register::CS => cs,
            Register::SS => ss,
            Register::DS => ds,
            Register::FS => fs,
            Register::GS => gs,
            _ => return Err(Stop::NotCovered),
        };
        if allows(segment, offset, last, purpose) {
            Ok(self.wrap(segment.base.wrapping_add(offset)))
        } else {
            Err(fault)
        }
    }
}

/// Whether `segment` has the bytes from `offset` on, of which the last is `last` further, and may be accessed so (SDM
/// vol. 3, "Limit Checking" and "Type Checking").
fn allows(segment: &Segment, offset: u64, last: u64, purpose: Purpose) -> bool {
    /// Bits of a segment's type.
    const CODE: u8 = 1 << 3;
    const EXPAND_DOWN: u8 = 1 << 2;
    const WRITABLE_OR_READABLE: u8 = 1 << 1;
    let Segment { limit, type_, present, db, s, unusable, .. } = *segment;
    if unusable != 0 || present == 0 || s == 0 {
        return false;
    }
    let is_code = type_ & CODE != 0;
    let permitted = match purpose {
        Purpose::Store => !is_code && type_ & WRITABLE_OR_READABLE != 0,
        Purpose::Look | Purpose::Load => !is_code || type_ & WRITABLE_OR_READABLE != 0,
    };
    let end = offset.saturating_add(last);
    let limit = u64::from(limit);
    let within = if !is_code && type_ & EXPAND_DOWN != 0 {
        let top = if db != 0 { 0xffff_ffff } else { 0xffff };
        offset > limit && end <= top
    } else {
        end <= limit
    };
    permitted && within
}
