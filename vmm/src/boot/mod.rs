//! From an image file to a vCPU about to execute its first instruction.
//!
//! Holds: guest images (ELF with a PVH entry, through linux-loader), the RAM they live in, the CPUID they see, the trap
//! sites they list. Knows no KVM structure and runs nothing.

pub mod cpuid;
pub mod cpuid_names;
mod image;
mod ram;
pub mod sites;

pub use image::{Entry, Image, ImageError};
pub use ram::{RamError, allocate};
