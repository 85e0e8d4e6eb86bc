//! Memory that the host reads or writes: the kvmclock pages and the tick ring.

use core::arch::asm;
use core::cell::UnsafeCell;
use core::mem::offset_of;
use core::sync::atomic::{Ordering, compiler_fence};

use guest_abi::pvclock::{FLAG_GUEST_STOPPED, TimeInfo, WallClock};
use guest_abi::report::{CAPACITY, Header, LAYOUT, MAGIC, Record};

/// Memory with a second user outside the compiler's sight: only volatile accesses touch it.
#[repr(C, align(64))]
struct Shared<T>(UnsafeCell<T>);

// SAFETY: every access below is a volatile read or write of one field.
unsafe impl<T> Sync for Shared<T> {}

#[repr(C)]
struct Ring {
    header: Header,
    records: [Record; CAPACITY as usize],
}

static TIME: Shared<TimeInfo> = Shared(UnsafeCell::new(TimeInfo {
    version: 0,
    pad0: 0,
    tsc_timestamp: 0,
    system_time: 0,
    tsc_to_system_mul: 0,
    tsc_shift: 0,
    flags: 0,
    pad: [0; 2],
}));

static WALL: Shared<WallClock> = Shared(UnsafeCell::new(WallClock { version: 0, sec: 0, nsec: 0 }));

/// All zeros, so that it takes no room in the file.
#[unsafe(link_section = ".tick_ring")]
static RING: Shared<Ring> = Shared(UnsafeCell::new(Ring {
    header: Header {
        magic: 0,
        layout: 0,
        capacity: 0,
        written: 0,
        expected: 0,
        clock_steps_back: 0,
        worst_step_back_ns: 0,
        guest_stopped_seen: 0,
        reserved: 0,
    },
    records: [Record {
        seq: 0,
        expires_ns: 0,
        armed_ns: 0,
        first_wake_ns: 0,
        fired_ns: 0,
        fired_tsc: 0,
        deadline: 0,
        page_version: 0,
        early_wakes: 0,
        cpu: 0,
        reserved: 0,
    }; CAPACITY as usize],
}));

/// The address of a field of a static.
macro_rules! field {
    ($place:ident . $($path:ident).+) => {
        // SAFETY: an address inside a static; nothing is read, no reference is made.
        unsafe { &raw mut (*$place.0.get()).$($path).+ }
    };
}

macro_rules! get {
    ($($field:tt)+) => {{
        let field = field!($($field)+);
        // SAFETY: inside a static, aligned, any bits are valid; the host may write it, so volatile.
        unsafe { field.read_volatile() }
    }};
}

macro_rules! put {
    ($value:expr => $($field:tt)+) => {{
        let field = field!($($field)+);
        // SAFETY: inside a static that has no references to it, aligned; the host may read it, so volatile.
        unsafe { field.write_volatile($value) }
    }};
}

/// Physical address of the time page.
pub fn time_address() -> u64 {
    TIME.0.get().addr() as u64
}

/// Physical address of the wall clock.
pub fn wall_address() -> u64 {
    WALL.0.get().addr() as u64
}

/// The time page's version. x86 keeps loads in order; the fence keeps the compiler from moving others across.
#[inline(always)]
pub fn time_version() -> u32 {
    compiler_fence(Ordering::SeqCst);
    let version = get!(TIME.version);
    compiler_fence(Ordering::SeqCst);
    version
}

/// The time page's fields but for its version.
#[inline(always)]
pub fn time_fields() -> TimeInfo {
    TimeInfo {
        tsc_timestamp: get!(TIME.tsc_timestamp),
        system_time: get!(TIME.system_time),
        tsc_to_system_mul: get!(TIME.tsc_to_system_mul),
        tsc_shift: get!(TIME.tsc_shift),
        flags: get!(TIME.flags),
        ..TimeInfo::default()
    }
}

/// Clears PVCLOCK_GUEST_STOPPED. One locked instruction, because the host sets bits in the same byte.
pub fn clear_guest_stopped() {
    let flags = time_address() + offset_of!(TimeInfo, flags) as u64;
    // SAFETY: a byte of a static that only volatile and locked accesses touch.
    unsafe { asm!("lock and byte ptr [{}], {}", in(reg) flags, const !FLAG_GUEST_STOPPED.cast_signed()) };
}

/// The wall clock, which the host has filled by now.
pub fn wall_clock() -> WallClock {
    WallClock { version: get!(WALL.version), sec: get!(WALL.sec), nsec: get!(WALL.nsec) }
}

/// Sets the ring up for `expected` ticks. The magic number comes last: who finds it finds the rest.
pub fn ring_start(expected: u64) {
    put!(LAYOUT => RING.header.layout);
    put!(CAPACITY => RING.header.capacity);
    put!(expected => RING.header.expected);
    put!(MAGIC => RING.header.magic);
}

/// Stores a record in its slot, then how many there are.
pub fn ring_push(record: &Record) {
    let slot = usize::try_from(record.seq % u64::from(CAPACITY)).unwrap_or(0);
    let place = field!(RING.records).cast::<Record>().wrapping_add(slot);
    // SAFETY: `slot` is below the array's length; otherwise as `put!`.
    unsafe { place.write_volatile(*record) };
    put!(record.seq.wrapping_add(1) => RING.header.written);
}

/// Stores the clock's steps back.
pub fn ring_steps_back(count: u64, worst_ns: u64) {
    put!(count => RING.header.clock_steps_back);
    put!(worst_ns => RING.header.worst_step_back_ns);
}

/// Stores how often the host had stopped the guest.
pub fn ring_stopped_seen(count: u64) {
    put!(count => RING.header.guest_stopped_seen);
}
