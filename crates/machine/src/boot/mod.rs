//! Loading a guest: everything between an image file and a vCPU's first instruction.
//!
//! It holds guest images (ELF with a PVH entry and bzImage, through linux-loader; Multiboot 1), where they are placed
//! in RAM, the CPUID leaves and ACPI tables that the guest sees, and the trap sites that an image lists or that are
//! found in its code. It uses no KVM structure and runs no guest.

pub mod acpi;
mod bzimage;
mod code;
pub mod cpuid;
pub mod cpuid_changes;
pub mod cpuid_names;
mod elf;
mod error;
pub mod find_sites;
pub mod firmware;
mod image;
mod mp_table;
mod multiboot;
mod payload;
mod place;
mod pvh;
pub mod sites;
pub mod unlisted;

pub use error::ImageError;
pub use image::{Image, read_initrd};
