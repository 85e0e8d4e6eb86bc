//! The machine: every instruction that Rust has no word for, behind safe functions.
//!
//! The kernel runs at privilege level 0 with the first four gigabytes identity-mapped; the functions here
//! are safe because of that, and nothing outside this folder needs `unsafe`. It uses no SSE, and no instruction newer
//! than the first x86-64: some hosts emulate supervisor code and know little more.
#![allow(unsafe_code, reason = "the one folder of the guest that talks to the machine")]

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
