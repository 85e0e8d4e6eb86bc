//! How large a machine can be.

/// The most vCPUs a machine can have: what the guest's tick rings and 8-bit APIC IDs leave room for, and then some.
pub const MAX_CPUS: u32 = 16;
