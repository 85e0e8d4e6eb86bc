//! From an image file to a vCPU about to execute its first instruction.
//!
//! Holds: guest images (ELF with a PVH entry and bzImage, through linux-loader; Multiboot 1), the RAM they live in, the
//! CPUID they see, the trap sites they list. Knows no KVM structure and runs nothing.

mod bzimage;
pub mod cpuid;
pub mod cpuid_names;
mod elf;
mod error;
pub mod firmware;
mod image;
mod multiboot;
mod place;
mod pvh;
pub mod sites;
pub mod unlisted;

pub use error::ImageError;
pub use image::{Image, read_initrd};
