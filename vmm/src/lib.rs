//! `vmm`: a minimal KVM virtual machine monitor that shows what live migration does to a guest's clock and timers.

pub mod apic;
pub mod boot;
pub mod control;
pub mod devices;
pub mod doctor;
pub mod guest_image;
pub mod kvm;
pub mod output;
pub mod pvclock;
pub mod report;
pub mod run;
pub mod session;
pub mod snapshot;
pub mod study;
pub mod sweep;
pub mod time;
