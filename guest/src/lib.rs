//! The guest kernel's pure parts, tested on the host.
//!
//! Everything here is arithmetic, decisions and bookkeeping. The hardware stands behind three small traits
//! ([`pvclock::Source`], [`clockevent::Port`], [`report::Sink`]); the kernel in `main.rs` implements them with
//! instructions and the tests with plain values, so that a page that changes between two instructions is a unit test.

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
pub mod ticks;
pub mod topology;

#[cfg(test)]
mod mock;
