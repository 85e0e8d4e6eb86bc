//! The hardware behind the library's traits.

use guest::clockevent::Port;
use guest::pvclock::Source;
use guest::report::Sink;
use guest_abi::pvclock::TimeInfo;
use guest_abi::report::Record;

use crate::apic::Apic;
use crate::arch::{cpu, shared};

/// This machine.
#[derive(Clone, Copy, Debug)]
pub struct Machine {
    /// Its local APIC.
    pub apic: Apic,
}

impl Source for Machine {
    fn version(&mut self) -> u32 {
        shared::time_version()
    }

    fn fields(&mut self) -> TimeInfo {
        shared::time_fields()
    }

    fn rdtsc(&mut self) -> u64 {
        cpu::rdtsc()
    }

    fn pause(&mut self) {
        cpu::pause();
    }

    fn clear_guest_stopped(&mut self) {
        shared::clear_guest_stopped();
    }
}

impl Port for Machine {
    fn write_timer_lvt(&mut self, value: u32) {
        self.apic.write_timer_lvt(value);
    }

    fn write_tsc_deadline(&mut self, tsc: u64) {
        cpu::write_tsc_deadline(tsc);
    }

    fn write_ns_deadline(&mut self, msr: u32, ns: u64) {
        cpu::wrmsr(msr, ns);
    }

    fn write_divide(&mut self, value: u32) {
        self.apic.write_divide(value);
    }

    fn write_initial_count(&mut self, count: u32) {
        self.apic.write_initial_count(count);
    }
}

impl Sink for Machine {
    fn push(&mut self, record: &Record) {
        shared::ring_push(record);
    }

    fn set_clock_steps_back(&mut self, count: u64, worst_ns: u64) {
        shared::ring_steps_back(count, worst_ns);
    }

    fn set_guest_stopped_seen(&mut self, count: u64) {
        shared::ring_stopped_seen(count);
    }
}
