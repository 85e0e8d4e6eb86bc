//! The host's side of kvmclock: the guest registers an address by MSR, the VMM keeps a page there up to date.
//!
//! Not here: what VM time is ([`vmtime::PageClock`]), the layout of the page ([`guest_abi::pvclock`]), and when to
//! publish (whoever runs the vCPUs). What is here is the order of the writes, which a reader on another vCPU depends
//! on, and what must outlive a migration: the registered address and the version.
//!
//! Pure over [`GuestWrite`], so that a test can watch every store.

#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

mod memory;
mod publisher;
pub mod pv_eoi;
#[cfg(test)]
mod recorder;
mod wall;

pub use memory::{GuestWrite, OutsideRam, RegistrationFault};
pub use publisher::{Registration, RegistrationState};
pub use wall::{WallRegistration, WallState};
