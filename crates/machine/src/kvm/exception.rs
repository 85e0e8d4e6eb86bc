//! Exceptions that the VMM raises in the guest.

use kvm_ioctls::SyncReg;

use super::Vcpu;

/// An exception of the guest's, as its handler sees it (SDM vol. 3, "Exception and Interrupt Reference").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// Its vector.
    pub vector: u8,
    /// Its error code, if it has one.
    pub error_code: Option<u32>,
    /// CR2 after it: the linear address of a page fault.
    pub cr2: Option<u64>,
}

impl Exception {
    /// #BP.
    pub const BREAKPOINT: Self = Self { vector: 3, error_code: None, cr2: None };
    /// #UD.
    pub const INVALID_OPCODE: Self = Self { vector: 6, error_code: None, cr2: None };
    /// #NM.
    pub const DEVICE_NOT_AVAILABLE: Self = Self { vector: 7, error_code: None, cr2: None };
    /// #SS(0).
    pub const STACK_FAULT: Self = Self { vector: 12, error_code: Some(0), cr2: None };
    /// #GP(0).
    pub const GENERAL_PROTECTION: Self = Self { vector: 13, error_code: Some(0), cr2: None };
    /// #MF.
    pub const X87: Self = Self { vector: 16, error_code: None, cr2: None };

    /// #XM.
    pub const SIMD: Self = Self { vector: 19, error_code: None, cr2: None };

    /// #PF with these bits of its error code, at this linear address.
    #[must_use]
    pub fn page_fault(error_code: u32, linear: u64) -> Self {
        Self { vector: 14, error_code: Some(error_code), cr2: Some(linear) }
    }
}

impl Vcpu {
    /// The vector of an exception that the guest takes at the next entry, as of the last exit. KVM never tells of a #BP
    /// or #OF (`kvm_vcpu_ioctl_x86_get_vcpu_events` in Linux arch/x86/kvm/x86.c).
    pub fn exception(&mut self) -> Option<u8> {
        let exception = &self.fd.sync_regs_mut().events.exception;
        (exception.injected != 0).then_some(exception.nr)
    }

    /// Makes the guest take `exception` at the next entry, in place of one that KVM may have queued. RIP must be what
    /// its frame is to hold. Call after [`Vcpu::drain`] or an exit that is no access.
    pub fn raise(&mut self, exception: Exception) {
        let Exception { vector, error_code, cr2 } = exception;
        if let Some(cr2) = cr2 {
            self.sync_interrupt_bitmap();
            self.fd.sync_regs_mut().sregs.cr2 = cr2;
            self.fd.set_sync_dirty_reg(SyncReg::SystemRegister);
        }
        let queued = &mut self.fd.sync_regs_mut().events.exception;
        queued.injected = 1;
        queued.nr = vector;
        queued.has_error_code = u8::from(error_code.is_some());
        queued.error_code = error_code.unwrap_or(0);
        self.events_dirty();
    }

    /// Drops an exception that KVM has queued and the guest has not taken. KVM queues a #UD for an instruction that it
    /// cannot emulate, before it reports that (`handle_emulation_failure` in Linux arch/x86/kvm/x86.c).
    pub fn drop_exception(&mut self) {
        self.fd.sync_regs_mut().events.exception.injected = 0;
        self.events_dirty();
    }
}
