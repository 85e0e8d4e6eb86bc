//! Running a vCPU by single steps, up to a breakpoint, or with an eye on one instruction.

use kvm_bindings::{KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP, kvm_guest_debug};

use super::{Bus, Error, Exit, Vcpu};

/// What KVM_SET_GUEST_DEBUG has set, or is to set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Debugging {
    single_step: bool,
    breakpoint: Option<u64>,
    watched: Option<u64>,
}

impl Debugging {
    fn to_kvm(self) -> kvm_guest_debug {
        // DR7: bit 10 reads as one. For a breakpoint of length 1 on execution only its global enable is set.
        const DR7: u64 = 0x400;
        const BREAKPOINT_0: u64 = 1 << 1;
        const BREAKPOINT_1: u64 = 1 << 3;
        let Self { single_step, breakpoint, watched } = self;
        let mut debug = kvm_guest_debug::default();
        if single_step {
            debug.control |= KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP;
        }
        if breakpoint.is_some() || watched.is_some() {
            debug.control |= KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP;
            let enable = |address: Option<u64>, bit| if address.is_some() { bit } else { 0 };
            let registers = &mut debug.arch.debugreg;
            (registers[0], registers[1]) = (breakpoint.unwrap_or(0), watched.unwrap_or(0));
            registers[7] = DR7 | enable(breakpoint, BREAKPOINT_0) | enable(watched, BREAKPOINT_1);
        }
        debug
    }
}

impl Vcpu {
    /// From the next step, or call of [`Self::stop_stepping`], on also stops before the instruction at the linear
    /// address `at`, with [`Exit::Debug`]. None: no longer.
    pub fn watch(&mut self, at: Option<u64>) {
        self.watched = at;
    }

    /// Whether the instruction that [`Self::watch`] named is the next one, and in supervisor mode.
    pub fn is_at_watched(&mut self) -> bool {
        let Some(watched) = self.watched else { return false };
        let registers = self.registers();
        registers.linear_rip == watched && registers.cpl == 0
    }

    /// Whether the last entry was a single step, whose trap flag the guest's instructions may have seen.
    pub fn is_stepping(&self) -> bool {
        self.debugging.single_step
    }

    /// Runs one instruction. With `breakpoint`, also stops before the instruction at that address. It is needed for
    /// IRETQ, after which some hosts stop one instruction late.
    ///
    /// HLT and trap sites must not be stepped, because hosts report different exits for them; the caller emulates them.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn step(&mut self, bus: &mut impl Bus, breakpoint: Option<u64>) -> Result<Exit, Error> {
        self.debug(bus, true, breakpoint)
    }

    /// Runs up to the instruction at `breakpoint`, or to another exit.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn run_to(&mut self, bus: &mut impl Bus, breakpoint: u64) -> Result<Exit, Error> {
        self.debug(bus, false, Some(breakpoint))
    }

    fn debug(&mut self, bus: &mut impl Bus, single_step: bool, breakpoint: Option<u64>) -> Result<Exit, Error> {
        // Pending register writes are drained before the ioctl. After it, KVM would drop the trap flag at a register
        // write if RIP is not the one at the time of KVM_SET_GUEST_DEBUG.
        self.drain(bus)?;
        // If an interrupt window were requested and open, the entry would end before the step.
        self.request_window(false);
        self.set_debugging(Debugging { single_step, breakpoint, watched: self.watched })?;
        self.run(bus)
    }

    /// Ends stepping. What [`Self::watch`] asked for is in force from now on.
    ///
    /// # Errors
    /// If KVM refuses.
    pub fn stop_stepping(&mut self) -> Result<(), Error> {
        let wanted = Debugging { watched: self.watched, ..Debugging::default() };
        if self.debugging == wanted { Ok(()) } else { self.set_debugging(wanted) }
    }

    fn set_debugging(&mut self, wanted: Debugging) -> Result<(), Error> {
        self.call().set_guest_debug(&wanted.to_kvm()).map_err(Error::call("KVM_SET_GUEST_DEBUG"))?;
        self.debugging = wanted;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Catches: a breakpoint that is set and not enabled, or the other way round; two in one register.
    #[test]
    fn each_breakpoint_has_its_register_and_its_bit() {
        let of = |single_step, breakpoint, watched| {
            let debug = Debugging { single_step, breakpoint, watched }.to_kvm();
            (debug.control, debug.arch.debugreg[0], debug.arch.debugreg[1], debug.arch.debugreg[7])
        };
        assert_eq!(of(false, None, None), (0, 0, 0, 0));
        assert_eq!(of(true, None, None), (3, 0, 0, 0));
        assert_eq!(of(false, Some(5), None), (0x2_0001, 5, 0, 0x402));
        assert_eq!(of(false, None, Some(7)), (0x2_0001, 0, 7, 0x408));
        assert_eq!(of(true, Some(5), Some(7)), (0x2_0003, 5, 7, 0x40a));
    }
}
