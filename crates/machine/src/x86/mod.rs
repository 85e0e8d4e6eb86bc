//! CPUID leaves, the MSRs that the VMM emulates and a vCPU's entry state, as plain data that depends on no hypervisor.

mod emulated_msrs;
mod entry;
mod leaf;

pub use emulated_msrs::{emulated_msrs, emulates_msr};
pub use entry::{ENTRY_STACK, EntryState};
pub use leaf::Leaf;
