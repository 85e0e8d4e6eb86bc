//! The operating system under the machine: clocks, threads, files, pages of the process.
//!
//! What it is: thin, typed access to system calls that have nothing to do with KVM. With `kvm` it is the only folder
//! with `unsafe`.
//!
//! What it is not: it does not depend on the machine, and has no notion of a guest.

#![allow(unsafe_code, reason = "system calls, signal handlers and RDTSC; every block says why it is sound")]

pub mod atomic16;
pub mod boot_id;
pub mod clock;
pub mod exit;
pub mod file_signals;
pub mod job_control;
pub mod kick;
pub mod one_instruction;
pub mod os_clocks;
pub mod pending_signals;
pub mod reading;
pub mod regular_file;
pub mod start_pages;
pub mod tsc;
pub mod unix_socket;
mod withheld;
pub mod writeback;
pub mod x87;
pub mod xstate;

pub use withheld::{Piece, Withheld};
