//! The guest kernel that `build.rs` built, inside this program.

/// The ELF file of the guest, as PVH loaders take it.
pub static GUEST_ELF: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/guest.bin"));
