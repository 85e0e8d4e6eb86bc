//! The proposed host interface: a timer deadline in kvmclock nanoseconds.
//!
//! The mailing-list thread that this project implements ends with the suggestion of "an interface that accepts the
//! deadline in kvmclock nanoseconds". This is such an interface. Its CPUID leaf and MSR are outside KVM's own ranges
//! (0x40000000–0x400000ff and 0x4b564d00–0x4b564dff).
//!
//! Semantics: the LVT timer entry must be in TSC-deadline mode (bits 18:17 = 10b), as for `IA32_TSC_DEADLINE`, with
//! which it shares the one timer: writing either register replaces the other's deadline, and the replaced one then
//! reads 0. Writing a nanosecond value arms; a value that is not in the future fires at once; 0 disarms. Reading gives
//! the armed value, or 0 once it fired. Unlike a TSC deadline it keeps its meaning when the TSC frequency changes.

/// CPUID leaf that holds [`CPUID_SIGNATURE`] in EBX, ECX, EDX and the highest leaf of this range in EAX.
pub const CPUID_LEAF: u32 = 0x4000_0100;
/// EBX, ECX, EDX of [`CPUID_LEAF`], as little-endian text.
pub const CPUID_SIGNATURE: [u8; 12] = *b"NsDeadlineIf";
/// CPUID leaf with features in EAX and the MSR's number in EBX. [`crate::vmclock::FEATURE`] is another feature of it.
pub const CPUID_FEATURES_LEAF: u32 = 0x4000_0101;
/// EAX bit 0 of [`CPUID_FEATURES_LEAF`]: the nanosecond deadline MSR exists.
pub const FEATURE_NS_DEADLINE: u32 = 1 << 0;
/// The MSR that takes an absolute kvmclock time in nanoseconds. The guest uses the number it reads from
/// [`CPUID_FEATURES_LEAF`].
pub const MSR: u32 = 0x766d_6d00;
