//! Measures `vmm` beside others on one machine: a floor program that does the least KVM requires, KVM's own LAPIC, and
//! other VMMs where they are installed, all with the same guest.
//!
//! What it is not: a profiler, or a collection of absolute numbers. A and B are measured alternately within one run,
//! the ratio is the result, and a target is met when every one of several runs meets it.

pub mod alternate;
pub mod api;
pub mod growth;
pub mod host;
pub mod lab;
pub mod page;
pub mod process;
pub mod programs;
pub mod row;
pub mod rows;
pub mod spread;
pub mod suite;
pub mod table;
pub mod unit;
