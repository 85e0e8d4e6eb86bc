//! A virtual machine: memory slots, MSR exits, and whether KVM or the VMM emulates the local APICs.

use std::sync::Arc;

use guest_abi::{
    msr::{self, MsrRange},
    pvclock::MSR_SYSTEM_TIME_NEW,
};
use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X86_DISABLE_EXITS, KVM_CAP_X86_USER_SPACE_MSR, KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MSR_EXIT_REASON_FILTER, KVM_MSR_EXIT_REASON_INVAL, KVM_MSR_EXIT_REASON_UNKNOWN, KVM_X86_DISABLE_EXITS_MWAIT,
    kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::{MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VmFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::{Error, Host};
use crate::{mem::ram::GuestRam, x86::emulated_msrs};

/// MSRs that exit with KVM's LAPICs: KVM's paravirtual MSRs except those of kvmclock, which are the first two. KVM
/// emulates them even if the guest's CPUID does not offer them, and they hold state that is not saved here.
const NOT_OFFERED: MsrRange = MsrRange::new(MSR_SYSTEM_TIME_NEW + 1, msr::KVM.last());

/// Who emulates the local APICs, and with them kvmclock and the TSC's MSRs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lapics {
    /// The VMM: KVM has no interrupt chip, and every MSR of LAPIC, kvmclock and TSC exits.
    UserSpace {
        /// MWAIT exits are off, which on some Intel hosts makes the deadline WRMSR exit (see [`super::probe`]).
        mwait_in_guest: bool,
    },
    /// KVM, with its "split" interrupt chip: no I/O APIC, no 8259.
    InKernel {
        /// The guest may write its TSC. False makes the write exit: on some hosts such a write changes the value that
        /// KVM computes for the guest's TSC, but not the TSC itself.
        tsc_moves: bool,
    },
}

/// The guest physical addresses of the TSS (three pages) and the identity map (one) that KVM needs for real mode on
/// Intel CPUs without unrestricted guest. They are below 4 GiB and above any RAM.
const TSS_ADDRESS: usize = 0xfffb_d000;
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// A virtual machine.
pub struct Vm {
    pub(super) fd: VmFd,
    /// KVM maps this memory; it must live as long as `fd`.
    memory: Arc<GuestRam>,
    /// See [`Host::has_xcrs`].
    pub(super) has_xcrs: bool,
}

impl Vm {
    /// A VM with `memory` as its RAM.
    ///
    /// # Errors
    /// If KVM refuses any of it.
    pub fn new(host: &Host, memory: Arc<GuestRam>, lapics: Lapics) -> Result<Self, Error> {
        let fd = host.blank_vm()?;
        enable(
            &fd,
            KVM_CAP_X86_USER_SPACE_MSR,
            KVM_MSR_EXIT_REASON_INVAL | KVM_MSR_EXIT_REASON_UNKNOWN | KVM_MSR_EXIT_REASON_FILTER,
            "KVM_CAP_X86_USER_SPACE_MSR",
        )?;
        let ranges = match lapics {
            Lapics::UserSpace { mwait_in_guest } => {
                if mwait_in_guest {
                    enable(&fd, KVM_CAP_X86_DISABLE_EXITS, KVM_X86_DISABLE_EXITS_MWAIT, "KVM_CAP_X86_DISABLE_EXITS")?;
                }
                // The x2APIC's cannot be filtered (Linux `api.rst`); without an in-kernel LAPIC they exit as invalid.
                let filtered = emulated_msrs().filter(|range| *range != msr::X2APIC);
                filtered.map(|range| denied(range, MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE)).collect()
            }
            Lapics::InKernel { tsc_moves } => {
                // Before the first vCPU, because a vCPU's LAPIC is created with it. No vector is reserved for an I/O
                // APIC.
                enable(&fd, KVM_CAP_SPLIT_IRQCHIP, 0, "KVM_CAP_SPLIT_IRQCHIP")?;
                let mut ranges = vec![denied(NOT_OFFERED, MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE)];
                if !tsc_moves {
                    let tsc = [msr::IA32_TSC, msr::IA32_TSC_ADJUST].map(MsrRange::one);
                    ranges.extend(tsc.map(|range| denied(range, MsrFilterRangeFlags::WRITE)));
                }
                ranges
            }
        };
        // The MSR filter before any memory slot. Both wait for an SRCU grace period. Setting a slot expedites its own,
        // but not if it begins right after another one has ended. In this order 0.1 ms were measured, in the other 12.
        fd.set_msr_filter(MsrFilterDefaultAction::ALLOW, &ranges).map_err(Error::call("KVM_X86_SET_MSR_FILTER"))?;
        fd.set_identity_map_address(IDENTITY_MAP_ADDRESS).map_err(Error::call("KVM_SET_IDENTITY_MAP_ADDR"))?;
        fd.set_tss_address(TSS_ADDRESS).map_err(Error::call("KVM_SET_TSS_ADDR"))?;
        set_slots(&fd, &memory, 0)?;
        Ok(Self { fd, memory, has_xcrs: host.has_xcrs() })
    }

    /// Makes KVM log the pages that the guest writes, from now on.
    ///
    /// # Errors
    /// If KVM refuses.
    pub fn log_dirty_pages(&self) -> Result<(), Error> {
        set_slots(&self.fd, &self.memory, KVM_MEM_LOG_DIRTY_PAGES)
    }

    /// Ends what [`Self::log_dirty_pages`] began.
    ///
    /// # Errors
    /// If KVM refuses.
    pub fn end_dirty_log(&self) -> Result<(), Error> {
        set_slots(&self.fd, &self.memory, 0)
    }

    /// The pages of RAM region number `region` that the guest wrote since the last call, one bit each. The VMM's own
    /// writes are not among them.
    ///
    /// # Errors
    /// If the ioctl fails, or pages are not logged.
    pub fn take_dirty_pages(&self, region: u32, bytes: usize) -> Result<Vec<u64>, Error> {
        self.fd.get_dirty_log(region, bytes).map_err(Error::call("KVM_GET_DIRTY_LOG"))
    }

    /// The VM's RAM.
    #[must_use]
    pub fn memory(&self) -> &Arc<GuestRam> {
        &self.memory
    }
}

/// Maps `memory` into the guest, or changes the flags of existing slots. Each region has one slot, in order.
fn set_slots(fd: &VmFd, memory: &GuestRam, flags: u32) -> Result<(), Error> {
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

/// A filter range whose accesses exit.
fn denied(range: MsrRange, flags: MsrFilterRangeFlags) -> MsrFilterRange<'static> {
    // A zero bit denies. These are enough for the longest range.
    MsrFilterRange { flags, base: range.first(), msr_count: range.count(), bitmap: &[0; 32] }
}

fn enable(fd: &VmFd, cap: u32, arg: u32, name: &'static str) -> Result<(), Error> {
    let mut request = kvm_enable_cap { cap, ..Default::default() };
    request.args = [u64::from(arg), 0, 0, 0];
    fd.enable_cap(&request).map_err(Error::call(name))
}
