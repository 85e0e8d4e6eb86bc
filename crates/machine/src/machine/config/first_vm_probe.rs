//! What this host does, learnt from the first machine itself.
//!
//! A probe needs a VM and a vCPU, and making the two is most of what a start costs. So the first machine is planned for a
//! host that does all that could be hoped for, and its own first vCPU executes the probe before it is given the guest's
//! state. If the hopes were too high, that machine is thrown away, the host is probed in VMs of their own, and the machine
//! is planned again: nothing that was only hoped for ever runs a guest.

use super::HostEnvironment;
use crate::{
    kvm::{Error, HostFacts, Vcpu, Vm, probe},
    machine::error::RunError,
    x86::Leaf,
};

/// A machine on its way, and what it may count on.
pub(crate) struct FirstVmProbe<'a> {
    /// The host.
    pub env: &'a HostEnvironment,
    /// What it does.
    pub facts: HostFacts,
    /// That has been measured.
    certain: bool,
}

impl<'a> FirstVmProbe<'a> {
    /// Counts on what was measured.
    ///
    /// # Errors
    /// Those of the probes.
    pub(crate) fn certain(env: &'a HostEnvironment) -> Result<Self, RunError> {
        Ok(Self { env, facts: env.facts()?, certain: true })
    }

    /// Whether KVM moves a guest's TSC by an offset: measured, in a VM of its own if need be.
    ///
    /// # Errors
    /// Those of the probes.
    pub(crate) fn tsc_offset(&self) -> Result<bool, RunError> {
        if self.certain { Ok(self.facts.tsc_offset) } else { self.env.offset_works() }
    }

    /// vCPU number `index` of `vm`, which sees the CPUID `leaves` and still needs its state. Where what the host does is not
    /// yet certain, number 0 tells; the code for that is lent the RAM at `at`.
    pub(crate) fn vcpu(&mut self, vm: &Vm, index: u32, leaves: &[Leaf], at: u64) -> Result<Vcpu, Error> {
        let mut vcpu = Vcpu::new(vm, index, leaves)?;
        if !self.certain && index == 0 && probe::can_probe(leaves) {
            let seen = probe::probe_in_place(&mut vcpu, vm.memory(), at)?;
            self.certain = seen.is_some();
            self.facts = seen.map_or(self.facts, |facts| self.env.as_emulated(facts));
        }
        Ok(vcpu)
    }
}

/// Makes a machine, or what there is of one when `make` is done: with what this host is known to do, or else by trial.
///
/// # Errors
/// Those of `make`, and of the probes.
pub(crate) fn settle<'a, T>(
    env: &'a HostEnvironment,
    make: impl Fn(&mut FirstVmProbe<'a>) -> Result<T, RunError>,
) -> Result<T, RunError> {
    if env.hopes() {
        let mut probe = FirstVmProbe { env, facts: env.as_emulated(HostFacts::WITHOUT_WORKAROUNDS), certain: false };
        let made = make(&mut probe);
        if probe.certain {
            env.learn(probe.facts);
            return made;
        }
    }
    make(&mut FirstVmProbe::certain(env)?)
}
