//! Running a vCPU by single steps, or up to a breakpoint.

use kvm_bindings::{KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP, kvm_guest_debug};

use super::{Bus, Error, Exit, Vcpu};

impl Vcpu {
    /// Runs one instruction. With `breakpoint`, also stops before the instruction at that address. It is needed for
    /// IRETQ, after which some hosts stop one instruction late.
    ///
    /// HLT and trap sites must not be stepped, because hosts report different exits for them; the caller emulates them.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn step(&mut self, bus: &mut impl Bus, breakpoint: Option<u64>) -> Result<Exit, Error> {
        self.debug(bus, KVM_GUESTDBG_SINGLESTEP, breakpoint)
    }

    /// Runs up to the instruction at `breakpoint`, or to another exit.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn run_to(&mut self, bus: &mut impl Bus, breakpoint: u64) -> Result<Exit, Error> {
        self.debug(bus, 0, Some(breakpoint))
    }

    fn debug(&mut self, bus: &mut impl Bus, control: u32, breakpoint: Option<u64>) -> Result<Exit, Error> {
        let mut debug = kvm_guest_debug { control: KVM_GUESTDBG_ENABLE | control, ..Default::default() };
        if let Some(address) = breakpoint {
            debug.control |= KVM_GUESTDBG_USE_HW_BP;
            // DR7: breakpoint 0, global enable, length 1, on execution; bit 10 reads as one.
            (debug.arch.debugreg[0], debug.arch.debugreg[7]) = (address, 0x402);
        }
        // Pending register writes are drained before the ioctl. After it, KVM would drop the trap flag at a register
        // write if RIP is not the one at the time of KVM_SET_GUEST_DEBUG.
        self.drain(bus)?;
        // If an interrupt window were requested and open, the entry would end before the step.
        self.request_window(false);
        self.call().set_guest_debug(&debug).map_err(Error::call("KVM_SET_GUEST_DEBUG"))?;
        self.debugging = true;
        self.run(bus)
    }

    /// Ends stepping.
    ///
    /// # Errors
    /// If KVM refuses.
    pub fn stop_stepping(&mut self) -> Result<(), Error> {
        if self.debugging {
            self.call().set_guest_debug(&kvm_guest_debug::default()).map_err(Error::call("KVM_SET_GUEST_DEBUG"))?;
            self.debugging = false;
        }
        Ok(())
    }
}
