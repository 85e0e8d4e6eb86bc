//! The VM of one check: 128 KiB of RAM and one vCPU that starts in 64-bit mode, with an IDT whose handlers exit.

use std::{sync::Arc, time::Duration};

use kvm_bindings::{
    KVM_MSR_EXIT_REASON_FILTER, KVM_MSR_EXIT_REASON_INVAL, KVM_MSR_EXIT_REASON_UNKNOWN, KVMIO, kvm_dtable,
    kvm_interrupt, kvm_regs, kvm_segment,
};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::{ioctl::ioctl_with_ref, ioctl_iow_nr};

use super::Context;
use crate::{
    host::{kick::KickTimer, tsc::read_tsc},
    kvm::{
        Error, Exit, Lapics, Operation, Vcpu, Vm,
        probe::{Reading, Recorder, tightest, with_apic_features},
        state::flat_data,
    },
    mem::ram::GuestRam,
};

// Not wrapped by kvm-ioctls.
ioctl_iow_nr!(KVM_INTERRUPT, KVMIO, 0x86, kvm_interrupt);

/// 64-bit code for a guest, as bytes. It is assembled with the program, between two labels; the numbers of its own
/// labels are below 200.
macro_rules! guest_code {
    ($($line:literal),+ $(,)?) => {{
        let (begin, end): (*const u8, *const u8);
        // SAFETY: the two instructions load the addresses of labels. What they enclose is in a section of its own, is
        // never executed here, and lives as long as the program.
        unsafe {
            core::arch::asm!(
                ".pushsection .rodata.guest_code,\"a\",@progbits",
                "200:", $($line,)+ "300:",
                ".popsection",
                "lea {begin}, [rip + 200b]",
                "lea {end}, [rip + 300b]",
                begin = out(reg) begin,
                end = out(reg) end,
                options(pure, nomem, nostack, preserves_flags),
            );
            core::slice::from_raw_parts(begin, end.offset_from_unsigned(begin))
        }
    }};
}
pub(super) use guest_code;

/// Where the guest's code is, and its first instruction.
pub(super) const CODE: u64 = 0x1000;
/// A page for what the guest writes.
pub(super) const DATA: u64 = 0x2000;
const PAGE_TABLES: u64 = 0x3000;
const GDT: u64 = 0x6000;
const TSS: u64 = 0x6800;
const IDT: u64 = 0x7000;
/// The top of the stack, above which the handlers are.
pub(super) const STACK: u64 = 0x9000;
const HANDLERS: u64 = 0x9000;
/// The first page that nothing above uses.
pub(super) const FREE_PAGES: u64 = 0x10_000;
pub(super) const RAM_BYTES: usize = 0x20_000;

/// Vectors with a handler. It exits with OUT to the port with the vector's number.
const VECTORS: [u8; 3] = [NMI, GP, INTERRUPT];
pub(super) const NMI: u8 = 2;
pub(super) const GP: u8 = 13;
pub(super) const INTERRUPT: u8 = 0x40;
/// The port of the guest's first own exit; others follow it.
pub(super) const PORT: u16 = 0x80;

const CODE_SELECTOR: u16 = 0x8;
pub(super) const DATA_SELECTOR: u16 = 0x10;

/// How long an entry may last.
const LIMIT: Duration = Duration::from_secs(5);

/// Stores EDX:EAX of RDTSC and exits, in a loop.
pub(super) fn tsc_loop() -> &'static [u8] {
    guest_code!("2: rdtsc", "mov dword ptr [0x2000], eax", "mov dword ptr [0x2004], edx", "out 0x80, al", "jmp 2b")
}

pub(super) struct Rig {
    pub vcpu: Vcpu,
    pub vm: Vm,
    pub seen: Recorder,
    memory: Arc<GuestRam>,
    timer: KickTimer,
}

impl Rig {
    /// A VM whose LAPIC, TSC and kvmclock MSRs all exit.
    pub fn new(cx: &Context, code: &[u8]) -> Result<Self, Error> {
        Self::with(cx, Lapics::UserSpace { mwait_in_guest: false }, code)
    }

    /// A VM with KVM's own LAPIC, whose guest accesses its TSC and kvmclock without an exit.
    pub fn in_kernel(cx: &Context, code: &[u8]) -> Result<Self, Error> {
        Self::with(cx, Lapics::InKernel { tsc_moves: true }, code)
    }

    pub fn with(cx: &Context, lapics: Lapics, code: &[u8]) -> Result<Self, Error> {
        let memory = GuestRam::from_ranges(&[(GuestAddress(0), RAM_BYTES)]).map_err(|_| Error::last("mmap"))?;
        let memory = Arc::new(memory);
        let vm = Vm::new(cx.host, Arc::clone(&memory), lapics)?;
        let vcpu = Vcpu::new(&vm, 0, &with_apic_features(cx.supported))?;
        let mut rig = Self { vcpu, vm, seen: Recorder::default(), memory, timer: KickTimer::new()? };
        rig.write(CODE, code)?;
        rig.write_tables()?;
        rig.enter_64_bit_mode()?;
        Ok(rig)
    }

    /// Tables in which every bit that a CPU sets is set, so that it writes to none of them.
    fn write_tables(&self) -> Result<(), Error> {
        // Present, writable, accessed; the last one dirty and 2 MiB large.
        for (at, entry) in [(0, 0x4000u64 | 0x23), (0x1000, 0x5000 | 0x23), (0x2000, 0xe3)] {
            self.write(PAGE_TABLES + at, &entry.to_le_bytes())?;
        }
        for (at, descriptor) in [(8, 0x00af_9b00_0000_ffffu64), (16, 0x00cf_9300_0000_ffff)] {
            self.write(GDT + at, &descriptor.to_le_bytes())?;
        }
        for vector in VECTORS {
            let handler = HANDLERS + 8 * u64::from(vector);
            // A present interrupt gate of 64-bit mode.
            let gate = handler & 0xffff | u64::from(CODE_SELECTOR) << 16 | 0x8e << 40 | handler >> 16 << 48;
            self.write(IDT + 16 * u64::from(vector), &gate.to_le_bytes())?;
            // OUT vector, AL; then IRETQ, but HLT for the one with an error code on the stack.
            let end = if vector == GP { [0xf4, 0x90] } else { [0x48, 0xcf] };
            self.write(handler, &[0xe6, vector, end[0], end[1]])?;
        }
        Ok(())
    }

    fn enter_64_bit_mode(&mut self) -> Result<(), Error> {
        let (_, mut system) = *self.vcpu.fresh;
        let data = flat_data(DATA_SELECTOR);
        system.cs = kvm_segment { selector: CODE_SELECTOR, type_: 11, db: 0, l: 1, ..data };
        (system.ds, system.es, system.fs, system.gs, system.ss) = (data, data, data, data, data);
        // A busy 64-bit TSS.
        system.tr = kvm_segment { base: TSS, limit: 0x67, type_: 11, present: 1, ..Default::default() };
        system.gdt = kvm_dtable { base: GDT, limit: 0x17, ..Default::default() };
        system.idt = kvm_dtable { base: IDT, limit: 0xfff, ..Default::default() };
        // PG, NE, ET, PE; PAE; LMA and LME.
        (system.cr0, system.cr4, system.efer) = (0x8000_0031, 0x20, 0x500);
        system.cr3 = PAGE_TABLES;
        self.vcpu.fd.set_sregs(&system).map_err(Error::call("KVM_SET_SREGS"))?;
        let regs = kvm_regs { rip: CODE, rsp: STACK, rflags: 2, ..Default::default() };
        self.vcpu.fd.set_regs(&regs).map_err(Error::call("KVM_SET_REGS"))?;
        self.vcpu.incomplete = true;
        Ok(())
    }

    /// Sets RAX.
    pub fn set_rax(&mut self, rax: u64) -> Result<(), Error> {
        let mut regs = self.vcpu.fd.get_regs().map_err(Error::call("KVM_GET_REGS"))?;
        regs.rax = rax;
        self.vcpu.fd.set_regs(&regs).map_err(Error::call("KVM_SET_REGS"))
    }

    /// Queues external interrupt `vector` by the ioctl for it. KVM does not check that the guest can take it.
    pub fn interrupt(&self, vector: u8) -> Result<(), Error> {
        let request = kvm_interrupt { irq: u32::from(vector) };
        // SAFETY: KVM_INTERRUPT reads a `kvm_interrupt` from a live local.
        if unsafe { ioctl_with_ref(&self.vcpu.fd, KVM_INTERRUPT(), &request) } != 0 {
            return Err(Error::last("KVM_INTERRUPT"));
        }
        Ok(())
    }

    /// Enters the guest until it exits.
    pub fn run(&mut self) -> Result<Exit, Error> {
        self.limited(LIMIT, |vcpu, seen| vcpu.run(seen))
    }

    /// Steps one instruction.
    pub fn step(&mut self) -> Result<Exit, Error> {
        self.limited(LIMIT, |vcpu, seen| vcpu.step(seen, None))
    }

    /// Enters the guest until it exits, or a signal comes after `delay`.
    pub fn run_for(&mut self, delay: Duration) -> Result<Exit, Error> {
        self.limited(delay, |vcpu, seen| vcpu.run(seen))
    }

    /// Enters the guest; a signal interrupts KVM_RUN after `limit`.
    fn limited(
        &mut self,
        limit: Duration,
        enter: impl FnOnce(&mut Vcpu, &mut Recorder) -> Result<Exit, Error>,
    ) -> Result<Exit, Error> {
        self.seen.forget();
        let _bound = self.vcpu.bind();
        self.vcpu.clear_kicks();
        self.timer.arm(limit);
        enter(&mut self.vcpu, &mut self.seen)
    }

    /// Completes the last exit's access, without entering the guest.
    pub fn complete(&mut self) -> Result<(), Error> {
        let _bound = self.vcpu.bind();
        self.vcpu.clear_kicks();
        self.vcpu.drain(&mut self.seen)
    }

    /// Whether the last exit was the guest's OUT to `port`.
    pub fn is_out(&self, exit: Exit, port: u16) -> bool {
        exit == Exit::Operation(Operation::Port) && self.seen.port == Some(port)
    }

    /// Reads the guest's TSC several times, for which its code must be [`tsc_loop`]. Returns the reading with the
    /// shortest bracket; none if the guest did not read it.
    pub fn read_tsc(&mut self) -> Result<Option<Reading>, Error> {
        let mut readings = Vec::new();
        for _ in 0..16 {
            let before = read_tsc();
            let exit = self.run()?;
            let after = read_tsc();
            if self.is_out(exit, PORT) {
                readings.push(Reading { before, guest: self.read_u64(DATA)?, after });
            }
        }
        Ok(tightest(&readings))
    }

    pub fn write(&self, at: u64, bytes: &[u8]) -> Result<(), Error> {
        self.memory.write_slice(bytes, GuestAddress(at)).map_err(|_| Error::last("mmap"))
    }

    pub fn read_u64(&self, at: u64) -> Result<u64, Error> {
        self.memory.read_obj(GuestAddress(at)).map_err(|_| Error::last("mmap"))
    }

    pub fn read<const N: usize>(&self, at: u64) -> Result<[u8; N], Error> {
        let mut bytes = [0; N];
        self.memory.read_slice(&mut bytes, GuestAddress(at)).map_err(|_| Error::last("mmap"))?;
        Ok(bytes)
    }

    /// The exit in KVM's words.
    pub fn describe(&mut self, exit: Exit) -> String {
        match exit {
            Exit::Operation(Operation::Port) => {
                format!("KVM_EXIT_IO, port {:#x}", self.seen.port.unwrap_or_default())
            }
            Exit::Operation(Operation::Msr) => {
                let (msr, reason) = (self.seen.msr.unwrap_or_default(), self.msr_reason());
                format!("MSR exit, {msr:#x}, reason {reason}")
            }
            Exit::Operation(Operation::Mmio) => "KVM_EXIT_MMIO".to_owned(),
            Exit::Halt => "KVM_EXIT_HLT".to_owned(),
            Exit::WindowOpen => "KVM_EXIT_IRQ_WINDOW_OPEN".to_owned(),
            Exit::Debug => "KVM_EXIT_DEBUG".to_owned(),
            Exit::Interrupted => "no exit in time".to_owned(),
            Exit::Shutdown => "KVM_EXIT_SHUTDOWN".to_owned(),
            Exit::InternalError(sub) => format!("KVM_EXIT_INTERNAL_ERROR, suberror {sub}"),
            Exit::FailEntry(reason) => format!("KVM_EXIT_FAIL_ENTRY, hardware reason {reason:#x}"),
            Exit::Other(number) => format!("exit reason {number}"),
        }
    }

    /// Why KVM left an MSR access to the VMM. Valid right after such an exit.
    pub fn msr_reason(&mut self) -> &'static str {
        // SAFETY: `msr` is a plain structure in the kvm_run mapping; any bytes are a value of it.
        let reason = unsafe { self.vcpu.fd.get_kvm_run().__bindgen_anon_1.msr.reason };
        match reason {
            KVM_MSR_EXIT_REASON_INVAL => "INVAL",
            KVM_MSR_EXIT_REASON_UNKNOWN => "UNKNOWN",
            KVM_MSR_EXIT_REASON_FILTER => "FILTER",
            _ => "none that is known",
        }
    }
}
