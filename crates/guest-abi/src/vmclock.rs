//! VMClock: a page in which the host tells the guest what the TSC is in real time, and that it was disrupted.
//!
//! Sources: `struct vmclock_abi` in Linux `include/uapi/linux/vmclock-abi.h`, and UAPI.13,
//! <https://uapi-group.org/specifications/specs/vmclock/>. Where the two number a flag differently
//! ([`FLAG_VM_GEN_COUNTER`]), Linux's header is followed: its driver and QEMU's device are built from it.
//!
//! A guest finds the page by ACPI, as the specification says (device `AMZNC10C`). One without an AML interpreter finds
//! it by CPUID, in the range of this project's own interface: [`FEATURE`].

use crate::report::Fields;

/// EAX bit 1 of [`crate::ns_deadline::CPUID_FEATURES_LEAF`]: there is a VMClock page, at the guest physical address
/// in ECX (lower half) and EDX (upper half).
pub const FEATURE: u32 = 1 << 1;
/// Size of the region, in bytes: a page, so that a guest's kernel can map it into its user space.
pub const REGION_BYTES: u32 = 4096;
/// [`VmClock::magic`]: `"VCLK"`, little endian.
pub const MAGIC: u32 = u32::from_le_bytes(*b"VCLK");
/// [`VmClock::counter_id`]: the TSC.
pub const COUNTER_X86_TSC: u8 = 1;
/// [`VmClock::time_type`]: UTC, in seconds since 1970, without leap seconds.
pub const TIME_UTC: u8 = 0;
/// [`VmClock::time_type`]: TAI, in seconds since 1970, [`VmClock::tai_offset_sec`] ahead of UTC.
pub const TIME_TAI: u8 = 1;
/// [`VmClock::flags`]: [`VmClock::tai_offset_sec`] is valid.
pub const FLAG_TAI_OFFSET_VALID: u64 = 1 << 0;
/// [`VmClock::flags`]: [`VmClock::time_maxerror_nanosec`] is valid.
pub const FLAG_TIME_MAXERROR_VALID: u64 = 1 << 6;
/// [`VmClock::flags`]: [`VmClock::vm_generation_counter`] is there. UAPI.13 1.0 gives it bit 7, which in Linux is
/// `VMCLOCK_FLAG_TIME_MONOTONIC`, and this bit to the notification, which in Linux has bit 9.
pub const FLAG_VM_GEN_COUNTER: u64 = 1 << 8;
/// [`VmClock::clock_status`]: the host's clock was synchronized.
pub const STATUS_SYNCHRONIZED: u8 = 2;
/// [`VmClock::clock_status`]: the host's clock runs by itself.
pub const STATUS_FREERUNNING: u8 = 3;

/// Size of [`VmClock`], in bytes.
pub const VMCLOCK_BYTES: usize = 0x70;
/// Offset of [`VmClock::seq_count`]: what is before it never changes.
pub const SEQ_COUNT: u64 = 0x0c;

/// `struct vmclock_abi`, little endian.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct VmClock {
    /// [`MAGIC`].
    pub magic: u32,
    /// [`REGION_BYTES`].
    pub size: u32,
    /// 1.
    pub version: u16,
    /// [`COUNTER_X86_TSC`].
    pub counter_id: u8,
    /// [`TIME_UTC`] or [`TIME_TAI`].
    pub time_type: u8,
    /// Odd while what follows is being written.
    pub seq_count: u32,
    /// Changes when the TSC was disrupted: what the guest knows of its rate and of its distance from real time is void.
    pub disruption_marker: u64,
    /// `FLAG_…`.
    pub flags: u64,
    /// Zero.
    pub pad: [u8; 2],
    /// `STATUS_…`.
    pub clock_status: u8,
    /// Zero: no smearing of leap seconds.
    pub leap_second_smearing_hint: u8,
    /// TAI − UTC, in seconds.
    pub tai_offset_sec: i16,
    /// Zero: no leap second is known to be near.
    pub leap_indicator: u8,
    /// The periods are in units of 2^-(64 + this) seconds.
    pub counter_period_shift: u8,
    /// The TSC at the instant that `time_sec` and `time_frac_sec` give.
    pub counter_value: u64,
    /// The length of one tick.
    pub counter_period_frac_sec: u64,
    /// Zero: not stated.
    pub counter_period_esterror_rate_frac_sec: u64,
    /// Zero: not stated.
    pub counter_period_maxerror_rate_frac_sec: u64,
    /// Whole seconds.
    pub time_sec: u64,
    /// The rest, in units of 2^-64 seconds.
    pub time_frac_sec: u64,
    /// Zero: not stated.
    pub time_esterror_nanosec: u64,
    /// By how many nanoseconds the instant may be wrong.
    pub time_maxerror_nanosec: u64,
    /// Changes when the VM was restored from a snapshot, and may not be the only one that continues from it.
    pub vm_generation_counter: u64,
}

const _: () = assert!(size_of::<VmClock>() == VMCLOCK_BYTES);
const _: () = assert!(core::mem::offset_of!(VmClock, seq_count) as u64 == SEQ_COUNT);
const _: () = assert!(core::mem::offset_of!(VmClock, disruption_marker) == 0x10);
const _: () = assert!(core::mem::offset_of!(VmClock, counter_value) == 0x28);

/// An instant: seconds, and a fraction in units of 2^-64 seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Instant {
    /// Seconds since the epoch of the time's type.
    pub sec: u64,
    /// Units of 2^-64 seconds.
    pub frac: u64,
}

impl Instant {
    /// `ns` nanoseconds after the epoch, to the nearest fraction below.
    #[must_use]
    pub fn from_ns(ns: u64) -> Self {
        const NS_PER_SEC: u64 = 1_000_000_000;
        let frac = (u128::from(ns % NS_PER_SEC) << 64) / u128::from(NS_PER_SEC);
        Self { sec: ns / NS_PER_SEC, frac: low64(frac) }
    }

    /// Nanoseconds since the epoch, to the nearest; wraps after 584 years.
    #[must_use]
    pub const fn ns(self) -> u64 {
        let ns = (self.frac as u128 * 1_000_000_000 + (1 << 63)) >> 64;
        self.sec.wrapping_mul(1_000_000_000).wrapping_add(low64(ns))
    }

    /// `self` and `more`; wraps.
    #[must_use]
    pub const fn plus(self, more: Self) -> Self {
        let (frac, carry) = self.frac.overflowing_add(more.frac);
        Self { sec: self.sec.wrapping_add(more.sec).wrapping_add(carry as u64), frac }
    }
}

/// The lower half.
#[expect(clippy::cast_possible_truncation, reason = "the lower half is what is wanted")]
const fn low64(n: u128) -> u64 {
    n as u64
}

impl VmClock {
    /// The structure that `bytes` hold.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; VMCLOCK_BYTES]) -> Self {
        let mut at = Fields::new(bytes);
        Self {
            magic: at.u32(),
            size: at.u32(),
            version: at.u16(),
            counter_id: at.u8(),
            time_type: at.u8(),
            seq_count: at.u32(),
            disruption_marker: at.u64(),
            flags: at.u64(),
            pad: [at.u8(), at.u8()],
            clock_status: at.u8(),
            leap_second_smearing_hint: at.u8(),
            tai_offset_sec: at.u16().cast_signed(),
            leap_indicator: at.u8(),
            counter_period_shift: at.u8(),
            counter_value: at.u64(),
            counter_period_frac_sec: at.u64(),
            counter_period_esterror_rate_frac_sec: at.u64(),
            counter_period_maxerror_rate_frac_sec: at.u64(),
            time_sec: at.u64(),
            time_frac_sec: at.u64(),
            time_esterror_nanosec: at.u64(),
            time_maxerror_nanosec: at.u64(),
            vm_generation_counter: at.u64(),
        }
    }

    /// The structure's bytes.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; VMCLOCK_BYTES] {
        let words = [
            u64::from(self.size) << 32 | u64::from(self.magic),
            u64::from(self.seq_count) << 32
                | u64::from(self.time_type) << 24
                | u64::from(self.counter_id) << 16
                | u64::from(self.version),
            self.disruption_marker,
            self.flags,
            u64::from(self.counter_period_shift) << 56
                | u64::from(self.leap_indicator) << 48
                | u64::from(self.tai_offset_sec.cast_unsigned()) << 32
                | u64::from(self.leap_second_smearing_hint) << 24
                | u64::from(self.clock_status) << 16
                | u64::from(u16::from_le_bytes(self.pad)),
            self.counter_value,
            self.counter_period_frac_sec,
            self.counter_period_esterror_rate_frac_sec,
            self.counter_period_maxerror_rate_frac_sec,
            self.time_sec,
            self.time_frac_sec,
            self.time_esterror_nanosec,
            self.time_maxerror_nanosec,
            self.vm_generation_counter,
        ];
        let mut bytes = [0; VMCLOCK_BYTES];
        for (place, word) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(words) {
            *place = word.to_le_bytes();
        }
        bytes
    }

    /// The instant at which the TSC is `tsc`, by this structure: `T + P × (tsc − C)`. A TSC before `counter_value` is
    /// taken for one after it, 2^64 ticks later, as Linux's driver takes it (`vmclock_get_crosststamp` in
    /// `drivers/ptp/ptp_vmclock.c`).
    #[must_use]
    pub const fn at(&self, tsc: u64) -> Instant {
        let ticks = tsc.wrapping_sub(self.counter_value) as u128;
        // A guest may have written any shift.
        let shift = if self.counter_period_shift > 127 { 127 } else { self.counter_period_shift };
        let passed = (ticks * self.counter_period_frac_sec as u128) >> shift;
        let base = Instant { sec: self.time_sec, frac: self.time_frac_sec };
        base.plus(Instant { sec: low64(passed >> 64), frac: low64(passed) })
    }

    /// UTC when the TSC is `tsc`: [`Self::at`], less the offset if that is TAI with a valid one.
    #[must_use]
    pub const fn utc_at(&self, tsc: u64) -> Instant {
        let at = self.at(tsc);
        if self.time_type == TIME_TAI && self.flags & FLAG_TAI_OFFSET_VALID != 0 {
            Instant { sec: at.sec.wrapping_sub_signed(self.tai_offset_sec as i64), ..at }
        } else {
            at
        }
    }

    /// Period and shift of a counter of `khz` kHz: to the nearest unit, in the smallest unit in which it fits.
    #[must_use]
    pub fn period(khz: u32) -> (u64, u8) {
        let hz = u128::from(khz.max(1)) * 1000;
        // The period is 2^(64 + shift) / hz, and has to be below 2^64: 2^shift at most hz.
        let shift = hz.ilog2();
        let period = ((1 << (64 + shift)) + hz / 2) / hz;
        // 2^64, if hz is a power of 2.
        if period >> 64 == 0 { (low64(period), as_u8(shift)) } else { (1 << 63, as_u8(shift.saturating_sub(1))) }
    }
}

/// A shift, which is below 64.
fn as_u8(shift: u32) -> u8 {
    u8::try_from(shift).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    // Catches: a field at another place than in the kernel's structure, in either direction.
    #[test]
    fn bytes_are_where_linux_has_them() {
        let mut bytes = [0; VMCLOCK_BYTES];
        for (n, byte) in (0..).zip(&mut bytes) {
            *byte = n;
        }
        let clock = VmClock::from_bytes(&bytes);
        assert_eq!(clock.to_bytes(), bytes);
        assert_eq!((clock.version, clock.counter_id, clock.time_type), (0x0908, 0x0a, 0x0b));
        assert_eq!((clock.seq_count, clock.clock_status, clock.tai_offset_sec), (0x0f0e_0d0c, 0x22, 0x2524));
        assert_eq!((clock.leap_indicator, clock.counter_period_shift), (0x26, 0x27));
        assert_eq!(clock.vm_generation_counter, 0x6f6e_6d6c_6b6a_6968);
    }

    // The specification's example: 1 ns is 0x89705F4136B4A597 / 2^(64 + 29).
    #[test]
    fn a_period_has_64_significant_bits() {
        assert_eq!(VmClock::period(1_000_000), (0x8970_5f41_36b4_a597, 29));
        for khz in [1, 1_048_576, 2_100_000, 2_596_142, u32::MAX] {
            let (period, shift) = VmClock::period(khz);
            assert!(period >> 63 == 1, "{khz}");
            // Of a period's exact length at most half a unit is lost.
            let hz = u128::from(khz) * 1000;
            let off = (u128::from(period) * hz).abs_diff(1 << (64 + shift));
            assert!(off <= hz / 2, "{khz}: {off}");
        }
    }

    #[test]
    fn instants_carry_and_round() {
        for ns in [0, 1, 999_999_999, 1_000_000_000, 1_790_000_000_123_456_789] {
            assert_eq!(Instant::from_ns(ns).ns(), ns);
        }
        let half = Instant { sec: 1, frac: 1 << 63 };
        assert_eq!(half.plus(half), Instant { sec: 3, frac: 0 });
    }

    // Catches: a product that is cut off. A week at 2.1 GHz is 2^50 ticks.
    #[test]
    fn time_is_exact_a_week_after_the_base() {
        let (counter_period_frac_sec, counter_period_shift) = VmClock::period(2_100_000);
        let clock = VmClock {
            counter_value: u64::MAX - 5,
            time_sec: 100,
            counter_period_frac_sec,
            counter_period_shift,
            ..VmClock::default()
        };
        let week = 7 * 86_400;
        assert_eq!(clock.at((week * 2_100_000_000u64).wrapping_sub(6)).ns(), (100 + week) * 1_000_000_000);
        let tai = VmClock { time_type: TIME_TAI, tai_offset_sec: 37, flags: FLAG_TAI_OFFSET_VALID, ..clock };
        assert_eq!((tai.utc_at(u64::MAX - 5).sec, VmClock { flags: 0, ..tai }.utc_at(u64::MAX - 5).sec), (63, 100));
        let hostile = VmClock { counter_period_shift: 255, counter_period_frac_sec: u64::MAX, ..clock };
        assert_eq!(hostile.at(0).sec, 100);
    }
}
