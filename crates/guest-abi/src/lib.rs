#![doc = include_str!("../README.md")]
#![no_std]
#![forbid(unsafe_code)]

pub mod ioapic;
pub mod lapic;
pub mod msr;
pub mod ns_deadline;
pub mod ports;
pub mod pv_eoi;
pub mod pvclock;
pub mod report;
pub mod sites;
pub mod steal_time;
pub mod vmclock;
