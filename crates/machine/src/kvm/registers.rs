//! A vCPU's registers in the page that it shares with KVM: read after an exit, changed before an entry.

use guest_abi::msr::{IA32_FMASK, IA32_LSTAR, IA32_STAR};
use kvm_ioctls::SyncReg;

use super::{
    Error, Exception, Vcpu,
    state::{GeneralRegisters, SystemRegisters, read_msrs, syscall_segments},
};

/// The registers that the emulation of an instruction needs, read from the shared page after an exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Registers {
    /// Instruction pointer.
    pub rip: u64,
    /// The linear address of the next instruction: RIP and, outside 64-bit mode, the base of CS.
    pub linear_rip: u64,
    /// Accumulator.
    pub rax: u64,
    /// Counter: the MSR number of RDMSR and WRMSR.
    pub rcx: u64,
    /// Data: the high half of RDMSR and WRMSR.
    pub rdx: u64,
    /// Stack pointer.
    pub rsp: u64,
    /// Flags.
    pub rflags: u64,
    /// Current privilege level, 0–3.
    pub cpl: u8,
}

/// The MSRs that say what SYSCALL does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SyscallMsrs {
    /// IA32_STAR: the base of the kernel's segments in bits 47:32.
    pub star: u64,
    /// IA32_LSTAR: where it goes.
    pub lstar: u64,
    /// IA32_FMASK: the flags that it clears.
    pub fmask: u64,
}

/// RFLAGS.IF.
const RFLAGS_IF: u64 = 1 << 9;
/// CR0.PE: no real mode.
const CR0_PE: u64 = 1;
/// EFER.SCE: SYSCALL is enabled.
const EFER_SCE: u64 = 1;
/// EFER.LMA: long mode is active.
const EFER_LMA: u64 = 1 << 10;

/// The linear address of the instruction at `rip` of a code segment, whose L bit is `long`.
pub(super) fn code_address(rip: u64, base: u64, long: bool, efer: u64) -> u64 {
    // Outside 64-bit mode linear addresses have 32 bits.
    if efer & EFER_LMA != 0 && long { rip } else { base.wrapping_add(rip) & 0xffff_ffff }
}

impl Vcpu {
    /// Registers as of the last exit.
    pub fn registers(&mut self) -> Registers {
        let shared = self.fd.sync_regs_mut();
        let (regs, system) = (&shared.regs, &shared.sregs);
        Registers {
            rip: regs.rip,
            linear_rip: code_address(regs.rip, system.cs.base, system.cs.l != 0, system.efer),
            rax: regs.rax,
            rcx: regs.rcx,
            rdx: regs.rdx,
            rsp: regs.rsp,
            rflags: regs.rflags,
            cpl: system.ss.dpl & 3,
        }
    }

    /// The size of the code segment at the last exit: 16, 32 or 64 bits.
    pub fn code_bits(&mut self) -> u32 {
        let system = &self.fd.sync_regs_mut().sregs;
        match (system.efer & EFER_LMA != 0 && system.cs.l != 0, system.cs.db != 0) {
            (true, _) => 64,
            (false, true) => 32,
            (false, false) => 16,
        }
    }

    /// Whether RFLAGS.IF was set at the last exit.
    pub fn interrupts_enabled(&mut self) -> bool {
        self.fd.sync_regs_mut().regs.rflags & RFLAGS_IF != 0
    }

    /// The vector of an interrupt that was injected and that the guest has not taken yet, as of the last exit.
    pub fn entering(&mut self) -> Option<u8> {
        let interrupt = &self.fd.sync_regs_mut().events.interrupt;
        (interrupt.injected != 0).then_some(interrupt.nr)
    }

    /// KVM's bits for an interrupt shadow of MOV SS (1) and of STI (2), as of the last exit.
    pub(super) fn interrupt_shadow(&mut self) -> u8 {
        self.fd.sync_regs_mut().events.interrupt.shadow
    }

    /// The interrupt descriptor table as of the last exit: its address, its limit (the offset of its last byte), and
    /// whether it has long mode's gates. None in real mode.
    pub fn idt(&mut self) -> Option<(u64, u16, bool)> {
        let system = &self.fd.sync_regs_mut().sregs;
        (system.cr0 & CR0_PE != 0).then_some((system.idt.base, system.idt.limit, system.efer & EFER_LMA != 0))
    }

    /// Continues at `rip` at the next entry. The interrupt shadow of a preceding STI or MOV SS ends, as after any
    /// instruction.
    pub fn continue_at(&mut self, rip: u64) {
        let shared = self.fd.sync_regs_mut();
        shared.regs.rip = rip;
        let shadowed = shared.events.interrupt.shadow != 0;
        shared.events.interrupt.shadow = 0;
        self.fd.set_sync_dirty_reg(SyncReg::Register);
        if shadowed {
            self.events_dirty();
        }
    }

    /// Continues at `rip` at the next entry with EDX:EAX = `value`, as after RDTSC.
    pub fn continue_with(&mut self, rip: u64, value: u64) {
        let shared = self.fd.sync_regs_mut();
        shared.regs.rax = value & 0xffff_ffff;
        shared.regs.rdx = value >> 32;
        self.continue_at(rip);
    }

    /// Raises #GP(0) with `rip` as the faulting instruction.
    pub fn raise_gp_at(&mut self, rip: u64) {
        self.continue_at(rip);
        self.raise(Exception::GENERAL_PROTECTION);
    }

    /// The general registers as of the last exit.
    pub fn general_registers(&mut self) -> GeneralRegisters {
        self.fd.sync_regs_mut().regs.into()
    }

    /// The segment and control registers as of the last exit.
    pub fn system_registers(&mut self) -> SystemRegisters {
        self.fd.sync_regs_mut().sregs.into()
    }

    /// Continues with these registers at the next entry, as after an instruction that the VMM performed.
    pub fn continue_from(&mut self, registers: GeneralRegisters) {
        self.fd.sync_regs_mut().regs = registers.into();
        self.continue_at(registers.rip);
    }

    /// What SYSCALL uses, as of now.
    ///
    /// # Errors
    /// If the ioctl fails.
    pub fn syscall_msrs(&self) -> Result<SyscallMsrs, Error> {
        let [star, lstar, fmask] = read_msrs(self.call(), [IA32_STAR, IA32_LSTAR, IA32_FMASK])?;
        Ok(SyscallMsrs { star, lstar, fmask })
    }

    /// Whether the guest has enabled SYSCALL for 64-bit mode, as of the last exit.
    pub fn has_syscall(&mut self) -> bool {
        const WANTED: u64 = EFER_LMA | EFER_SCE;
        self.fd.sync_regs_mut().sregs.efer & WANTED == WANTED
    }

    /// Continues with these registers at the next entry, in supervisor mode with the code and stack segments that
    /// SYSCALL loads.
    pub fn continue_as_supervisor(&mut self, registers: GeneralRegisters, star: u64) {
        self.sync_interrupt_bitmap();
        let selector = u16::try_from(star >> 32 & 0xffff).unwrap_or(0);
        let system = &mut self.fd.sync_regs_mut().sregs;
        (system.cs, system.ss) = syscall_segments(selector);
        self.fd.set_sync_dirty_reg(SyncReg::SystemRegister);
        self.continue_from(registers);
    }

    pub(super) fn events_dirty(&mut self) {
        // KVM takes over the interrupt shadow only if this flag is set.
        self.fd.sync_regs_mut().events.flags |= kvm_bindings::KVM_VCPUEVENT_VALID_SHADOW;
        self.fd.set_sync_dirty_reg(SyncReg::VcpuEvents);
    }

    /// Sets KVM's copy of IA32_APIC_BASE, from which KVM derives CPUID.1:EDX.APIC. KVM does not check the value; our
    /// LAPIC has.
    pub fn set_apic_base(&mut self, value: u64) {
        self.sync_interrupt_bitmap();
        self.fd.sync_regs_mut().sregs.apic_base = value;
        self.fd.set_sync_dirty_reg(SyncReg::SystemRegister);
    }

    /// Makes the shared interrupt bitmap agree with the shared events. KVM sets the bit of an interrupt that waits to
    /// be delivered, but never clears bits there. If an old bit were written back, KVM would deliver that interrupt
    /// again.
    pub(super) fn sync_interrupt_bitmap(&mut self) {
        let shared = self.fd.sync_regs_mut();
        let interrupt = &shared.events.interrupt;
        let mut bitmap = [0u64; 4];
        if interrupt.injected != 0
            && interrupt.soft == 0
            && let Some(word) = bitmap.get_mut(usize::from(interrupt.nr >> 6))
        {
            *word = 1 << (interrupt.nr & 63);
        }
        shared.sregs.interrupt_bitmap = bitmap;
    }
}
