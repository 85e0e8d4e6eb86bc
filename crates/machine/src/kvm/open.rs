//! Opening `/dev/kvm`, and the capabilities that `vmm` needs.

use std::{
    fs::OpenOptions,
    io,
    os::fd::IntoRawFd,
    sync::{Mutex, PoisonError},
};

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, KVMIO};
use kvm_ioctls::{Cap, Kvm, VmFd};
use vmm_sys_util::{ioctl::ioctl, ioctl_io_nr};

use super::{Error, HostError};
use crate::{host::boot_id::HostId, x86::Leaf};

// Wrapped by kvm-ioctls for vCPUs only.
ioctl_io_nr!(KVM_GET_TSC_KHZ, KVMIO, 0xa3);

/// CPUID: processor extended state enumeration.
const XSAVE_LEAF: u32 = 0xd;
/// CPUID.1:ECX: XSAVE, OSXSAVE and AVX.
const XSAVE_AND_AVX: u32 = 7 << 26;

/// Capabilities that are required, with their purpose.
const NEEDED: [(Cap, &str, &str); 6] = [
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT", "so that no kick of a vCPU is lost"),
    (Cap::SyncRegs, "KVM_CAP_SYNC_REGS", "to answer trapped instructions"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY", "for guest RAM"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS", "to save interrupt shadow and NMI state"),
    (Cap::X86UserSpaceMsr, "KVM_CAP_X86_USER_SPACE_MSR", "so that MSRs exit to us"),
    (Cap::X86MsrFilter, "KVM_CAP_X86_MSR_FILTER", "so that timer and clock MSRs exit to us"),
];

/// Capabilities that single features need.
const WANTED: [(Cap, &str, &str); 9] = [
    (Cap::TscControl, "KVM_CAP_TSC_CONTROL", "for the scaled TSC source"),
    (Cap::GetTscKhz, "KVM_CAP_GET_TSC_KHZ", "for the host's TSC frequency"),
    (Cap::SetGuestDebug, "KVM_CAP_SET_GUEST_DEBUG", "to step in virtual time"),
    (Cap::Xcrs, "KVM_CAP_XCRS", "to save XCR0 of guests that have XSAVE"),
    KERNEL_LAPIC[0],
    KERNEL_LAPIC[1],
    KERNEL_LAPIC[2],
    KERNEL_LAPIC[3],
    KERNEL_LAPIC[4],
];

/// Capabilities that KVM's own LAPIC and kvmclock need.
const KERNEL_LAPIC: [(Cap, &str, &str); 5] = [
    (Cap::SplitIrqchip, "KVM_CAP_SPLIT_IRQCHIP", "for KVM's own LAPIC (--lapic kvm)"),
    (Cap::TscDeadlineTimer, "KVM_CAP_TSC_DEADLINE_TIMER", "for that LAPIC's TSC deadline"),
    (Cap::MpState, "KVM_CAP_MP_STATE", "to save a vCPU that halts in KVM"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK", "to save KVM's kvmclock"),
    (Cap::KvmclockCtrl, "KVM_CAP_KVMCLOCK_CTRL", "to tell the guest that KVM's kvmclock was stopped"),
];

/// This host's KVM, opened, with all required capabilities.
pub struct Host {
    kvm: Kvm,
    /// A VM on which no call has been made that changes it. The next caller that needs a VM takes it.
    blank: Mutex<Option<VmFd>>,
    hides_xsave: bool,
}

impl Host {
    /// Opens `/dev/kvm`.
    ///
    /// # Errors
    /// [`HostError`] with what is missing and what would help.
    pub fn open() -> Result<Self, HostError> {
        let file = OpenOptions::new().read(true).write(true).open("/dev/kvm").map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => HostError::NoKvm,
            io::ErrorKind::PermissionDenied => HostError::Forbidden(error),
            _ => HostError::Open(error),
        })?;
        // SAFETY: the descriptor was just opened and has no other owner.
        let kvm = unsafe { std::os::fd::FromRawFd::from_raw_fd(file.into_raw_fd()) };
        let host = Self { kvm, blank: Mutex::new(None), hides_xsave: false };
        let version = host.kvm.get_api_version();
        if version != 12 {
            return Err(HostError::ApiVersion(version));
        }
        for (cap, name, why) in NEEDED {
            if !host.kvm.check_extension(cap) {
                return Err(HostError::MissingCapability { name, why });
            }
        }
        Ok(host)
    }

    /// The capabilities that `vmm` uses: name, whether the host has it, its purpose.
    #[must_use]
    pub fn capabilities(&self) -> Vec<(&'static str, bool, &'static str)> {
        let all = NEEDED.into_iter().chain(WANTED);
        let present = |cap| if cap == Cap::Xcrs { self.has_xcrs() } else { self.kvm.check_extension(cap) };
        all.map(|(cap, name, why)| (name, present(cap), why)).collect()
    }

    /// Whether KVM has all capabilities that `--lapic kvm` needs.
    #[must_use]
    pub fn has_kernel_lapic(&self) -> bool {
        KERNEL_LAPIC.iter().all(|(cap, ..)| self.kvm.check_extension(*cap))
    }

    /// Whether KVM reports that it can scale a guest's TSC. Only a probe shows whether it does.
    #[must_use]
    pub fn has_tsc_control(&self) -> bool {
        self.kvm.check_extension(Cap::TscControl)
    }

    /// Whether guests have XCR0. They do not if the host's CPU has no XSAVE.
    #[must_use]
    pub fn has_xcrs(&self) -> bool {
        !self.hides_xsave && self.kvm.check_extension(Cap::Xcrs)
    }

    /// From now on treats the host's CPU as one without XSAVE.
    pub fn hide_xsave(&mut self) {
        self.hides_xsave = true;
    }

    /// A new VM, or the unused one that [`Self::tsc_khz`] has left.
    pub(super) fn blank_vm(&self) -> Result<VmFd, Error> {
        let kept = self.blank.lock().unwrap_or_else(PoisonError::into_inner).take();
        kept.map_or_else(|| self.kvm.create_vm(), Ok).map_err(Error::call("KVM_CREATE_VM"))
    }

    /// The host's TSC frequency as KVM reports it, in kHz: the one that a new VM has. Older kernels report it only for
    /// a vCPU; for those one is created.
    ///
    /// # Errors
    /// If the ioctl fails.
    pub fn tsc_khz(&self) -> Result<u32, Error> {
        let vm = self.blank_vm()?;
        // SAFETY: KVM_GET_TSC_KHZ takes no argument and touches no memory of ours.
        let khz = unsafe { ioctl(&vm, KVM_GET_TSC_KHZ()) };
        match u32::try_from(khz) {
            Ok(khz) if khz > 0 => {
                // Creating a VM takes long. This one is unchanged, and can become the guest's.
                *self.blank.lock().unwrap_or_else(PoisonError::into_inner) = Some(vm);
                Ok(khz)
            }
            _ => {
                let vcpu = vm.create_vcpu(0).map_err(Error::call("KVM_CREATE_VCPU"))?;
                vcpu.get_tsc_khz().map_err(Error::call("KVM_GET_TSC_KHZ"))
            }
        }
    }

    /// The CPUID leaves this host's KVM can offer a guest.
    ///
    /// # Errors
    /// If the ioctl fails.
    pub fn supported_cpuid(&self) -> Result<Vec<Leaf>, Error> {
        let cpuid =
            self.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(Error::call("KVM_GET_SUPPORTED_CPUID"))?;
        let mut leaves: Vec<Leaf> = cpuid
            .as_slice()
            .iter()
            .map(|e| Leaf {
                function: e.function,
                index: e.index,
                indexed: e.flags & kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0,
                eax: e.eax,
                ebx: e.ebx,
                ecx: e.ecx,
                edx: e.edx,
            })
            .collect();
        if self.hides_xsave {
            leaves.retain(|leaf| leaf.function != XSAVE_LEAF);
            for leaf in leaves.iter_mut().filter(|leaf| leaf.function == 1) {
                leaf.ecx &= !XSAVE_AND_AVX;
            }
        }
        Ok(leaves)
    }

    /// Identifies the host and its boot; none if that cannot be read.
    #[must_use]
    pub fn id(&self) -> Option<HostId> {
        HostId::read()
    }

    /// The MSRs that hold guest state on this host, as KVM lists them.
    ///
    /// # Errors
    /// If the ioctl fails.
    pub fn msr_index_list(&self) -> Result<Vec<u32>, Error> {
        let list = self.kvm.get_msr_index_list().map_err(Error::call("KVM_GET_MSR_INDEX_LIST"))?;
        Ok(list.as_slice().to_vec())
    }
}
