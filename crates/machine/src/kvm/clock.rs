//! KVM's own kvmclock, for a VM whose LAPICs are KVM's.

use guest_abi::pvclock::TIME_INFO_BYTES;
use kvm_bindings::{KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, KVMIO, kvm_clock_data};
use vmm_sys_util::{
    ioctl::{ioctl_with_mut_ref, ioctl_with_ref},
    ioctl_ior_nr, ioctl_iow_nr,
};
use vmtime::{HostTsc, VmTime};

use super::{Error, Vcpu, Vm};
use crate::host::tsc::read_tsc;

// Proposed: lore.kernel.org/kvm/20260703212145.343527-1-dwmw2@infradead.org.
ioctl_iow_nr!(KVM_SET_CLOCK_GUEST, KVMIO, 0xd6, [u8; TIME_INFO_BYTES]);
ioctl_ior_nr!(KVM_GET_CLOCK_GUEST, KVMIO, 0xd7, [u8; TIME_INFO_BYTES]);

/// A reading of KVM's kvmclock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvmClock {
    /// VM time.
    pub vm: VmTime,
    /// The host's TSC at that instant, or a little later if KVM does not report it.
    pub host: HostTsc,
    /// By how many ticks it is later at most.
    pub late_ticks: u64,
    /// CLOCK_REALTIME at that instant, in nanoseconds, if KVM reports it.
    pub realtime_ns: Option<u64>,
}

/// How often the clock is read if KVM does not report the TSC. A thread may lose its CPU meanwhile.
const TRIES: usize = 8;

impl Vm {
    /// Reads KVM's kvmclock, which is VM time.
    ///
    /// # Errors
    /// If the ioctl fails.
    pub fn clock(&self) -> Result<KvmClock, Error> {
        let mut best = self.read_clock()?;
        for _ in 1..TRIES {
            if best.late_ticks == 0 {
                break;
            }
            let new = self.read_clock()?;
            if new.late_ticks < best.late_ticks {
                best = new;
            }
        }
        Ok(best)
    }

    fn read_clock(&self) -> Result<KvmClock, Error> {
        let before = read_tsc();
        let data = self.clock_data()?;
        let after = read_tsc();
        // KVM reports the TSC only while all vCPUs share one base and the host's own clock is the TSC. Otherwise it is
        // read after the call. VM time is then computed too low by the length of a call, and no deadline is taken to be
        // due before it is.
        let reported = data.flags & KVM_CLOCK_HOST_TSC != 0;
        let (host, late_ticks) = if reported { (data.host_tsc, 0) } else { (after, after.saturating_sub(before)) };
        let realtime_ns = (data.flags & KVM_CLOCK_REALTIME != 0).then_some(data.realtime);
        Ok(KvmClock { vm: VmTime(data.clock), host: HostTsc(host), late_ticks, realtime_ns })
    }

    /// Sets KVM's kvmclock to `vm`.
    ///
    /// # Errors
    /// If KVM refuses.
    pub fn set_clock(&self, vm: VmTime) -> Result<(), Error> {
        self.set_clock_data(&kvm_clock_data { clock: vm.0, ..Default::default() })
    }

    /// Sets KVM's kvmclock to what is `vm` when CLOCK_REALTIME is `realtime_ns`, an instant of the past.
    ///
    /// # Errors
    /// If KVM refuses, as one does that does not report CLOCK_REALTIME.
    pub fn set_clock_at(&self, vm: VmTime, realtime_ns: u64) -> Result<(), Error> {
        let flags = KVM_CLOCK_REALTIME;
        self.set_clock_data(&kvm_clock_data { clock: vm.0, flags, realtime: realtime_ns, ..Default::default() })
    }

    pub(super) fn clock_data(&self) -> Result<kvm_clock_data, Error> {
        self.fd.get_clock().map_err(Error::call("KVM_GET_CLOCK"))
    }

    pub(super) fn set_clock_data(&self, data: &kvm_clock_data) -> Result<(), Error> {
        self.fd.set_clock(data).map_err(Error::call("KVM_SET_CLOCK"))
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

    /// The vCPU's kvmclock page, by an ioctl that is proposed.
    ///
    /// # Errors
    /// If KVM does not have the ioctl, or its clock is not a function of the guest's TSC.
    pub(super) fn clock_guest(&self) -> Result<[u8; TIME_INFO_BYTES], Error> {
        let mut page = [0; TIME_INFO_BYTES];
        // SAFETY: the ioctl writes as many bytes as its number says, which is the size of this live local.
        if unsafe { ioctl_with_mut_ref(&self.fd, KVM_GET_CLOCK_GUEST(), &mut page) } != 0 {
            return Err(Error::last("KVM_GET_CLOCK_GUEST"));
        }
        Ok(page)
    }

    /// Whether KVM has KVM_GET_CLOCK_GUEST, and returns the page of this vCPU.
    #[must_use]
    pub fn has_clock_guest(&self) -> bool {
        self.clock_guest().is_ok()
    }

    /// Makes KVM's kvmclock the function of this vCPU's TSC that `page` says.
    ///
    /// # Errors
    /// As [`Self::clock_guest`]; also for a frequency that is not the vCPU's.
    pub(super) fn set_clock_guest(&self, page: &[u8; TIME_INFO_BYTES]) -> Result<(), Error> {
        // SAFETY: the ioctl reads as many bytes as its number says, which is the size of the page.
        if unsafe { ioctl_with_ref(&self.fd, KVM_SET_CLOCK_GUEST(), page) } != 0 {
            return Err(Error::last("KVM_SET_CLOCK_GUEST"));
        }
        Ok(())
    }
}
