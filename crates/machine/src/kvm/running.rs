//! The part of a vCPU's state that ordinary instructions change. It is read and set without a system call.
//!
//! What it is not: the whole state ([`super::state::VcpuState`]). FPU, debug registers and MSRs cost an ioctl each, and
//! kernel code that only handles a timer changes none of them. A caller that sets a vCPU back to an earlier state must
//! check that they have not changed ([`Vcpu::resting_state`]).

use kvm_bindings::{KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_SHADOW, kvm_regs, kvm_sregs, kvm_vcpu_events};
use kvm_ioctls::SyncReg;

use super::{
    Error, Vcpu,
    state::{DebugRegisters, Fpu, Msr, XSTATE_BV},
};

/// General and system registers, and pending events, in KVM's own types: this is never saved to a file.
#[derive(Clone, Copy, Debug)]
pub struct Running {
    regs: kvm_regs,
    sregs: kvm_sregs,
    events: kvm_vcpu_events,
}

/// The rest of a vCPU's state, which [`Running`] does not contain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resting {
    fpu: Fpu,
    debug: DebugRegisters,
    msrs: Vec<Msr>,
}

impl Vcpu {
    /// The running state as of the last exit. Call after [`Vcpu::drain`].
    pub fn running_state(&mut self) -> Running {
        self.sync_interrupt_bitmap();
        let shared = self.fd.sync_regs_mut();
        Running { regs: shared.regs, sregs: shared.sregs, events: shared.events }
    }

    /// Sets `running` as the state for the next entry. Call after [`Vcpu::drain`]: an access that is still incomplete
    /// would overwrite it with its result.
    pub fn set_running_state(&mut self, running: &Running) {
        let Running { regs, sregs, events } = *running;
        let shared = self.fd.sync_regs_mut();
        (shared.regs, shared.sregs, shared.events) = (regs, sregs, events);
        // At each entry KVM takes CR8 from another field, which `set_cr8` sets.
        let cr8 = u8::try_from(sregs.cr8 & 0xf).unwrap_or(0);
        shared.events.flags |= KVM_VCPUEVENT_VALID_SHADOW | KVM_VCPUEVENT_VALID_NMI_PENDING;
        for changed in [SyncReg::Register, SyncReg::SystemRegister, SyncReg::VcpuEvents] {
            self.fd.set_sync_dirty_reg(changed);
        }
        self.set_cr8(cr8);
    }

    /// The resting state; `msr_indices` is the host's list of MSRs with state.
    ///
    /// # Errors
    /// If the ioctl fails.
    pub fn resting_state(&self, msr_indices: &[u32]) -> Result<Resting, Error> {
        let super::state::VcpuState { registers: _, system: _, mut fpu, debug, events: _, msrs } =
            self.state(msr_indices)?;
        // XSTATE_BV has a bit for each component in use. For a component with its initial value a host may set the bit
        // and clear it again, which changes nothing for the guest. So it is not compared.
        fpu.xsave.iter_mut().skip(XSTATE_BV).take(8).for_each(|byte| *byte = 0);
        let used = fpu.xsave.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        fpu.xsave.truncate(used);
        Ok(Resting { fpu, debug, msrs })
    }
}
