//! `vmm`: a minimal KVM virtual machine monitor that shows what live migration does to a guest's clock and timers.

pub mod guest_image;
pub mod time;
