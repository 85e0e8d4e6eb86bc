//! KVM's paravirtual EOI: the guest ends an interrupt by clearing a bit in its memory, without an exit.
//!
//! Source: Linux `Documentation/virt/kvm/x86/msr.rst` and `cpuid.rst`.

/// The MSR: physical address of the guest's word, a multiple of 4, and [`ENABLE`].
pub const MSR: u32 = 0x4b56_4d04;
/// Bit 0 of [`MSR`].
pub const ENABLE: u64 = 1 << 0;
/// EAX bit of [`crate::pvclock::CPUID_FEATURES_LEAF`]: the MSR exists.
pub const FEATURE: u32 = 1 << 6;
/// Bit 0 of the word. The host sets it when the interrupt that it injects needs no write of EOI. The guest tests and
/// clears it in one instruction: that ends the interrupt if the bit was set; if not, the guest writes EOI.
pub const PENDING: u32 = 1 << 0;
