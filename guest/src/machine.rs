//! Implements the library's hardware traits with instructions.

use guest::clockevent::Port;
use guest::pvclock::Source;
use guest::report::Sink;
use guest_abi::pvclock::TimeInfo;
use guest_abi::report::Record;

use crate::apic::Apic;
use crate::arch::{cpu, shared};
use crate::cpus;

/// The CPU that code runs on. A type, so that addresses are constants in the kernel with one CPU.
pub trait Seat: Copy {
    /// Whether other CPUs read the clock too.
    const PEERS: bool;
    /// The CPU's number.
    fn cpu(self) -> usize;
}

/// The only CPU.
#[derive(Clone, Copy, Debug)]
pub struct Only;

impl Seat for Only {
    const PEERS: bool = false;
    #[inline(always)]
    fn cpu(self) -> usize {
        0
    }
}

/// One of several CPUs, by its number.
#[derive(Clone, Copy, Debug)]
pub struct OneOf(pub usize);

impl Seat for OneOf {
    const PEERS: bool = true;
    #[inline(always)]
    fn cpu(self) -> usize {
        self.0
    }
}

/// The hardware as one CPU accesses it.
#[derive(Clone, Copy, Debug)]
pub struct Machine<S> {
    /// The CPU's local APIC.
    pub apic: Apic,
    /// The CPU.
    pub seat: S,
}

impl<S: Seat> Source for Machine<S> {
    #[inline(always)]
    fn version(&mut self) -> u32 {
        shared::time_version(self.seat.cpu())
    }

    #[inline(always)]
    fn fields(&mut self) -> TimeInfo {
        shared::time_fields(self.seat.cpu())
    }

    #[inline(always)]
    fn rdtsc(&mut self) -> u64 {
        cpu::rdtsc()
    }

    fn pause(&mut self) {
        cpu::pause();
    }

    fn clear_guest_stopped(&mut self) {
        shared::clear_guest_stopped(self.seat.cpu());
    }

    #[inline(always)]
    fn published(&mut self) -> u64 {
        if S::PEERS { cpus::latest_reading() } else { 0 }
    }

    #[inline(always)]
    fn publish(&mut self, ns: u64) {
        if S::PEERS {
            cpus::publish_reading(ns);
        }
    }
}

impl<S: Seat> Port for Machine<S> {
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

impl<S: Seat> Sink for Machine<S> {
    #[inline(always)]
    fn push(&mut self, record: &Record) {
        shared::ring_push(self.seat.cpu(), record);
    }

    fn set_clock_steps_back(&mut self, count: u64, worst_ns: u64) {
        shared::ring_steps_back(self.seat.cpu(), count, worst_ns);
    }

    fn set_guest_stopped_seen(&mut self, count: u64) {
        shared::ring_stopped_seen(self.seat.cpu(), count);
    }
}
