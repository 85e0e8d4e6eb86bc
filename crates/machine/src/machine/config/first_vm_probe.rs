//! Probes the host on the first machine's own vCPU.
//!
//! A probe needs a VM and a vCPU, and creating the two is most of what a start costs. So the first machine is built for
//! a host that needs no workaround, and its own first vCPU executes the probe before its state is set to the guest's.
//! If the host does need one, that machine is dropped, the host is probed in VMs of their own, and the machine is built
//! again. So no guest runs on facts that were only assumed.

use super::HostEnvironment;
use crate::{
    kvm::{Error, HostFacts, Vcpu, Vm, probe},
    machine::error::RunError,
    x86::Leaf,
};

/// The host facts that a machine is being built for.
pub(crate) struct FirstVmProbe<'a> {
    /// The host.
    pub env: &'a HostEnvironment,
    /// Its facts.
    pub facts: HostFacts,
    /// They have been measured; otherwise they are assumed.
    measured: bool,
}

impl<'a> FirstVmProbe<'a> {
    /// Measured facts: those of earlier probes, or else of probes that run now.
    ///
    /// # Errors
    /// Those of the probes.
    pub(crate) fn measured(env: &'a HostEnvironment) -> Result<Self, RunError> {
        Ok(Self { env, facts: env.facts()?, measured: true })
    }

    /// Whether KVM moves a guest's TSC by an offset. Always measured, in a VM of its own if necessary.
    ///
    /// # Errors
    /// Those of the probes.
    pub(crate) fn tsc_offset(&self) -> Result<bool, RunError> {
        if self.measured { Ok(self.facts.tsc_offset) } else { self.env.offset_works() }
    }

    /// Creates vCPU number `index` of `vm`, which sees the CPUID `leaves`; the caller sets its state. If the facts are
    /// not measured yet, vCPU 0 first executes the probe, whose code is in the RAM at `at` meanwhile.
    pub(crate) fn vcpu(&mut self, vm: &Vm, index: u32, leaves: &[Leaf], at: u64) -> Result<Vcpu, Error> {
        let mut vcpu = Vcpu::new(vm, index, leaves)?;
        if !self.measured && index == 0 && probe::can_probe(leaves) {
            let seen = probe::probe_in_place(&mut vcpu, vm.memory(), at)?;
            self.measured = seen.is_some();
            self.facts = seen.map_or(self.facts, |facts| self.env.as_emulated(facts));
        }
        Ok(vcpu)
    }
}

/// Calls `make` to build a machine or a part of it: with assumed facts if nothing is measured yet, and again with
/// measured ones if the probe on its vCPU did not confirm the assumption.
///
/// # Errors
/// Those of `make`, and of the probes.
pub(crate) fn build<'a, T>(
    env: &'a HostEnvironment,
    make: impl Fn(&mut FirstVmProbe<'a>) -> Result<T, RunError>,
) -> Result<T, RunError> {
    if env.is_unprobed() {
        let mut probe = FirstVmProbe { env, facts: env.as_emulated(HostFacts::WITHOUT_WORKAROUNDS), measured: false };
        let made = make(&mut probe);
        if probe.measured {
            env.set_facts(probe.facts);
            return made;
        }
    }
    make(&mut FirstVmProbe::measured(env)?)
}
