//! A virtual machine without KVM's interrupt chip: memory slots and MSR exits.

use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_X86_DISABLE_EXITS, KVM_CAP_X86_USER_SPACE_MSR, KVM_MEM_LOG_DIRTY_PAGES, KVM_MSR_EXIT_REASON_FILTER,
    KVM_MSR_EXIT_REASON_INVAL, KVM_MSR_EXIT_REASON_UNKNOWN, KVM_X86_DISABLE_EXITS_MWAIT, kvm_enable_cap,
    kvm_userspace_memory_region,
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
        set_slots(&fd, &memory, 0)?;
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

    /// Keeps account from now on of the pages that the guest writes.
    ///
    /// # Errors
    /// If KVM refuses.
    pub fn log_dirty_pages(&self) -> Result<(), Error> {
        set_slots(&self.fd, &self.memory, KVM_MEM_LOG_DIRTY_PAGES)
    }

    /// The pages of RAM region number `region` that the guest wrote since the last call, a bit each. What the VMM wrote
    /// itself is not among them.
    ///
    /// # Errors
    /// If KVM does not tell, or no account is kept.
    pub fn take_dirty_pages(&self, region: u32, bytes: usize) -> Result<Vec<u64>, Error> {
        self.fd.get_dirty_log(region, bytes).map_err(Error::call("KVM_GET_DIRTY_LOG"))
    }

    /// The VM's RAM.
    #[must_use]
    pub fn memory(&self) -> &Arc<GuestMemoryMmap> {
        &self.memory
    }
}

/// Maps `memory`, or changes the flags of what is mapped: one slot a region, in order.
fn set_slots(fd: &VmFd, memory: &GuestMemoryMmap, flags: u32) -> Result<(), Error> {
    for (slot, region) in (0u32..).zip(memory.iter()) {
        let region = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the mapping is as large as stated and outlives the VM, which keeps `memory` beside `fd`.
        unsafe { fd.set_user_memory_region(region) }.map_err(Error::call("KVM_SET_USER_MEMORY_REGION"))?;
    }
    Ok(())
}

fn enable(fd: &VmFd, cap: u32, arg: u32, name: &'static str) -> Result<(), Error> {
    let mut request = kvm_enable_cap { cap, ..Default::default() };
    request.args = [u64::from(arg), 0, 0, 0];
    fd.enable_cap(&request).map_err(Error::call(name))
}
