//! What an x86 CPU is told and asked for, as plain data: CPUID leaves, and where a vCPU starts.

mod entry;
mod leaf;

pub use entry::EntryState;
pub use leaf::Leaf;
