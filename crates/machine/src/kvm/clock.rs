//! KVM's own kvmclock, for a VM whose LAPICs are KVM's.

use kvm_bindings::{KVM_CLOCK_HOST_TSC, kvm_clock_data};
use vmtime::{HostTsc, VmTime};

use super::{Error, Vcpu, Vm};
use crate::host::tsc::read_tsc;

/// What KVM's clock showed at an instant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvmClock {
    /// VM time.
    pub vm: VmTime,
    /// The host's TSC then; where KVM does not tell, a little later.
    pub host: HostTsc,
}

impl Vm {
    /// VM time, now.
    ///
    /// # Errors
    /// If the ioctl fails.
    pub fn clock(&self) -> Result<KvmClock, Error> {
        let data = self.fd.get_clock().map_err(Error::call("KVM_GET_CLOCK"))?;
        // KVM tells the TSC only while all vCPUs share one base and the host's own clock is the TSC. A later one makes VM
        // time appear to run behind by the length of a call, so that nobody takes a deadline to be due before it is.
        let host = if data.flags & KVM_CLOCK_HOST_TSC != 0 { data.host_tsc } else { read_tsc() };
        Ok(KvmClock { vm: VmTime(data.clock), host: HostTsc(host) })
    }

    /// VM time is `vm` from now on.
    ///
    /// # Errors
    /// If KVM refuses.
    pub fn set_clock(&self, vm: VmTime) -> Result<(), Error> {
        // No flag: KVM is not to add wall-clock time by itself, the downtime policy has done so.
        let data = kvm_clock_data { clock: vm.0, ..Default::default() };
        self.fd.set_clock(&data).map_err(Error::call("KVM_SET_CLOCK"))
    }
}

impl Vcpu {
    /// KVM sets PVCLOCK_GUEST_STOPPED in this vCPU's page when it publishes the page next.
    ///
    /// # Errors
    /// If KVM refuses, as it does for a guest that has registered no page.
    pub fn tell_stopped(&self) -> Result<(), Error> {
        self.fd.kvmclock_ctrl().map_err(Error::call("KVM_KVMCLOCK_CTRL"))
    }
}
