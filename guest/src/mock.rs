//! Hardware made of plain values, for tests.

use std::vec::Vec;

use guest_abi::pvclock::{FLAG_GUEST_STOPPED, TimeInfo};
use guest_abi::report::{Header, Record};

use crate::clockevent::Port;
use crate::pvclock::Source;
use crate::report::Sink;

/// The registers and memory of the hardware, and changes to the page at chosen points.
#[derive(Default)]
pub(crate) struct Mock {
    pub(crate) page: TimeInfo,
    pub(crate) tsc: u64,
    pub(crate) tsc_reads: u32,
    pub(crate) pauses: u32,
    pub(crate) lvt: u32,
    pub(crate) tsc_deadline: u64,
    pub(crate) deadline_writes: Vec<u64>,
    pub(crate) ns_deadline: (u32, u64),
    pub(crate) divide: u32,
    pub(crate) divide_writes: u32,
    pub(crate) initial_count: u32,
    pub(crate) header: Header,
    pub(crate) records: Vec<Record>,
    /// The largest reading of any CPU, if there are several.
    pub(crate) published: Option<u64>,
    /// The page after the next PAUSE.
    pub(crate) after_pause: Option<TimeInfo>,
    /// The page after the next RDTSC.
    pub(crate) after_rdtsc: Option<TimeInfo>,
    /// The page at the next deadline WRMSR, before it is carried out: a migration in the window.
    pub(crate) before_deadline: Option<TimeInfo>,
}

impl Mock {
    pub(crate) fn new(page: TimeInfo) -> Self {
        Self { page, ..Self::default() }
    }
}

/// A page with these numbers.
pub(crate) fn page_at(version: u32, tsc_timestamp: u64, system_time: u64, mul: u32, shift: i8) -> TimeInfo {
    TimeInfo { version, tsc_timestamp, system_time, tsc_to_system_mul: mul, tsc_shift: shift, ..TimeInfo::default() }
}

impl Source for Mock {
    fn version(&mut self) -> u32 {
        self.page.version
    }

    fn fields(&mut self) -> TimeInfo {
        self.page
    }

    fn rdtsc(&mut self) -> u64 {
        self.tsc_reads += 1;
        let tsc = self.tsc;
        self.page = self.after_rdtsc.take().unwrap_or(self.page);
        tsc
    }

    fn pause(&mut self) {
        self.pauses += 1;
        self.page = self.after_pause.take().unwrap_or(self.page);
    }

    fn clear_guest_stopped(&mut self) {
        self.page.flags &= !FLAG_GUEST_STOPPED;
    }

    fn published(&mut self) -> u64 {
        self.published.unwrap_or(0)
    }

    fn publish(&mut self, ns: u64) {
        self.published = self.published.map(|most| most.max(ns));
    }
}

impl Port for Mock {
    fn write_timer_lvt(&mut self, value: u32) {
        self.lvt = value;
    }

    fn write_tsc_deadline(&mut self, tsc: u64) {
        self.page = self.before_deadline.take().unwrap_or(self.page);
        self.tsc_deadline = tsc;
        self.deadline_writes.push(tsc);
    }

    fn write_ns_deadline(&mut self, msr: u32, ns: u64) {
        self.ns_deadline = (msr, ns);
    }

    fn write_divide(&mut self, value: u32) {
        self.divide = value;
        self.divide_writes += 1;
    }

    fn write_initial_count(&mut self, count: u32) {
        self.initial_count = count;
    }
}

impl Sink for Mock {
    fn push(&mut self, record: &Record) {
        self.records.push(*record);
        self.header.written += 1;
    }

    fn set_clock_steps_back(&mut self, count: u64, worst_ns: u64) {
        self.header.clock_steps_back = count;
        self.header.worst_step_back_ns = worst_ns;
    }

    fn set_guest_stopped_seen(&mut self, count: u64) {
        self.header.guest_stopped_seen = count;
    }
}
