#![doc = include_str!("../README.md")]
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

mod memory;
mod publisher;
pub mod pv_eoi;
#[cfg(test)]
mod recorder;
pub mod steal_time;
pub mod vmclock;
mod wall;

pub use memory::{GuestWrite, OutsideRam, RegistrationFault};
pub use publisher::{Registration, RegistrationState};
pub use wall::{WallRegistration, WallState};
