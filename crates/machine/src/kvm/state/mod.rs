//! Reading and setting a vCPU's state as plain data.
//!
//! A snapshot holds these types. The conversions name every field of KVM's structures, in both directions, so that a
//! new field does not compile until it is handled. State that the VMM emulates (LAPIC, kvmclock, TSC) is not here.

mod fpu;
mod lapic;
mod msrs;
mod registers;
mod xsave_area;

use kvm_bindings::{
    KVM_MP_STATE_RUNNABLE, KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_SHADOW, kvm_mp_state, kvm_vcpu_events,
};
use serde::{Deserialize, Serialize};

pub use fpu::{DebugRegisters, Fpu, Xcr};
pub use lapic::{KernelLapicState, LapicPage, MpState};
pub use msrs::Msr;
pub(super) use msrs::{read as read_msr, read_each as read_msrs, write as write_msr};
pub use registers::{GeneralRegisters, Segment, SystemRegisters, Table};
pub(super) use registers::{flat_data, syscall_segments};
pub use xsave_area::{
    AVX_BIT, AVX512_BITS, HEAD_BYTES, MXCSR, MXCSR_INITIAL, SSE_BIT, X87_BIT, X87_CONTROL, X87_INITIAL, X87_REGISTERS,
    XMM, XSTATE_BV, XsaveArea,
};

use super::{Error, Vcpu};
use crate::x86::{ENTRY_STACK, EntryState};

/// The state of a vCPU that KVM holds and the guest can see.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VcpuState {
    /// General registers.
    pub registers: GeneralRegisters,
    /// Segments, control registers, EFER, APIC base.
    pub system: SystemRegisters,
    /// x87, SSE, AVX, … and XCR0.
    pub fpu: Fpu,
    /// DR0–DR7.
    pub debug: DebugRegisters,
    /// Exceptions, interrupts and NMIs that are pending or being delivered, and what blocks them.
    pub events: Events,
    /// Model-specific registers.
    pub msrs: Vec<Msr>,
}

impl VcpuState {
    /// The linear address of the next instruction.
    #[must_use]
    pub fn code_address(&self) -> u64 {
        let SystemRegisters { cs, efer, .. } = &self.system;
        super::registers::code_address(self.registers.rip, cs.base, cs.l != 0, *efer)
    }
}

/// Exceptions, interrupts and NMIs that are pending or being delivered (KVM_GET_VCPU_EVENTS).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Events {
    /// An exception being delivered: vector and, if it has one, error code.
    pub exception: Option<(u8, Option<u32>)>,
    /// An external interrupt being delivered: vector, and whether it is a software interrupt.
    pub interrupt: Option<(u8, bool)>,
    /// Interrupt shadow: bit 0 by MOV SS, bit 1 by STI.
    pub interrupt_shadow: u8,
    /// An NMI being delivered.
    pub nmi_injected: bool,
    /// NMIs waiting.
    pub nmi_pending: u8,
    /// NMIs blocked until IRET.
    pub nmi_masked: bool,
}

impl Events {
    fn from_kvm(events: &kvm_vcpu_events) -> Self {
        // Not saved are:
        // - SMIs and SIPIs. Without KVM's LAPIC none can be sent. With it, KVM_GET_MP_STATE, which is called before,
        //   has processed a pending SIPI, and SMIs are for firmware, which no guest has.
        // - Triple faults, which end the VM before it could be saved.
        // - Payloads, which need a capability that is not enabled.
        let kvm_vcpu_events {
            exception,
            interrupt,
            nmi,
            sipi_vector: _,
            flags: _,
            smi: _,
            triple_fault: _,
            reserved: _,
            exception_has_payload: _,
            exception_payload: _,
        } = events;
        Self {
            exception: (exception.injected != 0)
                .then_some((exception.nr, (exception.has_error_code != 0).then_some(exception.error_code))),
            interrupt: (interrupt.injected != 0).then_some((interrupt.nr, interrupt.soft != 0)),
            interrupt_shadow: interrupt.shadow,
            nmi_injected: nmi.injected != 0,
            nmi_pending: nmi.pending,
            nmi_masked: nmi.masked != 0,
        }
    }

    fn to_kvm(self) -> kvm_vcpu_events {
        let Self { exception, interrupt, interrupt_shadow, nmi_injected, nmi_pending, nmi_masked } = self;
        let mut events = kvm_vcpu_events::default();
        if let Some((vector, error_code)) = exception {
            events.exception.injected = 1;
            events.exception.nr = vector;
            events.exception.has_error_code = u8::from(error_code.is_some());
            events.exception.error_code = error_code.unwrap_or(0);
        }
        if let Some((vector, soft)) = interrupt {
            events.interrupt.injected = 1;
            events.interrupt.nr = vector;
            events.interrupt.soft = u8::from(soft);
        }
        events.interrupt.shadow = interrupt_shadow;
        events.nmi.injected = u8::from(nmi_injected);
        events.nmi.pending = nmi_pending;
        events.nmi.masked = u8::from(nmi_masked);
        events.flags = KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW;
        events
    }
}

impl Vcpu {
    /// Reads the current state. Call after [`Vcpu::drain`].
    ///
    /// `msr_indices` is the host's list of MSRs with state.
    ///
    /// # Errors
    /// If the ioctl fails.
    pub fn state(&self, msr_indices: &[u32]) -> Result<VcpuState, Error> {
        Ok(VcpuState {
            registers: GeneralRegisters::from_kvm(&self.fd.get_regs().map_err(Error::call("KVM_GET_REGS"))?),
            system: SystemRegisters::from_kvm(&self.fd.get_sregs().map_err(Error::call("KVM_GET_SREGS"))?),
            fpu: Fpu::get(&self.fd, self.has_xcrs)?,
            debug: DebugRegisters::from_kvm(&self.fd.get_debug_regs().map_err(Error::call("KVM_GET_DEBUGREGS"))?),
            events: Events::from_kvm(&self.fd.get_vcpu_events().map_err(Error::call("KVM_GET_VCPU_EVENTS"))?),
            msrs: msrs::get(&self.fd, msr_indices)?,
        })
    }

    /// Sets the state of a fresh vCPU, whose CPUID is set.
    ///
    /// # Errors
    /// If KVM refuses part of it.
    pub fn set_state(&mut self, state: &VcpuState) -> Result<(), Error> {
        let VcpuState { registers, system, fpu, debug, events, msrs: saved_msrs } = state;
        // MP state first: on some kernels an application processor does not run if it was never set. Without KVM's
        // LAPIC only RUNNABLE can be set; the VMM itself keeps whether the guest halts. With it, the saved MP state is
        // set at the end, after the LAPIC (`set_mp_state`).
        self.fd
            .set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE })
            .map_err(Error::call("KVM_SET_MP_STATE"))?;
        // XCR0 before the FPU state, because it decides which components that may contain. `Fpu::set` does both.
        fpu.set(&self.fd)?;
        // Control registers and EFER before MSRs that depend on the mode.
        self.fd.set_sregs(&system.to_kvm()).map_err(Error::call("KVM_SET_SREGS"))?;
        msrs::set(&self.fd, saved_msrs)?;
        self.fd.set_debug_regs(&debug.to_kvm()).map_err(Error::call("KVM_SET_DEBUGREGS"))?;
        // Events after KVM_SET_REGS, which clears pending exceptions.
        self.fd.set_regs(&registers.to_kvm()).map_err(Error::call("KVM_SET_REGS"))?;
        self.fd.set_vcpu_events(&events.to_kvm()).map_err(Error::call("KVM_SET_VCPU_EVENTS"))?;
        self.set_cr8(u8::try_from(system.cr8 & 0xf).unwrap_or(0));
        self.incomplete = true;
        Ok(())
    }

    /// Sets flat 32-bit protected mode without paging, in which PVH, Multiboot and Linux' 32-bit boot protocol enter a
    /// kernel. All other state is as after reset.
    ///
    /// # Errors
    /// If KVM refuses.
    pub fn set_flat_32bit_entry(&mut self, entry: &EntryState) -> Result<(), Error> {
        let EntryState { rip, rax, rbx, rsi, gdt, pc: _ } = *entry;
        let (_, mut system) = *self.fresh;
        registers::make_flat_32bit(&mut system, gdt);
        self.fd.set_sregs(&system).map_err(Error::call("KVM_SET_SREGS"))?;
        let regs = kvm_bindings::kvm_regs { rip, rax, rbx, rsi, rsp: ENTRY_STACK, rflags: 2, ..Default::default() };
        self.fd.set_regs(&regs).map_err(Error::call("KVM_SET_REGS"))?;
        self.incomplete = true;
        Ok(())
    }

    /// Sets the registers after INIT (SDM vol. 3, table "IA-32 and Intel 64 Processor States Following Power-up, Reset,
    /// or INIT"): as after reset, debug registers too, but FPU state and most MSRs stay, and CR0 keeps CD and NW. The
    /// next instruction is at F000:FFF0, 16 bytes below 4 GiB.
    ///
    /// # Errors
    /// If KVM refuses.
    pub fn reset_after_init(&mut self) -> Result<(), Error> {
        const CR0_CD_NW: u64 = 3 << 29;
        let (regs, fresh) = *self.fresh;
        let now = self.call().get_sregs().map_err(Error::call("KVM_GET_SREGS"))?;
        let mut system = fresh;
        system.cr0 = fresh.cr0 & !CR0_CD_NW | now.cr0 & CR0_CD_NW;
        system.apic_base = now.apic_base;
        self.call().set_sregs(&system).map_err(Error::call("KVM_SET_SREGS"))?;
        self.call().set_regs(&regs).map_err(Error::call("KVM_SET_REGS"))?;
        self.call().set_vcpu_events(&Events::default().to_kvm()).map_err(Error::call("KVM_SET_VCPU_EVENTS"))?;
        let debug = DebugRegisters::RESET.to_kvm();
        self.call().set_debug_regs(&debug).map_err(Error::call("KVM_SET_DEBUGREGS"))?;
        self.incomplete = true;
        Ok(())
    }

    /// Sets the instruction pointer to `cs`:0 in real mode, where a SIPI starts a CPU.
    ///
    /// # Errors
    /// If KVM refuses.
    pub fn set_real_mode_entry(&mut self, cs: u16) -> Result<(), Error> {
        let mut system = self.call().get_sregs().map_err(Error::call("KVM_GET_SREGS"))?;
        system.cs.selector = cs;
        system.cs.base = u64::from(cs) << 4;
        self.call().set_sregs(&system).map_err(Error::call("KVM_SET_SREGS"))?;
        let mut regs = self.call().get_regs().map_err(Error::call("KVM_GET_REGS"))?;
        regs.rip = 0;
        self.call().set_regs(&regs).map_err(Error::call("KVM_SET_REGS"))?;
        self.incomplete = true;
        Ok(())
    }

    /// Sets KVM's copy of IA32_APIC_BASE in a vCPU that is in its reset state: see [`Vcpu::set_apic_base`].
    ///
    /// # Errors
    /// If KVM refuses.
    pub fn set_apic_base_at_reset(&mut self, value: u64) -> Result<(), Error> {
        let (_, system) = &mut *self.fresh;
        system.apic_base = value;
        self.fd.set_sregs(system).map_err(Error::call("KVM_SET_SREGS"))
    }
}
