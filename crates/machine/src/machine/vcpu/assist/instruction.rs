//! Performs one decoded instruction on a vCPU's registers and memory.

use iced_x86::{Instruction, Mnemonic};

use super::{RFLAGS_AC, Stop, on_cpu, operand::State, walk::Purpose, x87, xsave};
use crate::{
    host::{atomic16, one_instruction::Form, x87::SUMMARY},
    kvm::{Error, Exception, Vcpu, state::XsaveArea},
    machine::record::assists::Assist,
};

const CR0_MP: u64 = 1 << 1;
pub(super) const CR0_EM: u64 = 1 << 2;
pub(super) const CR0_TS: u64 = 1 << 3;
pub(super) const CR0_NE: u64 = 1 << 5;
const CR4_CET: u64 = 1 << 23;
/// The vector of an NMI.
const NMI: u8 = 2;
/// RFLAGS.ZF.
const ZF: u64 = 1 << 6;

/// x87, SSE and extended registers, which cost an ioctl.
pub(super) trait Extended {
    /// XCR0; none without XSAVE.
    fn xcr0(&self) -> Result<Option<u64>, Error>;
    /// Sets XCR0. Returns whether the CPU takes the value.
    fn set_xcr0(&self, value: u64) -> Result<bool, Error>;
    /// IA32_XSS.
    fn xss(&self) -> Result<u64, Error>;
    /// All registers that XSAVE saves.
    fn xsave_area(&self) -> Result<XsaveArea, Error>;
    /// Sets them.
    fn set_xsave_area(&self, area: &XsaveArea) -> Result<(), Error>;
}

impl Extended for Vcpu {
    fn xcr0(&self) -> Result<Option<u64>, Error> {
        Self::xcr0(self)
    }

    fn set_xcr0(&self, value: u64) -> Result<bool, Error> {
        Self::set_xcr0(self, value)
    }

    fn xss(&self) -> Result<u64, Error> {
        Self::xss(self)
    }

    fn xsave_area(&self) -> Result<XsaveArea, Error> {
        Self::xsave_area(self)
    }

    fn set_xsave_area(&self, area: &XsaveArea) -> Result<(), Error> {
        Self::set_xsave_area(self, area)
    }
}

/// The kind of `instruction`, if it is one that [`perform`] can perform. Its bytes are the first of `code`.
pub(super) fn kind(instruction: &Instruction, code: &[u8]) -> Option<Assist> {
    Some(match instruction.mnemonic() {
        Mnemonic::Nop
        | Mnemonic::Reservednop
        | Mnemonic::Endbr32
        | Mnemonic::Endbr64
        | Mnemonic::Rdsspd
        | Mnemonic::Rdsspq
        | Mnemonic::Clwb => Assist::Nop,
        Mnemonic::Int3 => Assist::Int3,
        Mnemonic::Int => Assist::Int,
        Mnemonic::Clac | Mnemonic::Stac => Assist::Ac,
        Mnemonic::Cmpxchg16b => Assist::Cmpxchg16b,
        Mnemonic::Xgetbv => Assist::Xgetbv,
        Mnemonic::Xsetbv => Assist::Xsave,
        mnemonic if xsave::is_xsave(mnemonic) => Assist::Xsave,
        Mnemonic::Rdtscp => Assist::Rdtscp,
        Mnemonic::Wait => Assist::Fwait,
        _ if x87::is_x87(instruction, code) => Assist::X87,
        mnemonic => match on_cpu::mxcsr_kind(mnemonic) {
            Some(kind) => kind,
            None => on_cpu::kind(instruction, &Form::new(instruction)?),
        },
    })
}

/// Performs `instruction`, which is at `state`'s RIP; RIP itself is left to the caller. Returns the exception or
/// interrupt that it raises as its effect, after which the guest goes on behind it.
///
/// # Errors
/// Why it was not performed. `state`'s registers must then not be used.
pub(super) fn perform(
    state: &mut State<'_>,
    instruction: &Instruction,
    code: &[u8],
    extended: &impl Extended,
) -> Result<Option<Exception>, Stop> {
    match instruction.mnemonic() {
        Mnemonic::Nop | Mnemonic::Reservednop | Mnemonic::Endbr32 | Mnemonic::Endbr64 => {}
        // With shadow stacks it reads SSP.
        Mnemonic::Rdsspd | Mnemonic::Rdsspq if state.system.cr4 & CR4_CET == 0 => {}
        // What it writes back is not the guest's to see: it is a load.
        Mnemonic::Clwb => {
            let linear = state.linear(instruction, 0, 1, Purpose::Load)?;
            state.load_bytes(linear, &mut [0])?;
        }
        Mnemonic::Int3 => return Ok(Some(Exception::BREAKPOINT)),
        // KVM injects vector 2 as an NMI only.
        Mnemonic::Int if instruction.immediate8() != NMI => {
            return Ok(Some(Exception { vector: instruction.immediate8(), error_code: None, cr2: None }));
        }
        Mnemonic::Clac => state.registers.rflags &= !RFLAGS_AC,
        Mnemonic::Stac => state.registers.rflags |= RFLAGS_AC,
        Mnemonic::Cmpxchg16b => cmpxchg16b(state, instruction)?,
        Mnemonic::Xgetbv | Mnemonic::Xsetbv => xsave::perform(state, instruction, extended)?,
        mnemonic if xsave::is_xsave(mnemonic) => xsave::perform(state, instruction, extended)?,
        // CPUID does not offer it, because it would tell the host's TSC where that is not the guest's. A CPU whose
        // CPUID lacks it raises #UD.
        Mnemonic::Rdtscp => return Err(Stop::Raise(Exception::INVALID_OPCODE)),
        Mnemonic::Wait => fwait(state, extended)?,
        _ if x87::is_x87(instruction, code) => x87::perform(state, instruction, code, extended)?,
        mnemonic if on_cpu::mxcsr_kind(mnemonic).is_some() => on_cpu::perform_mxcsr(state, instruction, extended)?,
        _ => on_cpu::perform(state, instruction, &Form::new(instruction).ok_or(Stop::NotCovered)?, extended)?,
    }
    Ok(None)
}

/// CMPXCHG16B. It is one atomic access whether it has a LOCK prefix or not.
fn cmpxchg16b(state: &mut State<'_>, instruction: &Instruction) -> Result<(), Stop> {
    let linear = state.linear(instruction, 0, atomic16::BYTES, Purpose::Store)?;
    if !linear.is_multiple_of(16) {
        return Err(Stop::Raise(Exception::GENERAL_PROTECTION));
    }
    // The page must be writable even if the comparison fails: the CPU then writes back what it read.
    let address = state.paging.translate(state.memory, linear, Purpose::Store)?;
    let registers = &mut state.registers;
    let expected = u128::from(registers.rdx) << 64 | u128::from(registers.rax);
    let new = u128::from(registers.rcx) << 64 | u128::from(registers.rbx);
    let held = atomic16::compare_exchange(state.memory, address, expected, new).ok_or(Stop::NotCovered)?;
    if held != expected {
        let [rax, rdx] = [held, held >> 64].map(|half| u64::try_from(half & u128::from(u64::MAX)).unwrap_or(0));
        (registers.rax, registers.rdx) = (rax, rdx);
    }
    let zero = if held == expected { ZF } else { 0 };
    state.registers.rflags = state.registers.rflags & !ZF | zero;
    Ok(())
}

/// FWAIT: takes an x87 exception that waits.
fn fwait(state: &State<'_>, extended: &impl Extended) -> Result<(), Stop> {
    let cr0 = state.system.cr0;
    if cr0 & (CR0_MP | CR0_TS) == CR0_MP | CR0_TS {
        return Err(Stop::Raise(Exception::DEVICE_NOT_AVAILABLE));
    }
    match (extended.xsave_area()?.x87().fsw & SUMMARY != 0, cr0 & CR0_NE != 0) {
        (false, _) => Ok(()),
        (true, true) => Err(Stop::Raise(Exception::X87)),
        // A PC reports it by FERR# and IRQ 13, which this machine does not have.
        (true, false) => Err(Stop::NotCovered),
    }
}
