//! A vCPU's time stamp counter.

use guest_abi::msr::IA32_TSC;
use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_device_attr};
use vmm_sys_util::{ioctl::ioctl_with_mut_ref, ioctl_iow_nr};
use vmtime::{GuestTsc, HostTsc, Khz, Rate};

use super::{Error, Vcpu};
use crate::host::tsc::read_tsc;

// Not wrapped by kvm-ioctls for vCPUs.
ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

/// Attributes of a vCPU's TSC (Linux `devices/vcpu.rst`). The second, a ratio and its number of fraction bits, is
/// proposed: lore.kernel.org/kvm/20260703212145.343527-10-dwmw2@infradead.org.
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
        // Twice the room: attribute 1 is not in Linux yet, and may become another one.
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

    /// Whether KVM reports the ratio by which the CPU scales the TSC (KVM_VCPU_TSC_SCALE).
    #[must_use]
    pub fn has_tsc_scale(&self) -> bool {
        self.tsc_attribute::<[u64; 2]>(TSC_SCALE).is_ok()
    }

    /// How the vCPU's TSC follows the host's, after KVM was asked to scale it to `khz` on a host of `host_khz`.
    ///
    /// A CPU multiplies the host's TSC with a ratio that is rounded down, so that the exact quotient of the frequencies
    /// is not the guest's rate. Linux does not report the ratio yet; it follows from the number of fraction bits that
    /// the CPU has. A rate is used only if it gives the TSC that KVM reports. If none does, the quotient is used, from
    /// that TSC on.
    ///
    /// # Errors
    /// If an ioctl fails.
    pub fn scaled_tsc(&self, khz: Khz, host_khz: Khz) -> Result<ScaledTsc, Error> {
        let reported = self.tsc_attribute::<[u64; 2]>(TSC_SCALE).ok();
        let reported = reported.and_then(|[ratio, bits]| Rate::from_ratio(ratio, u8::try_from(bits).ok()?));
        let by_bits = fraction_bits().map(|bits| Rate::fixed_point(khz, host_khz, bits));
        // KVM leaves the TSC unscaled if the frequencies differ by no more than its parameter `tsc_tolerance_ppm`.
        let unscaled = Rate::Quotient { guest: host_khz, host: host_khz };
        let rates = [reported].into_iter().chain(by_bits).flatten().chain([unscaled]);
        let offset = self.tsc_attribute::<u64>(TSC_OFFSET);
        let before = read_tsc();
        let guest = super::state::read_msr(&self.fd, IA32_TSC)?;
        // The host's TSC is read last. If no rate fits and the two are paired, the guest's is then too low rather than
        // too high, and no deadline counts as due before it is.
        let after = read_tsc();
        if let Ok(offset) = offset {
            for rate in rates {
                let at = |host| rate.scaled(host).wrapping_add(offset);
                if (at(before)..=at(after)).contains(&guest) {
                    return Ok(ScaledTsc { host: HostTsc(after), guest: GuestTsc(at(after)), rate });
                }
            }
        }
        let rate = Rate::Quotient { guest: khz, host: host_khz };
        Ok(ScaledTsc { host: HostTsc(after), guest: GuestTsc(guest), rate })
    }
}

/// How a vCPU's TSC follows the host's: two values of one instant, and the rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScaledTsc {
    /// The host's TSC.
    pub host: HostTsc,
    /// The guest's.
    pub guest: GuestTsc,
    /// How the guest's follows.
    pub rate: Rate,
}

/// The fraction bits of the TSC ratio: those of this CPU's vendor first. On a host that was booted a short time ago
/// both ratios may give a TSC that was read.
fn fraction_bits() -> [u8; 2] {
    // "Auth", "Hygo": the first four letters of the vendors with SVM.
    let svm = [u32::from_le_bytes(*b"Auth"), u32::from_le_bytes(*b"Hygo")];
    // CPUID has no side effects; x86-64 always has it.
    if svm.contains(&core::arch::x86_64::__cpuid(0).ebx) {
        [Rate::SVM_BITS, Rate::VMX_BITS]
    } else {
        [Rate::VMX_BITS, Rate::SVM_BITS]
    }
}
