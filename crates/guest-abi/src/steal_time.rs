//! KVM's steal time: how long a vCPU was ready to run and did not, told to the guest in its memory.
//!
//! Source: Linux `Documentation/virt/kvm/x86/msr.rst`, MSR_KVM_STEAL_TIME, and `struct kvm_steal_time` in
//! `arch/x86/include/uapi/asm/kvm_para.h`.

/// The MSR: physical address of the guest's area, a multiple of [`AREA_BYTES`], and [`ENABLE`].
pub const MSR: u32 = 0x4b56_4d03;
/// Bit 0 of [`MSR`].
pub const ENABLE: u64 = 1 << 0;
/// Bits of [`MSR`] that must be zero: `KVM_STEAL_RESERVED_MASK`.
pub const RESERVED: u64 = ((1 << 5) - 1) << 1;
/// EAX bit of [`crate::pvclock::CPUID_FEATURES_LEAF`]: the MSR exists (`KVM_FEATURE_STEAL_TIME`).
pub const FEATURE: u32 = 1 << 5;
/// Size of the area, in bytes.
pub const AREA_BYTES: usize = 64;
/// Offset of `steal`: 64 bits, nanoseconds.
pub const STEAL: u64 = 0;
/// Offset of `version`: 32 bits, odd while the area is being written.
pub const VERSION: u64 = 8;

/// The area, as the guest reserves it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct StealTime {
    /// Nanoseconds in which the vCPU did not run.
    pub steal: u64,
    /// Odd while the area is being written.
    pub version: u32,
    /// Zero.
    pub flags: u32,
    /// Non-zero while the vCPU is preempted; zero from hosts that do not tell.
    pub preempted: u8,
    /// Zero.
    pub pad0: [u8; 3],
    /// Zero.
    pub pad: [u32; 11],
}

const _: () = assert!(size_of::<StealTime>() == AREA_BYTES);
const _: () = assert!(core::mem::offset_of!(StealTime, steal) as u64 == STEAL);
const _: () = assert!(core::mem::offset_of!(StealTime, version) as u64 == VERSION);
const _: () = assert!(core::mem::offset_of!(StealTime, preempted) == 16);
