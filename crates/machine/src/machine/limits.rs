//! How large a machine can be.

/// The most vCPUs a machine can have. The guest has as many tick rings; 8-bit APIC IDs would allow more.
pub const MAX_CPUS: u32 = 16;
