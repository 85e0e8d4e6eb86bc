//! SYSCALL in user mode, where KVM goes to IA32_LSTAR and stays in user mode.
//!
//! What happens there: RCX and R11 are set, the instruction at IA32_LSTAR is in a page of the kernel's, and the guest
//! gets a page fault for fetching it in user mode. What this does: the vCPU stops before the first instruction of the
//! guest's page-fault handler. If the frame there is that of a SYSCALL, the exception is undone, and the guest goes on
//! at IA32_LSTAR in supervisor mode. Otherwise it was a page fault, and the handler runs.
//!
//! What it is not: it changes no byte of the guest's memory but those of the frame, below the stack pointer that the
//! guest's next exception uses. Where KVM performs SYSCALL (a probe says so) nothing is watched.
//!
//! Why a breakpoint at the handler: the same host reports none at IA32_LSTAR, because user code runs without KVM.

use vm_memory::{Bytes, GuestAddress};

use super::walk::{Paging, Purpose};
use crate::{
    kvm::{
        Bus, Exit, SyscallMsrs, Vcpu,
        state::{GeneralRegisters, SystemRegisters},
    },
    machine::{error::RunError, record::assists::Assist, shared::Shared},
};

/// Vector of a page fault.
const PAGE_FAULT: u64 = 14;
/// Bits of its error code (SDM vol. 3, "Page-Fault Exceptions"): present, user, instruction fetch.
const PRESENT: u64 = 1;
const USER: u64 = 1 << 2;
const FETCH: u64 = 1 << 4;

const SYSCALL: [u8; 2] = [0x0f, 0x05];
const HLT: u8 = 0xf4;

const RFLAGS_FIXED: u64 = 1 << 1;
const RFLAGS_TF: u64 = 1 << 8;
const RFLAGS_RF: u64 = 1 << 16;

/// A page fault's frame on the stack of its handler in 64-bit mode, from RSP on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Frame {
    pub error_code: u64,
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
}

/// Watches the page-fault handler from the next entry on, if this vCPU needs that.
pub(super) fn watch(vcpu: &mut Vcpu, shared: &Shared) -> Result<(), RunError> {
    let needed = vcpu.has_syscall() && shared.user_syscall.faults();
    let handler = if needed { handler(&vcpu.system_registers(), shared) } else { None };
    vcpu.watch(handler);
    Ok(())
}

/// As [`watch`], for a single step: one that begins at the handler goes over its first instruction.
pub(super) fn watch_but_here(vcpu: &mut Vcpu, shared: &Shared) -> Result<(), RunError> {
    watch(vcpu, shared)?;
    if vcpu.is_at_watched() {
        vcpu.watch(None);
    }
    Ok(())
}

/// If the vCPU is at the beginning of its page-fault handler because of a SYSCALL, performs that, and returns true.
pub(super) fn finish(vcpu: &mut Vcpu, shared: &Shared) -> Result<bool, RunError> {
    if !vcpu.is_at_watched() {
        return Ok(false);
    }
    let (registers, system) = (vcpu.general_registers(), vcpu.system_registers());
    let Some(frame) = Frame::read(registers.rsp, &system, shared) else { return Ok(false) };
    if !frame.is_of_fetch_by_user(system.cr2) {
        return Ok(false);
    }
    let mut code = [0; SYSCALL.len()];
    let behind = registers.rcx.wrapping_sub(u64::try_from(SYSCALL.len()).unwrap_or(0));
    if !read(behind, &mut code, &system, shared) || code != SYSCALL {
        return Ok(false);
    }
    let msrs = vcpu.syscall_msrs()?;
    let Some(after) = performed(registers, frame, msrs, vcpu.is_stepping()) else { return Ok(false) };
    vcpu.continue_as_supervisor(after, msrs.star);
    if shared.assists.count(Assist::Syscall) {
        log::info!("KVM stays in user mode at SYSCALL, at {behind:#x}: performed here");
    }
    Ok(true)
}

/// Lets the page-fault handler's first instruction pass, at which the vCPU was stopped.
pub(super) fn pass(vcpu: &mut Vcpu, shared: &Shared, bus: &mut impl Bus) -> Result<Exit, RunError> {
    let (at, system) = (vcpu.registers().linear_rip, vcpu.system_registers());
    if !vcpu.is_at_watched() {
        // A trap of the guest's own debugging, which KVM does not pass on while it debugs.
        return Ok(Exit::Debug);
    }
    vcpu.watch(None);
    let mut code = [0];
    // Hosts report HLT, and a patched trap site, in different ways if they step over it.
    if read(at, &mut code, &system, shared) && code == [HLT] {
        vcpu.stop_stepping()?;
        return Ok(vcpu.run(bus)?);
    }
    Ok(vcpu.step(bus, None)?)
}

/// The address of the page-fault handler; none if it is not in RAM.
fn handler(system: &SystemRegisters, shared: &Shared) -> Option<u64> {
    let mut gate = [0; 16];
    if !read(system.idt.base.wrapping_add(PAGE_FAULT * 16), &mut gate, system, shared) {
        return None;
    }
    // Offset bits 15:0 and 31:16 are on both sides of the selector and the attributes, bits 63:32 in the upper half.
    let [a, b, _, _, _, _, c, d, e, f, g, h, ..] = gate;
    Some(u64::from_le_bytes([a, b, c, d, e, f, g, h]))
}

/// Reads guest memory at a linear address; false if not all of it is mapped to RAM.
fn read(linear: u64, bytes: &mut [u8], system: &SystemRegisters, shared: &Shared) -> bool {
    const PAGE: u64 = 0x1000;
    let paging = Paging::new(system, false);
    let in_first = usize::try_from(PAGE - linear % PAGE).unwrap_or(usize::MAX).min(bytes.len());
    let (first, second) = bytes.split_at_mut(in_first);
    let next = linear.wrapping_add(PAGE - linear % PAGE);
    [(linear, first), (next, second)].into_iter().filter(|(_, part)| !part.is_empty()).all(|(linear, part)| {
        let physical = paging.translate(&shared.memory, linear, Purpose::Look);
        physical.is_ok_and(|at| shared.memory.read_slice(part, GuestAddress(at)).is_ok())
    })
}

impl Frame {
    fn read(rsp: u64, system: &SystemRegisters, shared: &Shared) -> Option<Self> {
        let mut bytes = [0; 40];
        read(rsp, &mut bytes, system, shared).then(|| Self::from_bytes(&bytes))
    }

    fn from_bytes(bytes: &[u8; 40]) -> Self {
        let mut words = [0; 5];
        for (word, bytes) in words.iter_mut().zip(bytes.as_chunks().0) {
            *word = u64::from_le_bytes(*bytes);
        }
        let [error_code, rip, cs, rflags, rsp] = words;
        Self { error_code, rip, cs, rflags, rsp }
    }

    /// Whether it is of a page fault at the instruction that user code was about to execute. The flag for a fetch is
    /// set only with NX or SMEP.
    pub(super) fn is_of_fetch_by_user(&self, cr2: u64) -> bool {
        self.cs & 3 == 3 && self.rip == cr2 && self.error_code & !(PRESENT | FETCH) == USER
    }
}

/// The registers after the SYSCALL (SDM vol. 2, "SYSCALL"); none if this was none. `before` are those at the page-fault
/// handler: KVM has put the return address into RCX and the flags into R11, and has cleared those in IA32_FMASK. If the
/// VMM was `stepping`, TF in R11 is its own.
///
/// User code that jumps to IA32_LSTAR with just these values there gets what a SYSCALL would give it.
pub(super) fn performed(
    before: GeneralRegisters,
    frame: Frame,
    msrs: SyscallMsrs,
    stepping: bool,
) -> Option<GeneralRegisters> {
    let hidden = if stepping { RFLAGS_RF | RFLAGS_TF } else { RFLAGS_RF };
    let (r11, rflags) = (before.r11 & !hidden, frame.rflags & !hidden);
    let is_syscall = frame.rip == msrs.lstar && rflags == r11 & !msrs.fmask | RFLAGS_FIXED;
    is_syscall.then_some(GeneralRegisters { rip: frame.rip, rsp: frame.rsp, r11, rflags, ..before })
}
