//! A vCPU's time stamp counter.

use guest_abi::msr::IA32_TSC;
use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_device_attr};
use vmm_sys_util::{ioctl::ioctl_with_mut_ref, ioctl_iow_nr};
use vmtime::{GuestTsc, HostTsc};

use super::{Error, Vcpu};
use crate::host::tsc::read_tsc;

// Not wrapped by kvm-ioctls for vCPUs.
ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

/// Attributes of a vCPU's TSC (Linux `devices/vcpu.rst`). The second, a ratio and its number of fraction bits, is proposed:
/// lore.kernel.org/kvm/20260703212145.343527-10-dwmw2@infradead.org.
pub(super) const TSC_OFFSET: u64 = KVM_VCPU_TSC_OFFSET as u64;
pub(super) const TSC_SCALE: u64 = 1;

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
        let attribute =
            kvm_device_attr { group: KVM_VCPU_TSC_CTRL, attr: TSC_OFFSET, addr: &raw mut offset as u64, flags: 0 };
        let mut attribute = attribute;
        // SAFETY: the attribute points at a live local of type u64, which is the type of this attribute.
        if unsafe { ioctl_with_mut_ref(&self.fd, KVM_SET_DEVICE_ATTR(), &mut attribute) } != 0 {
            return Err(Error::last("KVM_SET_DEVICE_ATTR(KVM_VCPU_TSC_OFFSET)"));
        }
        Ok(())
    }

    /// The frequency that KVM reports for this vCPU's TSC, in kHz.
    ///
    /// # Errors
    /// If the ioctl fails.
    pub(super) fn tsc_khz(&self) -> Result<u32, Error> {
        self.fd.get_tsc_khz().map_err(Error::call("KVM_GET_TSC_KHZ"))
    }

    /// An attribute of the TSC that is made of `T`s without padding.
    ///
    /// # Errors
    /// If KVM does not have it.
    pub(super) fn tsc_attribute<T: vm_memory::ByteValued + Default>(&self, attr: u64) -> Result<T, Error> {
        // Room for the longest attribute, should KVM know this number for another one.
        let mut value = [T::default(), T::default()];
        let mut attribute =
            kvm_device_attr { group: KVM_VCPU_TSC_CTRL, attr, addr: value.as_mut_ptr() as u64, flags: 0 };
        // SAFETY: the attribute points at live locals, which any bytes are a value of and which are at least as long as
        // this attribute.
        if unsafe { ioctl_with_mut_ref(&self.fd, KVM_GET_DEVICE_ATTR(), &mut attribute) } != 0 {
            return Err(Error::last("KVM_GET_DEVICE_ATTR(KVM_VCPU_TSC_CTRL)"));
        }
        let [value, _] = value;
        Ok(value)
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
