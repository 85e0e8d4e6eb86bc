//! The only folder that calls KVM. With `host` it is the only one with `unsafe`.
//!
//! What it is: thin, typed access to `/dev/kvm`. It opens the device, probes what this host does, creates a VM with or
//! without KVM's local APICs, runs a vCPU until it exits ([`Exit`]), and reads and sets a vCPU's state as plain data.
//!
//! What it is not: it has no policy and no device, and depends neither on our LAPIC nor on VM time; `crate::machine`
//! has both.
//!
//! Why one folder: KVM's return codes are not evidence (an ioctl may succeed without effect). So what a host can do is
//! measured once, in [`probe`], and all other code uses those results.

#![allow(unsafe_code, reason = "system calls and the shared kvm_run page; every block says why it is sound")]

mod bus;
mod clock;
pub mod conformance;
mod debug;
mod entry_failure;
mod error;
mod exception;
mod open;
pub mod probe;
mod registers;
mod running;
pub mod state;
mod tsc;
mod vcpu;
mod vm;

pub use bus::{Bus, GpFault, Operation};
pub use clock::KvmClock;
pub use entry_failure::entry_failure;
pub use error::{Error, HostError};
pub use exception::Exception;
pub use open::Host;
pub use probe::HostFacts;
pub use registers::{Registers, SyscallMsrs};
pub use running::{Resting, Running};
pub use tsc::ScaledTsc;
pub use vcpu::{Calls, EMULATION_FAILED, Exit, Vcpu};
pub use vm::{Lapics, Vm};
