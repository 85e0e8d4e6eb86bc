//! A VM made and run with the fewest calls to KVM.

#![allow(unsafe_code, reason = "the guest's RAM and its registers as bytes; every block says why it is sound")]

use std::{
    fs::File,
    io::Write,
    os::fd::AsRawFd,
    ptr::{self, NonNull},
    slice,
};

use anyhow::{Context, Result, bail};
use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2, kvm_regs, kvm_segment, kvm_sregs, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

use super::image::PvhEntry;

/// COM1's data port.
const SERIAL: u16 = 0x3f8;
/// The value of every port: as COM1's line status it means that the transmitter is empty.
const PORT_ANSWER: u8 = 0x60;
/// End of the RAM below the devices' hole, and address of the RAM above it.
const LOW: usize = 0xc000_0000;
const HIGH: u64 = 0x1_0000_0000;
/// x2APIC in CPUID.1:ECX. Without it the guest accesses its LAPIC in memory, which exits without enabling a capability.
const X2APIC: u32 = 1 << 21;

/// A VM with one vCPU.
pub struct FloorVm {
    vcpu: VcpuFd,
    vm: VmFd,
    cpuid: CpuId,
    ram: NonNull<u8>,
    bytes: usize,
}

/// What is saved besides RAM: the state that the guest needs to print its next byte, and no more.
pub struct Saved {
    /// General registers.
    pub regs: kvm_regs,
    /// System registers.
    pub sregs: kvm_sregs,
    /// The vCPU's CPUID. A restore sets it, and need not read it from KVM.
    pub cpuid: Vec<kvm_cpuid_entry2>,
}

impl FloorVm {
    /// A VM with `bytes` of RAM: zeros, or a private mapping of a file.
    pub fn new(file: Option<&File>, bytes: usize) -> Result<Self> {
        let kvm = Kvm::new().context("/dev/kvm")?;
        let mut cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).context("KVM_GET_SUPPORTED_CPUID")?;
        for leaf in cpuid.as_mut_slice().iter_mut().filter(|leaf| leaf.function == 1) {
            leaf.ecx &= !X2APIC;
        }
        Self::with(&kvm, cpuid, file, bytes)
    }

    /// A VM with the saved registers, and RAM from `file`.
    pub fn restored(saved: &Saved, file: &File, bytes: usize) -> Result<Self> {
        let kvm = Kvm::new().context("/dev/kvm")?;
        let cpuid = CpuId::from_entries(&saved.cpuid).ok().context("too many CPUID leaves")?;
        let machine = Self::with(&kvm, cpuid, Some(file), bytes)?;
        machine.vcpu.set_sregs(&saved.sregs).context("KVM_SET_SREGS")?;
        machine.vcpu.set_regs(&saved.regs).context("KVM_SET_REGS")?;
        Ok(machine)
    }

    fn with(kvm: &Kvm, cpuid: CpuId, file: Option<&File>, bytes: usize) -> Result<Self> {
        let (flags, descriptor) = match file {
            Some(file) => (0, file.as_raw_fd()),
            None => (libc::MAP_ANONYMOUS, -1),
        };
        let flags = flags | libc::MAP_PRIVATE | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice replaces no other mapping.
        let ram =
            unsafe { libc::mmap(ptr::null_mut(), bytes, libc::PROT_READ | libc::PROT_WRITE, flags, descriptor, 0) };
        if ram == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error()).with_context(|| format!("mmap of {bytes} bytes"));
        }
        let ram = NonNull::new(ram.cast::<u8>()).context("mmap at address 0")?;
        let vm = kvm.create_vm().context("KVM_CREATE_VM")?;
        let low = bytes.min(LOW);
        for (slot, guest_phys_addr, from, to) in [(0, 0, 0, low), (1, HIGH, low, bytes)] {
            if from < to {
                let region = kvm_userspace_memory_region {
                    slot,
                    flags: 0,
                    guest_phys_addr,
                    memory_size: (to - from) as u64,
                    userspace_addr: ram.addr().get() as u64 + from as u64,
                };
                // SAFETY: it lies in the mapping above, which is never unmapped.
                unsafe { vm.set_user_memory_region(region) }.context("KVM_SET_USER_MEMORY_REGION")?;
            }
        }
        let vcpu = vm.create_vcpu(0).context("KVM_CREATE_VCPU")?;
        vcpu.set_cpuid2(&cpuid).context("KVM_SET_CPUID2")?;
        Ok(Self { vcpu, vm, cpuid, ram, bytes })
    }

    /// The guest's RAM, while the vCPU does not run. The part above the devices' hole follows the part below.
    pub fn ram(&mut self) -> &mut [u8] {
        // SAFETY: the mapping has that length and is never unmapped. `self` is borrowed exclusively: there is no other
        // such slice, and the vCPU does not run.
        unsafe { slice::from_raw_parts_mut(self.ram.as_ptr(), self.bytes) }
    }

    /// Sets the vCPU's registers: 32-bit protected mode, flat segments, paging off.
    pub fn enter(&self, entry: PvhEntry) -> Result<()> {
        let mut sregs = self.vcpu.get_sregs().context("KVM_GET_SREGS")?;
        let (selector, limit) = (0x10, 0xffff_ffff);
        let data = kvm_segment { limit, selector, type_: 3, present: 1, db: 1, s: 1, g: 1, ..Default::default() };
        sregs.cs = kvm_segment { selector: 8, type_: 11, ..data };
        (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
        sregs.cr0 = 0x11;
        self.vcpu.set_sregs(&sregs).context("KVM_SET_SREGS")?;
        let regs = kvm_regs { rip: entry.rip, rbx: entry.start_info, rflags: 2, ..Default::default() };
        self.vcpu.set_regs(&regs).context("KVM_SET_REGS")
    }

    /// Runs until the guest has printed `bytes` bytes, and prints each as it comes.
    pub fn print(&mut self, bytes: usize, to: &mut impl Write) -> Result<()> {
        let mut left = bytes;
        while left > 0 {
            match self.vcpu.run().context("KVM_RUN")? {
                VcpuExit::IoOut(SERIAL, byte) => {
                    to.write_all(byte).and_then(|()| to.flush()).context("standard output")?;
                    left = left.saturating_sub(1);
                }
                VcpuExit::IoOut(SERIAL.., _) | VcpuExit::MmioWrite(..) => {}
                VcpuExit::IoIn(_, answer) => answer.fill(PORT_ANSWER),
                VcpuExit::MmioRead(_, answer) => answer.fill(0),
                exit => bail!("{left} bytes before the end the guest went another way: {exit:?}"),
            }
        }
        Ok(())
    }

    /// The VM, for its clock.
    pub fn vm(&self) -> &VmFd {
        &self.vm
    }

    /// Runs until the guest has written to a port.
    pub fn run_to_port(&mut self) -> Result<()> {
        match self.vcpu.run().context("KVM_RUN")? {
            VcpuExit::IoOut(..) => Ok(()),
            exit => bail!("the guest went another way: {exit:?}"),
        }
    }

    /// Reads the state to save besides RAM.
    pub fn registers(&mut self) -> Result<Saved> {
        // Enters the vCPU once more: only that completes the last OUT.
        self.vcpu.set_kvm_immediate_exit(1);
        match self.vcpu.run() {
            Err(error) if error.errno() == libc::EINTR => {}
            Err(error) => return Err(error).context("KVM_RUN"),
            Ok(exit) => bail!("KVM_RUN with immediate_exit gave {exit:?}"),
        }
        let regs = self.vcpu.get_regs().context("KVM_GET_REGS")?;
        let sregs = self.vcpu.get_sregs().context("KVM_GET_SREGS")?;
        Ok(Saved { regs, sregs, cpuid: self.cpuid.as_slice().to_vec() })
    }
}

/// Structures of KVM that consist of integers without padding.
pub trait Plain: Copy + Default {}
impl Plain for kvm_regs {}
impl Plain for kvm_sregs {}
impl Plain for kvm_cpuid_entry2 {}

/// The bytes of `items`.
pub fn bytes_of<T: Plain>(items: &[T]) -> &[u8] {
    // SAFETY: `Plain` has no padding, so that all of its bytes are initialised.
    unsafe { slice::from_raw_parts(items.as_ptr().cast(), size_of_val(items)) }
}

/// The items that `bytes` hold.
pub fn from_bytes<T: Plain>(bytes: &[u8]) -> Vec<T> {
    let chunks = bytes.chunks_exact(size_of::<T>());
    chunks
        .map(|chunk| {
            // SAFETY: the chunk has that size, any bytes are a valid `Plain`, and the read may be unaligned.
            unsafe { chunk.as_ptr().cast::<T>().read_unaligned() }
        })
        .collect()
}
