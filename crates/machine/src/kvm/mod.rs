//! The only folder that speaks to KVM, and the only one with `unsafe`.
//!
//! What it is: thin, typed access to `/dev/kvm`: open it, probe what this host does, build a VM with or
//! without KVM's local APICs, run a vCPU until it asks for something ([`Exit`]), move a vCPU's state in and out as plain data.
//!
//! What it is not: it holds no policy and no device. It knows neither the LAPIC nor VM time; `crate::machine` does.
//!
//! Why one folder: return codes of KVM are not evidence ("supported" may do nothing), so what a host can do is measured
//! once, in [`probe`], and everybody else asks that answer.

#![allow(unsafe_code, reason = "system calls and the shared kvm_run page; every block says why it is sound")]

mod bus;
mod clock;
mod debug;
mod entry_failure;
mod error;
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
pub use open::Host;
pub use probe::HostFacts;
pub use registers::Registers;
pub use running::{Resting, Running};
pub use vcpu::{Calls, Exit, Vcpu};
pub use vm::{Lapics, Vm};
