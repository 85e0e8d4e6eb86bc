//! The kvmclock interface: MSRs, CPUID bits and the layout of the shared pages.
//!
//! Source: Linux `Documentation/virt/kvm/x86/msr.rst` and `cpuid.rst`, `arch/x86/include/asm/pvclock-abi.h`.

/// MSR: physical address of the guest's [`TimeInfo`], bit 0 = enable (clocksource2).
pub const MSR_SYSTEM_TIME_NEW: u32 = 0x4b56_4d01;
/// MSR: physical address of the guest's [`WallClock`] (clocksource2).
pub const MSR_WALL_CLOCK_NEW: u32 = 0x4b56_4d00;
/// MSR: as [`MSR_SYSTEM_TIME_NEW`], its old number (clocksource).
pub const MSR_SYSTEM_TIME_OLD: u32 = 0x12;
/// MSR: as [`MSR_WALL_CLOCK_NEW`], its old number (clocksource).
pub const MSR_WALL_CLOCK_OLD: u32 = 0x11;

/// CPUID leaf with the hypervisor's signature.
pub const CPUID_LEAF: u32 = 0x4000_0000;
/// KVM's signature in EBX, ECX, EDX.
pub const CPUID_SIGNATURE: [u8; 12] = *b"KVMKVMKVM\0\0\0";
/// CPUID leaf with KVM's paravirtual features in EAX.
pub const CPUID_FEATURES_LEAF: u32 = 0x4000_0001;
/// EAX bit: kvmclock at the old MSRs.
pub const FEATURE_CLOCKSOURCE: u32 = 1 << 0;
/// EAX bit: kvmclock at the new MSRs.
pub const FEATURE_CLOCKSOURCE2: u32 = 1 << 3;
/// EAX bit: the host may set [`FLAG_TSC_STABLE`].
pub const FEATURE_CLOCKSOURCE_STABLE: u32 = 1 << 24;
/// CPUID leaf with the TSC frequency in kHz (EAX) and the APIC bus frequency in kHz (EBX).
pub const CPUID_TIMING_LEAF: u32 = 0x4000_0010;

/// [`TimeInfo::flags`] bit 0: all vCPUs' pages share one base.
pub const FLAG_TSC_STABLE: u8 = 1 << 0;
/// [`TimeInfo::flags`] bit 1: the VM was stopped by the host; the guest clears it.
pub const FLAG_GUEST_STOPPED: u8 = 1 << 1;

/// The page one vCPU reads its time from (`pvclock_vcpu_time_info`), 32 bytes, little endian.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct TimeInfo {
    /// Odd while the host is writing; another value after every change.
    pub version: u32,
    /// Reserved.
    pub pad0: u32,
    /// Guest TSC at which the clock showed `system_time`.
    pub tsc_timestamp: u64,
    /// VM time in nanoseconds at `tsc_timestamp`.
    pub system_time: u64,
    /// Nanoseconds per shifted TSC tick, as a 32-bit fraction.
    pub tsc_to_system_mul: u32,
    /// Left shift (right if negative) of the TSC delta before the multiplication.
    pub tsc_shift: i8,
    /// [`FLAG_TSC_STABLE`], [`FLAG_GUEST_STOPPED`].
    pub flags: u8,
    /// Reserved.
    pub pad: [u8; 2],
}

/// Size of [`TimeInfo`] in guest memory, in bytes.
pub const TIME_INFO_BYTES: usize = 32;
const _: () = assert!(size_of::<TimeInfo>() == TIME_INFO_BYTES);

impl TimeInfo {
    /// The page's bytes, as the guest sees them.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; TIME_INFO_BYTES] {
        let Self { version, pad0, tsc_timestamp, system_time, tsc_to_system_mul, tsc_shift, flags, pad } = *self;
        let mut out = [0; TIME_INFO_BYTES];
        out[0..4].copy_from_slice(&version.to_le_bytes());
        out[4..8].copy_from_slice(&pad0.to_le_bytes());
        out[8..16].copy_from_slice(&tsc_timestamp.to_le_bytes());
        out[16..24].copy_from_slice(&system_time.to_le_bytes());
        out[24..28].copy_from_slice(&tsc_to_system_mul.to_le_bytes());
        out[28..29].copy_from_slice(&tsc_shift.to_le_bytes());
        out[29] = flags;
        out[30..32].copy_from_slice(&pad);
        out
    }

    /// The page that `bytes` hold.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; TIME_INFO_BYTES]) -> Self {
        let mut at = crate::report::Fields::new(bytes);
        Self {
            version: at.u32(),
            pad0: at.u32(),
            tsc_timestamp: at.u64(),
            system_time: at.u64(),
            tsc_to_system_mul: at.u32(),
            tsc_shift: i8::from_le_bytes([bytes[28]]),
            flags: bytes[29],
            pad: [bytes[30], bytes[31]],
        }
    }
}

/// Wall-clock time of VM time 0 (`pvclock_wall_clock`), 12 bytes, little endian.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct WallClock {
    /// Odd while the host is writing.
    pub version: u32,
    /// Seconds since the Unix epoch.
    pub sec: u32,
    /// Nanoseconds below one second.
    pub nsec: u32,
}

/// Size of [`WallClock`] in guest memory, in bytes.
pub const WALL_CLOCK_BYTES: usize = 12;
const _: () = assert!(size_of::<WallClock>() == WALL_CLOCK_BYTES);

impl WallClock {
    /// The structure's bytes, as the guest sees them.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; WALL_CLOCK_BYTES] {
        let mut out = [0; WALL_CLOCK_BYTES];
        out[0..4].copy_from_slice(&self.version.to_le_bytes());
        out[4..8].copy_from_slice(&self.sec.to_le_bytes());
        out[8..12].copy_from_slice(&self.nsec.to_le_bytes());
        out
    }
}
