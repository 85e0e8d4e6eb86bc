//! CPUID leaves and a vCPU's entry state, as plain data that depends on no hypervisor.

mod entry;
mod leaf;

pub use entry::EntryState;
pub use leaf::Leaf;
