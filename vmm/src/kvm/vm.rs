//! A virtual machine without KVM's interrupt chip: memory slots and MSR exits.

use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_X86_DISABLE_EXITS, KVM_CAP_X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_FILTER, KVM_MSR_EXIT_REASON_INVAL,
    KVM_MSR_EXIT_REASON_UNKNOWN, KVM_X86_DISABLE_EXITS_MWAIT, kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::{MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VmFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::{Error, Host};

/// MSRs that must reach us, as (first, count). The x2APIC range cannot be filtered (Linux `api.rst`); without an
/// in-kernel LAPIC it exits as invalid.
const OURS: [(u32, u32); 6] = [
    (0x10, 3),         // IA32_TSC, and kvmclock's old pair 0x11, 0x12
    (0x1b, 1),         // IA32_APIC_BASE
    (0x3b, 1),         // IA32_TSC_ADJUST
    (0x6e0, 1),        // IA32_TSC_DEADLINE
    (0x4b56_4d00, 16), // KVM's paravirtual MSRs: we are the hypervisor here
    (guest_abi::ns_deadline::MSR, 1),
];

/// Where Intel CPUs without unrestricted guest keep a TSS and an identity map while the guest is in real mode: three
/// pages and one, below the LAPIC and above any RAM.
const TSS_ADDRESS: usize = 0xfffb_d000;
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// A virtual machine.
pub struct Vm {
    pub(super) fd: VmFd,
    /// KVM maps this memory; it must live as long as `fd`.
    memory: Arc<GuestMemoryMmap>,
}

impl Vm {
    /// A VM with `memory` as its RAM. `mwait_in_guest` turns off MWAIT exits, which on some Intel hosts makes the
    /// deadline WRMSR exit (see [`super::probe`]).
    ///
    /// # Errors
    /// If KVM refuses any of it.
    pub fn new(host: &Host, memory: Arc<GuestMemoryMmap>, mwait_in_guest: bool) -> Result<Self, Error> {
        let fd = host.kvm.create_vm().map_err(Error::call("KVM_CREATE_VM"))?;
        fd.set_identity_map_address(IDENTITY_MAP_ADDRESS).map_err(Error::call("KVM_SET_IDENTITY_MAP_ADDR"))?;
        fd.set_tss_address(TSS_ADDRESS).map_err(Error::call("KVM_SET_TSS_ADDR"))?;
        for (slot, region) in (0u32..).zip(memory.iter()) {
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: the mapping is as large as stated and outlives the VM: `memory` is kept beside `fd`.
            unsafe { fd.set_user_memory_region(region) }.map_err(Error::call("KVM_SET_USER_MEMORY_REGION"))?;
        }
        enable(
            &fd,
            KVM_CAP_X86_USER_SPACE_MSR,
            KVM_MSR_EXIT_REASON_INVAL | KVM_MSR_EXIT_REASON_UNKNOWN | KVM_MSR_EXIT_REASON_FILTER,
            "KVM_CAP_X86_USER_SPACE_MSR",
        )?;
        if mwait_in_guest {
            enable(&fd, KVM_CAP_X86_DISABLE_EXITS, KVM_X86_DISABLE_EXITS_MWAIT, "KVM_CAP_X86_DISABLE_EXITS")?;
        }
        // A zero bit denies: the access exits.
        let denied = [0u8; 2];
        let ranges = OURS.map(|(base, msr_count)| MsrFilterRange {
            flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
            base,
            msr_count,
            bitmap: &denied,
        });
        fd.set_msr_filter(MsrFilterDefaultAction::ALLOW, &ranges).map_err(Error::call("KVM_X86_SET_MSR_FILTER"))?;
        Ok(Self { fd, memory })
    }

    /// The VM's RAM.
    #[must_use]
    pub fn memory(&self) -> &Arc<GuestMemoryMmap> {
        &self.memory
    }
}

fn enable(fd: &VmFd, cap: u32, arg: u32, name: &'static str) -> Result<(), Error> {
    let mut request = kvm_enable_cap { cap, ..Default::default() };
    request.args = [u64::from(arg), 0, 0, 0];
    fd.enable_cap(&request).map_err(Error::call(name))
}
