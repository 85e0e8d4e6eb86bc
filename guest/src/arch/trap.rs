//! The functions that `vectors.s` calls.

use guest::pvclock::Begun;

use super::cpu::{IrqsOff, OneCpu, join};
use super::load::end_user_code;
use crate::{cpus, kernel};

/// The registers at an exception, in the order that `vectors.s` and the CPU pushed them.
#[repr(C)]
pub struct Frame {
    /// R15 down to R8, RDI, RSI, RBP, RBX, RDX, RCX, RAX.
    pub registers: [u64; 15],
    /// The exception's number.
    pub vector: u64,
    /// Its error code, or 0.
    pub error: u64,
    /// Address of the instruction.
    pub rip: u64,
    /// CS.
    pub cs: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// RSP.
    pub rsp: u64,
    /// SS.
    pub ss: u64,
}

#[unsafe(no_mangle)]
extern "C" fn timer_entry(version: u32, tsc_low: u32, tsc_high: u32) {
    // SAFETY: the gate turned interrupts off, and the IDT with this handler is in use only while one CPU is up. The
    // code that it interrupted had lent its own token to a function that enables interrupts.
    let mut irqs_off: IrqsOff<OneCpu> = unsafe { IrqsOff::new() };
    kernel::timer_interrupt(&mut irqs_off, Begun { version, tsc: join(tsc_high, tsc_low) });
}

#[unsafe(no_mangle)]
extern "C" fn smp_timer_entry() {
    cpus::timer_interrupt();
}

#[unsafe(no_mangle)]
extern "C" fn ipi_entry() {
    cpus::ipi();
}

#[unsafe(no_mangle)]
extern "C" fn wake_entry() {
    cpus::woken();
}

/// `frame` is on the exception's own stack, complete.
#[unsafe(no_mangle)]
extern "C" fn exception_entry(frame: &Frame) -> ! {
    end_user_code(frame.vector, frame.rip);
    kernel::exception(frame)
}
