//! Interfaces between the guest kernel and the VMM.
//!
//! Everything here is plain data: numbers, layouts and their byte encoding. The guest links it without `std`; the VMM
//! decodes what the guest wrote with the same definitions. Neither side defines a layout of its own. The numbers of x86
//! that both sides need ([`msr`], [`lapic`]) are here too.

#![no_std]
#![forbid(unsafe_code)]

pub mod lapic;
pub mod msr;
pub mod ns_deadline;
pub mod ports;
pub mod pv_eoi;
pub mod pvclock;
pub mod report;
pub mod sites;
