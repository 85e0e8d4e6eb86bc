//! CPU instructions. The three that a VMM may patch to exit are trap sites: each copy of one has an entry in the ELF
//! section that `guest_abi::sites` describes.

use core::arch::{asm, x86_64};
use core::marker::PhantomData;

use guest::platform::Leaf;
use guest_abi::{
    msr::IA32_TSC_DEADLINE,
    sites::{self, Kind},
};

const _: () = assert!(sites::SITE_BYTES == 16);
/// Selector of CPU 0's TSS. The others' follow.
pub const TSS_SELECTOR: u32 = 0x20;
/// From one TSS's selector to the next.
pub const TSS_DESCRIPTOR_BYTES: u32 = 16;

/// Parameter of [`IrqsOff`]: no other CPU is up.
#[derive(Debug)]
pub struct OneCpu;

/// Parameter of [`IrqsOff`]: other CPUs may be up.
#[derive(Debug)]
pub struct ManyCpus;

/// Token: interrupts are off on this CPU. A function that enables them borrows the token, so that a handler, which has
/// one of its own, never holds it at the same time as the code that it interrupts.
#[derive(Debug)]
pub struct IrqsOff<S>(PhantomData<S>);

impl<S> IrqsOff<S> {
    /// # Safety
    /// Interrupts are off, and no other token of this CPU is used before they are on again. With [`OneCpu`]: no other
    /// CPU is up.
    pub(super) unsafe fn new() -> Self {
        Self(PhantomData)
    }
}

impl IrqsOff<OneCpu> {
    /// The token for the time when other CPUs may be up.
    pub fn many_cpus(self) -> IrqsOff<ManyCpus> {
        IrqsOff(PhantomData)
    }
}

/// Emits an instruction and its entry in the table. The label must be directly before the instruction's two bytes.
macro_rules! site {
    ($instruction:literal, $kind:expr, $($operand:tt)*) => {
        asm!(
            concat!("2: ", $instruction),
            ".pushsection .trap_sites, \"a\", @progbits",
            ".quad 2b",
            ".long {site_kind}",
            ".long 0",
            ".popsection",
            site_kind = const $kind as u32,
            $($operand)*
        )
    };
}

/// Reads the TSC. Not ordered against other instructions: on one CPU the page cannot change without an exit in between.
#[inline(always)]
pub fn rdtsc() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: reads a counter. It is not marked as free of memory access, so that no page read moves across it.
    unsafe {
        site!("rdtsc", Kind::Rdtsc, out("eax") low, out("edx") high, options(nostack, preserves_flags));
    }
    join(high, low)
}

/// Writes IA32_TSC_DEADLINE.
#[inline(always)]
pub fn write_tsc_deadline(tsc: u64) {
    let (high, low) = halves(tsc);
    // SAFETY: arms a timer whose handler is installed; the caller found the MSR in CPUID.
    unsafe {
        site!(
            "wrmsr",
            Kind::DeadlineWrmsr,
            in("ecx") IA32_TSC_DEADLINE, in("eax") low, in("edx") high, options(nostack, preserves_flags)
        );
    }
}

/// Executes PAUSE: a hint to the CPU, and to a VMM that schedules virtual time, that this is a spin loop.
#[inline(always)]
pub fn pause() {
    // SAFETY: does nothing but wait.
    unsafe { site!("pause", Kind::Pause, options(nostack, preserves_flags)) }
}

/// Reads an MSR that CPUID says exists.
pub fn rdmsr(msr: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: reading changes nothing; an MSR that does not exist is #GP, which ends the guest with a dump.
    unsafe {
        asm!("rdmsr", in("ecx") msr, out("eax") low, out("edx") high, options(nostack, preserves_flags));
    }
    join(high, low)
}

/// Writes an MSR of the APIC or of kvmclock.
pub fn wrmsr(msr: u32, value: u64) {
    let (high, low) = halves(value);
    // SAFETY: callers write the MSRs of the APIC, of kvmclock and of the nanosecond deadline. None of them changes how
    // code runs; the addresses given to kvmclock are those of statics kept for it in `shared`.
    unsafe {
        asm!("wrmsr", in("ecx") msr, in("eax") low, in("edx") high, options(nostack, preserves_flags));
    }
}

/// CPUID leaf `leaf`, subleaf 0.
pub fn cpuid(leaf: u32) -> Leaf {
    cpuid_subleaf(leaf, 0)
}

/// CPUID leaf `leaf`, subleaf `subleaf`.
pub fn cpuid_subleaf(leaf: u32, subleaf: u32) -> Leaf {
    let x86_64::CpuidResult { eax, ebx, ecx, edx } = x86_64::__cpuid_count(leaf, subleaf);
    Leaf { eax, ebx, ecx, edx }
}

/// This CPU's number, from its task register: `boot.s` gives each CPU the TSS of its number. One register read, where
/// IA32_GS_BASE would need an MSR set up and a load.
#[inline(always)]
pub fn number() -> usize {
    let selector: u32;
    // SAFETY: reads a selector; with a 32-bit destination the upper half is zero.
    unsafe { asm!("str {:e}", out(reg) selector, options(nomem, nostack, preserves_flags)) };
    (selector.wrapping_sub(TSS_SELECTOR) / TSS_DESCRIPTOR_BYTES) as usize
}

/// Waits until everything written before is visible to the system. CPUID, because it serialises on every x86-64 CPU,
/// while MFENCE belongs to SSE2.
pub fn serialize() {
    cpuid(0);
}

/// The address of the last page fault.
pub fn cr2() -> u64 {
    let value;
    // SAFETY: reading CR2 changes nothing.
    unsafe { asm!("mov {}, cr2", out(reg) value, options(nomem, nostack, preserves_flags)) };
    value
}

/// Halts with interrupts on until one was handled.
///
/// "The effect of STI is delayed until after the next instruction" (Intel SDM vol. 2, "STI"): no interrupt can come
/// between the caller's check, made with interrupts off, and the HLT, which would then sleep in spite of it.
#[inline(always)]
pub fn halt<S>(_: &mut IrqsOff<S>) {
    // SAFETY: the handlers are installed and run on stacks of their own. They save no register that a called function
    // need not keep, as `clobber_abi` says, and this function borrows the caller's token.
    unsafe { asm!("sti", "hlt", "cli", clobber_abi("sysv64"), options(nostack)) };
}

/// Stops this CPU, which has no task.
pub fn park() -> ! {
    loop {
        // SAFETY: waits, with interrupts off, for an NMI, a reset or an INIT.
        unsafe { asm!("cli", "hlt", options(nomem, nostack)) };
    }
}

/// Raises an exception with no IDT to deliver it: a triple fault, which resets the machine.
pub fn triple_fault() -> ! {
    let empty = [0u16; 5];
    // SAFETY: this is the end of the machine; the pointer is read once, by the first instruction.
    unsafe { asm!("lidt [{}]", "ud2", in(reg) &raw const empty, options(noreturn)) }
}

#[expect(clippy::cast_possible_truncation, reason = "the halves of a register pair")]
fn halves(value: u64) -> (u32, u32) {
    ((value >> 32) as u32, value as u32)
}

pub(super) fn join(high: u32, low: u32) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}
