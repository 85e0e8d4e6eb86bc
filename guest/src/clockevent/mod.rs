//! Clockevents: devices that interrupt at a given VM time, and which one to use.
//!
//! Not here: the handling of interrupts (the tick layer) and writing registers (the kernel's [`Port`]).

mod kvm;
mod lapic;
mod registry;

pub use kvm::{KvmNsDeadline, KvmTscDeadline};
pub use lapic::{LapicDeadline, LapicOneshot};
pub use registry::{Descriptor, Kind, REGISTRY, Unusable, select};

use crate::pvclock::{BadPage, Conversion, Reading, Source};

/// Vector of the timer interrupt.
pub const LVT_VECTOR: u32 = 0x40;
/// LVT bit 16: masked.
pub const LVT_MASKED: u32 = 1 << 16;
/// LVT timer bits 18:17 = 00b: one-shot.
pub const LVT_ONESHOT: u32 = 0;
/// LVT timer bits 18:17 = 10b: TSC-deadline.
pub const LVT_TSC_DEADLINE: u32 = 2 << 17;

/// Feature: one event at a time.
pub const FEAT_ONESHOT: u32 = 1 << 0;
/// Feature: takes the absolute expiry, not a distance from now.
pub const FEAT_KTIME: u32 = 1 << 1;

/// The registers that clockevents write.
pub trait Port {
    /// The LVT timer entry. Complete before any later write through this trait.
    fn write_timer_lvt(&mut self, value: u32);
    /// IA32_TSC_DEADLINE, in guest TSC ticks; 0 disarms.
    fn write_tsc_deadline(&mut self, tsc: u64);
    /// The nanosecond deadline, at MSR number `msr`; 0 disarms.
    fn write_ns_deadline(&mut self, msr: u32, ns: u64);
    /// The timer's divide configuration, as the register encodes it.
    fn write_divide(&mut self, value: u32);
    /// The timer's initial count: starts counting down, 0 stops.
    fn write_initial_count(&mut self, count: u32);
}

/// A clockevent device: state and arithmetic. It writes registers through the `machine` that is passed.
pub trait ClockEvent {
    /// Initialises the device, with nothing armed. Called only for the device that was chosen: the others must not stop
    /// the timer that they share.
    fn set_oneshot<M: Port>(&mut self, machine: &mut M);

    /// Masks the LVT entry *and* clears its mode bits. Leaving TSC-deadline mode disarms; an entry that is masked but
    /// still in that mode stays armed (Intel SDM vol. 3, "TSC-Deadline Mode").
    fn shutdown<M: Port>(&mut self, machine: &mut M) {
        machine.write_timer_lvt(LVT_VECTOR | LVT_MASKED);
    }

    /// Arms for VM time `expires_ns`. Returns the value written: TSC ticks, nanoseconds or a count, by device. `now` is
    /// the reading from which the caller computed the expiry, and so a little old.
    ///
    /// # Errors
    /// [`BadPage`] if the kvmclock page cannot be inverted.
    fn set_next_event<M: Port + Source>(
        &mut self,
        machine: &mut M,
        expires_ns: u64,
        now: &Reading,
    ) -> Result<u64, BadPage>;
}

/// A chosen device with its state.
// `repr(u8)`: a discriminant stored in a niche of a field costs five more instructions a tick.
#[derive(Clone, Copy, Debug)]
#[repr(u8)]
pub enum Device {
    /// `lapic-deadline`.
    LapicDeadline(LapicDeadline),
    /// `kvm-tsc-deadline`.
    KvmTscDeadline(KvmTscDeadline),
    /// `kvm-ns-deadline`.
    KvmNsDeadline(KvmNsDeadline),
    /// `lapic-oneshot`.
    LapicOneshot(LapicOneshot),
}

/// The parameters of devices. All are known at boot.
#[derive(Clone, Copy, Debug)]
pub struct Boot {
    /// TSC frequency in kHz.
    pub tsc_khz: u64,
    /// Frequency of the LAPIC timer before its divider, in kHz.
    pub bus_khz: u64,
    /// MSR of the nanosecond deadline, if there is one.
    pub ns_msr: Option<u32>,
    /// Conversion of `kvm-tsc-deadline`.
    pub conversion: Conversion,
    /// Whether `kvm-tsc-deadline` looks at the page's version again after the WRMSR.
    pub recheck: bool,
}

impl Device {
    /// The device of this kind. [`select`] has found it usable.
    #[must_use]
    pub fn new(kind: Kind, boot: &Boot) -> Self {
        match kind {
            Kind::LapicDeadline => Self::LapicDeadline(LapicDeadline::new(boot.tsc_khz)),
            Kind::KvmTscDeadline => Self::KvmTscDeadline(KvmTscDeadline::new(boot.conversion, boot.recheck)),
            Kind::KvmNsDeadline => {
                Self::KvmNsDeadline(KvmNsDeadline::new(boot.ns_msr.unwrap_or(guest_abi::ns_deadline::MSR)))
            }
            Kind::LapicOneshot => Self::LapicOneshot(LapicOneshot::new(boot.bus_khz)),
        }
    }
}

impl ClockEvent for Device {
    fn set_oneshot<M: Port>(&mut self, machine: &mut M) {
        match self {
            Self::LapicDeadline(d) => d.set_oneshot(machine),
            Self::KvmTscDeadline(d) => d.set_oneshot(machine),
            Self::KvmNsDeadline(d) => d.set_oneshot(machine),
            Self::LapicOneshot(d) => d.set_oneshot(machine),
        }
    }

    fn shutdown<M: Port>(&mut self, machine: &mut M) {
        match self {
            Self::LapicDeadline(d) => d.shutdown(machine),
            Self::KvmTscDeadline(d) => d.shutdown(machine),
            Self::KvmNsDeadline(d) => d.shutdown(machine),
            Self::LapicOneshot(d) => d.shutdown(machine),
        }
    }

    #[inline(always)]
    fn set_next_event<M: Port + Source>(&mut self, m: &mut M, expires_ns: u64, now: &Reading) -> Result<u64, BadPage> {
        match self {
            Self::LapicDeadline(d) => d.set_next_event(m, expires_ns, now),
            Self::KvmTscDeadline(d) => d.set_next_event(m, expires_ns, now),
            Self::KvmNsDeadline(d) => d.set_next_event(m, expires_ns, now),
            Self::LapicOneshot(d) => d.set_next_event(m, expires_ns, now),
        }
    }
}
