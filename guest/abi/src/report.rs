//! The tick ring: what the guest saw of every tick, in guest RAM.
//!
//! The guest places one [`Header`] at the start of the ELF section [`SECTION`], followed by `capacity` [`Record`]s.
//! It writes record number `n` (counted from 0) at slot `n % capacity`, then stores `written = n + 1`. The ring is
//! part of RAM and so survives a migration; the VMM reads it while the guest halts and does not trust a byte of it.

/// Name of the ELF section (no bits) whose address is the header's.
pub const SECTION: &str = ".tick_ring";
/// [`Header::magic`]: `"TICKRING"`, little endian.
pub const MAGIC: u64 = u64::from_le_bytes(*b"TICKRING");
/// [`Header::layout`]: changes when a field does.
pub const LAYOUT: u32 = 1;
/// Records the ring holds.
pub const CAPACITY: u32 = 2048;

/// The ring's header, 64 bytes, little endian.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Header {
    /// [`MAGIC`], stored last when the guest sets the ring up.
    pub magic: u64,
    /// [`LAYOUT`].
    pub layout: u32,
    /// [`CAPACITY`].
    pub capacity: u32,
    /// Records written since boot.
    pub written: u64,
    /// Ticks the scenario will make; 0 = until it is told to stop.
    pub expected: u64,
    /// How often a kvmclock reading was smaller than the one before it.
    pub clock_steps_back: u64,
    /// The largest such step, in nanoseconds.
    pub worst_step_back_ns: u64,
    /// How often the guest found (and cleared) PVCLOCK_GUEST_STOPPED.
    pub guest_stopped_seen: u64,
    /// Zero.
    pub reserved: u64,
}

/// Size of [`Header`], in bytes.
pub const HEADER_BYTES: usize = 64;
const _: () = assert!(size_of::<Header>() == HEADER_BYTES);

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
            reserved: at.u64(),
        }
    }
}

/// One tick as the guest saw it, 72 bytes, little endian. Times are kvmclock nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Record {
    /// Number of the tick, from 0, without gaps.
    pub seq: u64,
    /// When the tick was to fire.
    pub expires_ns: u64,
    /// When the tick layer first armed it.
    pub armed_ns: u64,
    /// When its first interrupt was handled: less than `expires_ns` if that was an early wake.
    pub first_wake_ns: u64,
    /// When it was handled for good, never less than `expires_ns`.
    pub fired_ns: u64,
    /// The TSC read that gave `fired_ns`.
    pub fired_tsc: u64,
    /// What was last written to arm it: a TSC deadline, nanoseconds or an initial count, by clockevent.
    pub deadline: u64,
    /// Version of the pvclock page that gave `fired_ns`.
    pub page_version: u32,
    /// Interrupts that came before `expires_ns`, each followed by arming again.
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

/// Reads little-endian fields one after another; past the end it gives zeros.
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

    pub(crate) fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    pub(crate) fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }
}
