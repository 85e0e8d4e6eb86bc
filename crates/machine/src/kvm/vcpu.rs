//! One vCPU: runs it until it exits, completes accesses, injects interrupts.

use std::{cell::Cell, io, sync::Arc};

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVMIO, kvm_cpuid_entry2, kvm_regs, kvm_sregs};
use kvm_ioctls::{SyncReg, VcpuExit, VcpuFd};
use vm_memory::{GuestAddress, GuestMemoryBackend};
use vmm_sys_util::{ioctl::ioctl_with_ref, ioctl_iow_nr};

use super::{Bus, Error, GpFault, Operation, Vm, debug::Debugging};
use crate::{host::kick, mem::ram::GuestRam, x86::Leaf};

// Not wrapped by kvm-ioctls.
ioctl_iow_nr!(KVM_X86_SETUP_MCE, KVMIO, 0x9c, u64);

/// IA32_MCG_CAP: ten banks, as QEMU has, and IA32_MCG_CTL. KVM's default is all the banks that it could have.
const MACHINE_CHECK_CAP: u64 = 10 | 1 << 8;

/// Why KVM_RUN returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// An access that the bus has emulated. KVM completes its instruction when the vCPU is entered again, or in
    /// [`Vcpu::drain`].
    Operation(Operation),
    /// The guest executed HLT.
    Halt,
    /// An interrupt can be injected, as [`Vcpu::request_window`] has requested.
    WindowOpen,
    /// A single step or a breakpoint.
    Debug,
    /// Kicked by a signal.
    Interrupted,
    /// Triple fault.
    Shutdown,
    /// KVM cannot continue the guest: its suberror ([`EMULATION_FAILED`] or another).
    InternalError(u32),
    /// The CPU refused the guest's state: hardware reason.
    FailEntry(u64),
    /// Anything else, by KVM's number.
    Other(u32),
}

/// KVM_EXIT_INTERNAL_ERROR's suberror KVM_INTERNAL_ERROR_EMULATION: KVM has to emulate an instruction, and cannot.
pub const EMULATION_FAILED: u32 = 1;

/// How often KVM was called for one vCPU while it ran.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Calls {
    /// KVM_RUN.
    pub entries: u64,
    /// Returns of KVM_RUN because of an action of the guest. The others are because of a signal, or after an access was
    /// completed.
    pub exits: u64,
    /// Other ioctls.
    pub others: u64,
}

/// One virtual CPU.
pub struct Vcpu {
    pub(super) fd: VcpuFd,
    /// KVM completes the last exit's access at the next entry. Until then the shared registers are not valid.
    pub(super) incomplete: bool,
    /// What KVM_SET_GUEST_DEBUG has set.
    pub(super) debugging: Debugging,
    /// See [`Self::watch`].
    pub(super) watched: Option<u64>,
    calls: Cell<Calls>,
    pub(super) has_xcrs: bool,
    memory: Arc<GuestRam>,
    /// The registers of a new vCPU, which are those after a reset.
    pub(super) fresh: Box<(kvm_regs, kvm_sregs)>,
}

impl Vcpu {
    /// CPU number `index` of `vm`, which sees the CPUID `leaves`.
    ///
    /// # Errors
    /// If KVM refuses.
    pub fn new(vm: &Vm, index: u32, leaves: &[Leaf]) -> Result<Self, Error> {
        let mut fd = vm.fd.create_vcpu(u64::from(index)).map_err(Error::call("KVM_CREATE_VCPU"))?;
        let entries: Vec<kvm_cpuid_entry2> = leaves
            .iter()
            .map(|leaf| kvm_cpuid_entry2 {
                function: leaf.function,
                index: leaf.index,
                flags: if leaf.indexed { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 },
                eax: leaf.eax,
                ebx: leaf.ebx,
                ecx: leaf.ecx,
                edx: leaf.edx,
                ..Default::default()
            })
            .collect();
        let too_many = |_| Error::Call { call: "KVM_SET_CPUID2", source: io::Error::from_raw_os_error(libc::E2BIG) };
        let cpuid = CpuId::from_entries(&entries).map_err(too_many)?;
        fd.set_cpuid2(&cpuid).map_err(Error::call("KVM_SET_CPUID2"))?;
        // SAFETY: KVM_X86_SETUP_MCE reads one u64 from a constant that outlives the call.
        if unsafe { ioctl_with_ref(&fd, KVM_X86_SETUP_MCE(), &MACHINE_CHECK_CAP) } != 0 {
            return Err(Error::last("KVM_X86_SETUP_MCE"));
        }
        for reg in [SyncReg::Register, SyncReg::SystemRegister, SyncReg::VcpuEvents] {
            fd.set_sync_valid_reg(reg);
        }
        let regs = fd.get_regs().map_err(Error::call("KVM_GET_REGS"))?;
        let sregs = fd.get_sregs().map_err(Error::call("KVM_GET_SREGS"))?;
        // KVM fills the shared page only at an exit. `incomplete` makes the first drain enter the vCPU, for that.
        Ok(Self {
            fd,
            incomplete: true,
            debugging: Debugging::default(),
            watched: None,
            calls: Cell::default(),
            has_xcrs: vm.has_xcrs,
            memory: Arc::clone(vm.memory()),
            fresh: Box::new((regs, sregs)),
        })
    }

    /// Makes kicks of the calling thread reach this vCPU while the returned value lives.
    #[must_use]
    pub fn bind(&mut self) -> impl Drop + use<> {
        kick::Binding::new(&mut self.fd.get_kvm_run().immediate_exit)
    }

    /// Clears kicks so far, and returns whether there were any. To be called before the caller checks what a kick may
    /// announce.
    pub fn clear_kicks(&mut self) -> bool {
        kick::clear_bound(&mut self.fd.get_kvm_run().immediate_exit)
    }

    /// Enters the guest until it exits, and emulates an access with `bus`.
    ///
    /// # Errors
    /// If KVM_RUN fails, other than because of a signal.
    pub fn run(&mut self, bus: &mut impl Bus) -> Result<Exit, Error> {
        self.incomplete = false;
        let cr8 = &raw const self.fd.get_kvm_run().cr8;
        let result = self.fd.run();
        self.calls.update(|calls| Calls {
            entries: calls.entries.wrapping_add(1),
            exits: calls.exits.wrapping_add(u64::from(!matches!(result, Err(_) | Ok(VcpuExit::Intr)))),
            ..calls
        });
        // SAFETY: the field is in the kvm_run mapping, which lives as long as `self.fd`; KVM writes it only in KVM_RUN.
        // Before the access, because a MOV CR8 of the guest, which does not exit, came before it.
        bus.cr8(unsafe { cr8.read_volatile() }.to_le_bytes()[0] & 0xf);
        let (data, read) = match result {
            Ok(VcpuExit::IoIn(_, data)) => (std::ptr::from_mut(data), true),
            Ok(VcpuExit::IoOut(_, data)) => (std::ptr::from_ref(data).cast_mut(), false),
            // KVM emulates an instruction and cannot access RAM: it reports the access as MMIO. That must not be
            // emulated as an access of a device.
            Ok(VcpuExit::MmioRead(at, _) | VcpuExit::MmioWrite(at, _))
                if self.memory.address_in_range(GuestAddress(at)) =>
            {
                return Err(Error::Memory { at: Some(at), source: io::Error::from_raw_os_error(libc::EFAULT) });
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                bus.mmio_read(address, data);
                self.incomplete = true;
                return Ok(Exit::Operation(Operation::Mmio));
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                bus.mmio_write(address, data);
                self.incomplete = true;
                return Ok(Exit::Operation(Operation::Mmio));
            }
            Ok(VcpuExit::X86Rdmsr(access)) => {
                match bus.msr_read(access.index) {
                    Ok(value) => (*access.data, *access.error) = (value, 0),
                    Err(GpFault) => *access.error = 1,
                }
                self.incomplete = true;
                return Ok(Exit::Operation(Operation::Msr));
            }
            Ok(VcpuExit::X86Wrmsr(access)) => {
                *access.error = u8::from(bus.msr_write(access.index, access.data).is_err());
                self.incomplete = true;
                return Ok(Exit::Operation(Operation::Msr));
            }
            Ok(VcpuExit::Hlt) => return Ok(Exit::Halt),
            Ok(VcpuExit::IrqWindowOpen) => return Ok(Exit::WindowOpen),
            Ok(VcpuExit::Debug(_)) => return Ok(Exit::Debug),
            Ok(VcpuExit::Intr | VcpuExit::SetTpr) => return Ok(Exit::Interrupted),
            Ok(VcpuExit::Shutdown) => return Ok(Exit::Shutdown),
            Ok(VcpuExit::FailEntry(reason, _)) => return Ok(Exit::FailEntry(reason)),
            Ok(VcpuExit::InternalError) => return Ok(Exit::InternalError(self.internal_suberror())),
            Ok(_) => return Ok(Exit::Other(self.fd.get_kvm_run().exit_reason)),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => return Ok(Exit::Interrupted),
            Err(error) if matches!(error.errno(), libc::EFAULT | libc::EHWPOISON) => {
                return Err(Error::Memory { at: None, source: io::Error::from_raw_os_error(error.errno()) });
            }
            Err(error) => return Err(Error::call("KVM_RUN")(error)),
        };
        self.port(data, read, bus);
        Ok(Exit::Operation(Operation::Port))
    }

    /// Emulates a port access. A string instruction has several elements in one exit.
    fn port(&mut self, data: *mut [u8], read: bool, bus: &mut impl Bus) {
        // SAFETY: called right after a KVM_EXIT_IO, so that `io` is the union's live member.
        let io = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.io };
        // SAFETY: the pointer is the slice that kvm-ioctls made inside the kvm_run mapping for this exit; it has no
        // other user.
        let data = unsafe { &mut *data };
        for element in data.chunks_mut(usize::from(io.size).max(1)) {
            if read {
                bus.port_in(io.port, element);
            } else {
                bus.port_out(io.port, element);
            }
        }
        self.incomplete = true;
    }

    fn internal_suberror(&mut self) -> u32 {
        // SAFETY: called right after a KVM_EXIT_INTERNAL_ERROR, so that `internal` is the union's live member.
        unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal.suberror }
    }

    /// Completes the last instruction without running the guest further, and brings the shared registers up to date.
    ///
    /// An access is incomplete until the vCPU is entered again (Linux `api.rst`, KVM_RUN). State that is read before is
    /// stale, and state that is written before is overwritten. One instruction can make several accesses (a
    /// read-modify-write, a copy between two devices, an operand across a page). So the completion of one can be the
    /// exit of the next, which must be emulated as well: KVM uses the data in the shared page whether it was or not.
    ///
    /// # Errors
    /// If KVM_RUN fails, other than by returning at once because of `immediate_exit`.
    pub fn drain(&mut self, bus: &mut impl Bus) -> Result<(), Error> {
        while self.incomplete || self.fd.get_kvm_run().kvm_dirty_regs != 0 {
            self.fd.get_kvm_run().immediate_exit = 1;
            // With `immediate_exit`, KVM_RUN completes the access and then returns EINTR without running the guest.
            let result = self.run(bus);
            kick::release(&mut self.fd.get_kvm_run().immediate_exit);
            result?;
        }
        Ok(())
    }

    /// Whether the guest would take an injected interrupt at the next entry. Valid after [`Self::drain`].
    pub fn ready_for_injection(&mut self) -> bool {
        self.fd.get_kvm_run().ready_for_interrupt_injection != 0
    }

    /// Requests an exit as soon as an interrupt can be injected; false cancels the request.
    pub fn request_window(&mut self, wanted: bool) {
        self.fd.get_kvm_run().request_interrupt_window = u8::from(wanted);
    }

    /// Whether [`Self::request_window`] is in force.
    pub fn window_requested(&mut self) -> bool {
        self.fd.get_kvm_run().request_interrupt_window != 0
    }

    /// Sets CR8 for the next entry. Without an in-kernel LAPIC, KVM_RUN sets the guest's CR8 from the shared page at
    /// each entry.
    pub fn set_cr8(&mut self, cr8: u8) {
        self.fd.get_kvm_run().cr8 = u64::from(cr8);
    }

    /// Injects external interrupt `vector`, which the guest takes at the next entry. KVM does not check that it can. So
    /// this may be called only after [`Self::drain`], and if [`Self::ready_for_injection`].
    pub fn inject(&mut self, vector: u8) {
        // Has the effect of KVM_INTERRUPT, without a system call.
        let interrupt = &mut self.fd.sync_regs_mut().events.interrupt;
        interrupt.injected = 1;
        interrupt.nr = vector;
        interrupt.soft = 0;
        self.events_dirty();
    }

    /// Drops an injected interrupt that the guest has not taken.
    pub fn drop_interrupt(&mut self) {
        self.fd.sync_regs_mut().events.interrupt.injected = 0;
        self.events_dirty();
    }

    /// The numbers of calls since this was last called.
    pub fn take_calls(&mut self) -> Calls {
        self.calls.take()
    }

    /// The descriptor for an ioctl other than KVM_RUN, which is counted.
    pub(super) fn call(&self) -> &VcpuFd {
        self.calls.update(|calls| Calls { others: calls.others.wrapping_add(1), ..calls });
        &self.fd
    }

    /// The number of NMIs that are pending in KVM, and whether NMIs are blocked until the guest's IRET. Valid after
    /// [`Self::drain`].
    pub fn nmis(&mut self) -> (u8, bool) {
        let nmi = &self.fd.sync_regs_mut().events.nmi;
        (nmi.pending, nmi.masked != 0)
    }

    /// Queues an NMI. While the guest handles one, KVM keeps one more pending, and merges further ones with it.
    ///
    /// # Errors
    /// If KVM refuses.
    pub fn nmi(&mut self) -> Result<(), Error> {
        // The shared events do not contain this NMI. If they were written back, KVM would drop it. So they are read
        // again first.
        self.incomplete = true;
        self.call().nmi().map_err(Error::call("KVM_NMI"))
    }

    /// Translates a linear address to a guest physical one; none if it is not mapped.
    ///
    /// # Errors
    /// If the ioctl fails.
    pub fn translate(&self, linear: u64) -> Result<Option<u64>, Error> {
        let translation = self.call().translate_gva(linear).map_err(Error::call("KVM_TRANSLATE"))?;
        Ok((translation.valid != 0).then_some(translation.physical_address))
    }
}
