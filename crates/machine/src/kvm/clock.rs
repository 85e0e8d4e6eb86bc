//! KVM's own kvmclock, for a VM whose LAPICs are KVM's.

use kvm_bindings::{KVM_CLOCK_HOST_TSC, kvm_clock_data};
use vmtime::{HostTsc, VmTime};

use super::{Error, Vcpu, Vm};
use crate::host::tsc::read_tsc;

/// A reading of KVM's kvmclock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvmClock {
    /// VM time.
    pub vm: VmTime,
    /// The host's TSC at that instant, or a little later if KVM does not report it.
    pub host: HostTsc,
}

impl Vm {
    /// Reads KVM's kvmclock, which is VM time.
    ///
    /// # Errors
    /// If the ioctl fails.
    pub fn clock(&self) -> Result<KvmClock, Error> {
        let data = self.fd.get_clock().map_err(Error::call("KVM_GET_CLOCK"))?;
        // KVM reports the TSC only while all vCPUs share one base and the host's own clock is the TSC. Otherwise it is
        // read after the call. VM time is then computed too low by the length of a call, and no deadline is taken to be
        // due before it is.
        let host = if data.flags & KVM_CLOCK_HOST_TSC != 0 { data.host_tsc } else { read_tsc() };
        Ok(KvmClock { vm: VmTime(data.clock), host: HostTsc(host) })
    }

    /// Sets KVM's kvmclock to `vm`.
    ///
    /// # Errors
    /// If KVM refuses.
    pub fn set_clock(&self, vm: VmTime) -> Result<(), Error> {
        // Without KVM_CLOCK_REALTIME: KVM would add the wall-clock time that has passed, which the downtime policy has done.
        let data = kvm_clock_data { clock: vm.0, ..Default::default() };
        self.fd.set_clock(&data).map_err(Error::call("KVM_SET_CLOCK"))
    }
}

impl Vcpu {
    /// Makes KVM set PVCLOCK_GUEST_STOPPED in this vCPU's kvmclock page when it next publishes the page.
    ///
    /// # Errors
    /// If KVM refuses, as it does for a guest that has registered no page.
    pub fn mark_kvmclock_stopped(&self) -> Result<(), Error> {
        self.fd.kvmclock_ctrl().map_err(Error::call("KVM_KVMCLOCK_CTRL"))
    }
}
