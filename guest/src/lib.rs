//! The guest kernel's pure parts, tested on the host.
//!
//! Everything here is arithmetic, decisions and bookkeeping. The hardware is behind three small traits
//! ([`pvclock::Source`], [`clockevent::Port`], [`report::Sink`]). The kernel in `main.rs` implements them with
//! instructions, the tests with plain values: so a unit test can change the page between two instructions.

#![no_std]
#![forbid(unsafe_code)]

#[cfg(test)]
extern crate std;

pub mod clockevent;
pub mod cmdline;
pub mod platform;
pub mod pvclock;
pub mod report;
pub mod scenarios;
pub mod smp;
pub mod steal;
pub mod ticks;
pub mod topology;
pub mod vmclock;
pub mod watchdog;

#[cfg(test)]
mod mock;
