//! Every instruction that Rust cannot express, behind safe functions.
//!
//! The kernel runs at privilege level 0 with the first four gigabytes identity-mapped; the functions here
//! are safe because of that, and nothing outside this folder needs `unsafe`. It uses no SSE, and no instruction newer
//! than the first x86-64: some hosts emulate supervisor code and support little more.
#![allow(unsafe_code, reason = "the only folder of the guest that accesses the hardware")]

pub mod ap;
pub mod boot;
pub mod cell;
pub mod cpu;
pub mod load;
mod mem;
pub mod mmio;
pub mod port;
pub mod shared;
pub mod trap;
pub mod vmclock;
