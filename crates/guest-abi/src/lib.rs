//! What the guest kernel and the VMM agree on.
//!
//! Everything here is plain data: numbers, layouts and their byte encoding. The guest links it without `std`; the VMM
//! uses the same definitions to decode what the guest wrote. Neither side may interpret a layout by hand.

#![no_std]
#![forbid(unsafe_code)]

pub mod ns_deadline;
pub mod ports;
pub mod pv_eoi;
pub mod pvclock;
pub mod report;
pub mod sites;
