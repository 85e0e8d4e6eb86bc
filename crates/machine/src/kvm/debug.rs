//! A vCPU, one instruction or one breakpoint at a time.

use kvm_bindings::{KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP, kvm_guest_debug};

use super::{Bus, Error, Exit, Vcpu};

impl Vcpu {
    /// Runs one instruction. With `breakpoint`, stops also before the instruction at that address: IRETQ stops one
    /// instruction late on some hosts.
    ///
    /// HLT and trap sites must not be stepped: hosts differ in what they report (the caller performs them itself).
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
        // Registers first: a register write drops the trap flag unless RIP is the one at the last KVM_SET_GUEST_DEBUG.
        self.drain(bus)?;
        // An open window would end the entry before the step.
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
