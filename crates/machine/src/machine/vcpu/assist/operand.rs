//! An instruction's operands: registers, immediates, and memory through segments and paging.

use iced_x86::{Instruction, Register};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::{
    Stop,
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
    /// The general registers by their numbers in an instruction.
    pub(super) fn general(&self) -> [u64; 16] {
        let GeneralRegisters { rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15, .. } =
            self.registers;
        [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15]
    }

    /// Sets them.
    pub(super) fn set_general(&mut self, general: [u64; 16]) {
        let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = general;
        let GeneralRegisters { rip, rflags, .. } = self.registers;
        self.registers = GeneralRegisters {
            rax,
            rcx,
            rdx,
            rbx,
            rsp,
            rbp,
            rsi,
            rdi,
            r8,
            r9,
            r10,
            r11,
            r12,
            r13,
            r14,
            r15,
            rip,
            rflags,
        };
    }

    /// The value of a register of 16, 32 or 64 bits.
    fn get(&self, register: Register) -> Option<u64> {
        let mask = match register.size() {
            2 => 0xffff,
            4 => 0xffff_ffff,
            8 => u64::MAX,
            _ => return None,
        };
        let number = register.is_gpr().then(|| register.number())?;
        self.general().get(number).map(|value| value & mask)
    }

    /// Sets a register of 16 bits, and leaves the rest of it as it is.
    pub(super) fn set_word(&mut self, register: Register, value: u16) -> Result<(), Stop> {
        let mut general = self.general();
        let is_word = register.is_gpr16();
        let full = general.get_mut(register.number()).filter(|_| is_word).ok_or(Stop::NotCovered)?;
        *full = *full & !0xffff | u64::from(value);
        self.set_general(general);
        Ok(())
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
        &self,
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
            if register.is_segment_register() { Some(0) } else { self.get(register) }
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
