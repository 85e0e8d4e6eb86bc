//! A vCPU's time stamp counter.

use guest_abi::msr::IA32_TSC;
use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_device_attr};
use vmm_sys_util::{ioctl::ioctl_with_mut_ref, ioctl_iow_nr};
use vmtime::{GuestTsc, HostTsc};

use super::{Error, Vcpu};
use crate::host::tsc::read_tsc;

// Not wrapped by kvm-ioctls.
ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);

impl Vcpu {
    /// Asks KVM for another TSC frequency. It may succeed without effect; see [`super::probe`].
    ///
    /// # Errors
    /// If KVM refuses.
    pub fn set_tsc_khz(&self, khz: u32) -> Result<(), Error> {
        self.fd.set_tsc_khz(khz).map_err(Error::call("KVM_SET_TSC_KHZ"))
    }

    /// Asks KVM for `guest TSC = host TSC + offset`. It may succeed without effect; see [`super::probe`].
    ///
    /// # Errors
    /// If KVM refuses.
    pub fn set_tsc_offset(&self, offset: u64) -> Result<(), Error> {
        let mut offset = offset;
        let attribute = kvm_device_attr {
            group: KVM_VCPU_TSC_CTRL,
            attr: u64::from(KVM_VCPU_TSC_OFFSET),
            addr: &raw mut offset as u64,
            flags: 0,
        };
        let mut attribute = attribute;
        // SAFETY: the attribute points at a live local of type u64, which is the type of this attribute.
        if unsafe { ioctl_with_mut_ref(&self.fd, KVM_SET_DEVICE_ATTR(), &mut attribute) } != 0 {
            return Err(Error::last("KVM_SET_DEVICE_ATTR(KVM_VCPU_TSC_OFFSET)"));
        }
        Ok(())
    }

    /// The vCPU's TSC as KVM reports it, and the host TSC at about the same instant.
    ///
    /// # Errors
    /// If the ioctl fails.
    pub fn measured_tsc(&self) -> Result<(HostTsc, GuestTsc), Error> {
        let guest = super::state::read_msr(&self.fd, IA32_TSC)?;
        // The host's TSC is read second. The guest's TSC is then computed too low rather than too high, and no deadline is
        // taken to be due before it is.
        Ok((HostTsc(read_tsc()), GuestTsc(guest)))
    }
}
