//! The tick rings: the guest's record of every tick, in guest RAM.
//!
//! Each CPU has a ring of its own, so that no CPU waits for another to report. The ring of CPU `n` is `n` ×
//! [`RING_BYTES`] after the start of the ELF section [`SECTION`], which has room for [`MAX_CPUS`]. It is one
//! [`Header`], followed by `capacity` [`Record`]s. The CPU writes its record number `r` (counted from 0) at slot `r %
//! capacity`, then stores `written = r + 1`. A ring without the magic number belongs to a CPU that is not up. The rings
//! are part of RAM and so survive a migration; the VMM reads them while the guest halts and trusts no byte of them.

/// Name of the ELF section (no bits) whose address is that of CPU 0's header.
pub const SECTION: &str = ".tick_ring";
/// [`Header::magic`]: `"TICKRING"`, little endian.
pub const MAGIC: u64 = u64::from_le_bytes(*b"TICKRING");
/// [`Header::layout`]: changes when a field does.
pub const LAYOUT: u32 = 2;
/// Records a ring holds.
pub const CAPACITY: u32 = 1024;
/// Rings in the section: CPUs that the guest can use.
pub const MAX_CPUS: usize = 16;

/// A ring's header, 128 bytes, little endian.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Header {
    /// [`MAGIC`], stored last when the CPU sets its ring up.
    pub magic: u64,
    /// [`LAYOUT`].
    pub layout: u32,
    /// [`CAPACITY`].
    pub capacity: u32,
    /// Records that this CPU has written since boot.
    pub written: u64,
    /// Ticks the scenario will make on this CPU; 0 = no limit, until the VMM stops the guest.
    pub expected: u64,
    /// How often a kvmclock reading of this CPU was smaller than the one before it, or than one that another CPU had
    /// published before.
    pub clock_steps_back: u64,
    /// The largest such step, in nanoseconds.
    pub worst_step_back_ns: u64,
    /// How often the guest found (and cleared) PVCLOCK_GUEST_STOPPED.
    pub guest_stopped_seen: u64,
    /// Interrupts of the scenario that this CPU has sent to another (or, alone, to itself).
    pub ipis_sent: u64,
    /// Interrupts of the scenario that this CPU has received.
    pub ipis_received: u64,
    /// Number of the CPU, from 0.
    pub cpu: u32,
    /// Zero.
    pub reserved0: u32,
    /// The clocksource watchdog's results; zeros for a guest that runs none.
    pub watchdog: Watchdog,
    /// Intervals between two ticks that were longer or shorter by VMClock than by kvmclock, although its disruption
    /// marker had not changed; 0 for a guest that does not compare them.
    pub vmclock_wrong: u64,
}

/// What the guest's clocksource watchdog found (`scenario=watchdog`), 40 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Watchdog {
    /// Checks so far: one for each clocksource that is watched, every half second.
    pub checks: u64,
    /// Those in which the watchdog itself could not be read fast enough, three times in a row.
    pub timed_out: u64,
    /// Clocksources that were marked unstable: [`UNSTABLE_TSC`], [`UNSTABLE_KVMCLOCK`].
    pub unstable: u64,
    /// The largest distance of an interval by a clocksource from the same by the watchdog, in nanoseconds.
    pub worst_skew_ns: i64,
    /// That interval by the watchdog, in nanoseconds.
    pub worst_interval_ns: u64,
}

/// [`Watchdog::unstable`]: the TSC at the frequency that the guest saw at boot.
pub const UNSTABLE_TSC: u64 = 1;
/// [`Watchdog::unstable`]: kvmclock.
pub const UNSTABLE_KVMCLOCK: u64 = 2;

/// Size of [`Header`], in bytes.
pub const HEADER_BYTES: usize = 128;
const _: () = assert!(size_of::<Header>() == HEADER_BYTES);
/// From one CPU's ring to the next, in bytes: header and records, up to a multiple of 64.
pub const RING_BYTES: usize = (HEADER_BYTES + RECORD_BYTES * CAPACITY as usize).next_multiple_of(64);

impl Header {
    /// The header that `bytes` hold.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; HEADER_BYTES]) -> Self {
        let mut at = Fields::new(bytes);
        Self {
            magic: at.u64(),
            layout: at.u32(),
            capacity: at.u32(),
            written: at.u64(),
            expected: at.u64(),
            clock_steps_back: at.u64(),
            worst_step_back_ns: at.u64(),
            guest_stopped_seen: at.u64(),
            ipis_sent: at.u64(),
            ipis_received: at.u64(),
            cpu: at.u32(),
            reserved0: at.u32(),
            watchdog: Watchdog {
                checks: at.u64(),
                timed_out: at.u64(),
                unstable: at.u64(),
                worst_skew_ns: at.u64().cast_signed(),
                worst_interval_ns: at.u64(),
            },
            vmclock_wrong: at.u64(),
        }
    }
}

/// One tick as the guest saw it, 72 bytes, little endian. Times are kvmclock nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Record {
    /// Number of the CPU's tick, from 0, without gaps.
    pub seq: u64,
    /// When the tick was to fire.
    pub expires_ns: u64,
    /// When the tick layer first armed it.
    pub armed_ns: u64,
    /// When its first interrupt was handled: less than `expires_ns` if that was an early wake.
    pub first_wake_ns: u64,
    /// When it was handled as a tick, not as an early wake; never less than `expires_ns`.
    pub fired_ns: u64,
    /// The TSC value that `fired_ns` was computed from.
    pub fired_tsc: u64,
    /// The value last written to arm it: a TSC deadline, nanoseconds or an initial count, by clockevent.
    pub deadline: u64,
    /// Version of the pvclock page that `fired_ns` was computed from.
    pub page_version: u32,
    /// Interrupts that came before `expires_ns`. After each, the guest armed the timer again.
    pub early_wakes: u32,
    /// CPU that handled it.
    pub cpu: u32,
    /// Zero.
    pub reserved: u32,
}

/// Size of [`Record`], in bytes.
pub const RECORD_BYTES: usize = 72;
const _: () = assert!(size_of::<Record>() == RECORD_BYTES);

impl Record {
    /// The record that `bytes` hold.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; RECORD_BYTES]) -> Self {
        let mut at = Fields::new(bytes);
        Self {
            seq: at.u64(),
            expires_ns: at.u64(),
            armed_ns: at.u64(),
            first_wake_ns: at.u64(),
            fired_ns: at.u64(),
            fired_tsc: at.u64(),
            deadline: at.u64(),
            page_version: at.u32(),
            early_wakes: at.u32(),
            cpu: at.u32(),
            reserved: at.u32(),
        }
    }
}

/// Reads little-endian fields one after another; returns zeros past the end.
pub(crate) struct Fields<'a> {
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    fn take<const N: usize>(&mut self) -> [u8; N] {
        match self.rest.split_first_chunk::<N>() {
            Some((first, rest)) => {
                self.rest = rest;
                *first
            }
            None => {
                self.rest = &[];
                [0; N]
            }
        }
    }

    pub(crate) fn u8(&mut self) -> u8 {
        u8::from_le_bytes(self.take())
    }

    pub(crate) fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.take())
    }

    pub(crate) fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    pub(crate) fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_read_from_where_its_fields_stand() {
        let mut bytes = [0; HEADER_BYTES];
        let layout = u64::from(CAPACITY) << 32 | u64::from(LAYOUT);
        let words = [MAGIC, layout, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, u64::MAX, 19, 20];
        for (place, word) in bytes.chunks_exact_mut(8).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        let want = Header {
            magic: MAGIC,
            layout: LAYOUT,
            capacity: CAPACITY,
            written: 7,
            expected: 8,
            clock_steps_back: 9,
            worst_step_back_ns: 10,
            guest_stopped_seen: 11,
            ipis_sent: 12,
            ipis_received: 13,
            cpu: 14,
            watchdog: Watchdog { checks: 15, timed_out: 16, unstable: 17, worst_skew_ns: -1, worst_interval_ns: 19 },
            vmclock_wrong: 20,
            ..Header::default()
        };
        assert_eq!(Header::from_bytes(&bytes), want);
    }

    #[test]
    fn rings_follow_each_other_aligned() {
        assert_eq!(RING_BYTES % 64, 0);
        assert!(RING_BYTES - HEADER_BYTES - RECORD_BYTES * CAPACITY as usize <= 63);
    }
}
