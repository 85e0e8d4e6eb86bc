//! Memory that the host reads or writes: a kvmclock page, a PV EOI word and a tick ring for each CPU.
//!
//! Functions take the CPU's number. Where that is a constant, so is every address.

use core::arch::asm;
use core::cell::UnsafeCell;
use core::mem::{offset_of, zeroed};
use core::sync::atomic::{Ordering, compiler_fence};

use guest_abi::pv_eoi::PENDING;
use guest_abi::pvclock::{FLAG_GUEST_STOPPED, TimeInfo, WallClock};
use guest_abi::report::{CAPACITY, Header, LAYOUT, MAGIC, MAX_CPUS, RING_BYTES, Record, Watchdog};
use guest_abi::steal_time::StealTime;

/// Bit 0 of what the kvmclock time MSR takes, beside the page's address.
pub const ENABLE: u64 = 1;

/// Memory that the host accesses, too, which the compiler cannot see: only volatile accesses touch it.
#[repr(C, align(64))]
pub(super) struct Shared<T>(UnsafeCell<T>);

// SAFETY: every access below is a volatile read or write of one field.
unsafe impl<T> Sync for Shared<T> {}

#[repr(C)]
struct Ring {
    header: Header,
    records: [Record; CAPACITY as usize],
}

const _: () = assert!(size_of::<Shared<Ring>>() == RING_BYTES);

impl<T> Shared<T> {
    /// All zeros, which takes no room in the file.
    const fn zero() -> Self {
        // SAFETY: used for `TimeInfo`, `WallClock`, `Ring` and words: plain integers, for which zeros are a value.
        Self(UnsafeCell::new(unsafe { zeroed() }))
    }
}

/// One for each CPU.
pub(super) struct PerCpu<T>([Shared<T>; MAX_CPUS]);

impl<T> PerCpu<T> {
    /// The value of CPU `cpu`. A number out of range wraps around.
    #[inline(always)]
    #[expect(clippy::indexing_slicing, reason = "the remainder is below the array's length")]
    fn of(&self, cpu: usize) -> *mut T {
        UnsafeCell::raw_get(&raw const self.0[cpu % MAX_CPUS].0)
    }
}

pub(super) static TIME: PerCpu<TimeInfo> = PerCpu([const { Shared::zero() }; MAX_CPUS]);

static EOI: PerCpu<u32> = PerCpu([const { Shared::zero() }; MAX_CPUS]);

static STEAL: Shared<StealTime> = Shared::zero();

static WALL: Shared<WallClock> = Shared::zero();

#[unsafe(link_section = ".tick_ring")]
static RINGS: PerCpu<Ring> = PerCpu([const { Shared::zero() }; MAX_CPUS]);

/// The address of a field.
macro_rules! field {
    ($place:expr, $($path:ident).+) => {{
        let place = $place;
        // SAFETY: an address inside a static; nothing is read, no reference is made.
        unsafe { &raw mut (*place).$($path).+ }
    }};
}

macro_rules! get {
    ($place:expr, $($path:tt)+) => {{
        let field = field!($place, $($path)+);
        // SAFETY: inside a static, aligned, any bits are valid; the host may write it, so volatile.
        unsafe { field.read_volatile() }
    }};
}

macro_rules! put {
    ($value:expr => $place:expr, $($path:tt)+) => {{
        let field = field!($place, $($path)+);
        // SAFETY: inside a static that has no references to it, aligned; the host may read it, so volatile.
        unsafe { field.write_volatile($value) }
    }};
}

/// Physical address of the CPU's time page.
pub fn time_address(cpu: usize) -> u64 {
    TIME.of(cpu).addr() as u64
}

/// Physical address of the CPU's PV EOI word.
pub fn eoi_address(cpu: usize) -> u64 {
    EOI.of(cpu).addr() as u64
}

/// Clears the PV EOI word's pending bit, and returns whether it was set: if so, that ended the interrupt in service
/// without a write to the APIC. One instruction tests and clears, so that the host cannot clear the bit in between.
#[inline(always)]
pub fn clear_pv_eoi_pending(cpu: usize) -> bool {
    // SAFETY: a word of a static that only this CPU and, while this CPU is not running, the host touch.
    unsafe {
        asm!(
            "btr dword ptr [{}], {}",
            "jc {}",
            in(reg) EOI.of(cpu),
            const PENDING.trailing_zeros(),
            label { return true },
            options(nostack)
        );
    }
    false
}

/// Physical address of CPU 0's steal-time area.
pub fn steal_address() -> u64 {
    STEAL.0.get().addr() as u64
}

/// The steal-time area's version, as [`time_version`].
pub fn steal_version() -> u32 {
    compiler_fence(Ordering::SeqCst);
    let version = get!(STEAL.0.get(), version);
    compiler_fence(Ordering::SeqCst);
    version
}

/// The steal-time area's sum.
pub fn steal_sum() -> u64 {
    get!(STEAL.0.get(), steal)
}

/// Physical address of the wall clock.
pub fn wall_address() -> u64 {
    WALL.0.get().addr() as u64
}

/// The time page's version. x86 keeps loads in order; the fence keeps the compiler from moving others across.
#[inline(always)]
pub fn time_version(cpu: usize) -> u32 {
    compiler_fence(Ordering::SeqCst);
    let version = get!(TIME.of(cpu), version);
    compiler_fence(Ordering::SeqCst);
    version
}

/// The time page's fields but for its version.
#[inline(always)]
pub fn time_fields(cpu: usize) -> TimeInfo {
    let page = TIME.of(cpu);
    TimeInfo {
        tsc_timestamp: get!(page, tsc_timestamp),
        system_time: get!(page, system_time),
        tsc_to_system_mul: get!(page, tsc_to_system_mul),
        tsc_shift: get!(page, tsc_shift),
        flags: get!(page, flags),
        ..TimeInfo::default()
    }
}

/// Clears PVCLOCK_GUEST_STOPPED. One locked instruction, because the host sets bits in the same byte.
pub fn clear_guest_stopped(cpu: usize) {
    let flags = time_address(cpu) + offset_of!(TimeInfo, flags) as u64;
    // SAFETY: a byte of a static that only volatile and locked accesses touch.
    unsafe { asm!("lock and byte ptr [{}], {}", in(reg) flags, const !FLAG_GUEST_STOPPED.cast_signed()) };
}

/// Reads the wall clock. The host has written it by now.
pub fn wall_clock() -> WallClock {
    let wall = WALL.0.get();
    WallClock { version: get!(wall, version), sec: get!(wall, sec), nsec: get!(wall, nsec) }
}

/// Sets the CPU's ring up for `expected` ticks. The magic number is stored last: a reader that finds it finds the rest.
pub fn ring_start(cpu: usize, expected: u64) {
    let ring = RINGS.of(cpu);
    put!(LAYOUT => ring, header.layout);
    put!(CAPACITY => ring, header.capacity);
    put!(expected => ring, header.expected);
    put!(number(cpu) => ring, header.cpu);
    put!(MAGIC => ring, header.magic);
}

/// Stores a record in its slot, with the CPU's number, then the number of records. Field by field: for a copy of the
/// whole, the compiler would first assemble it on the stack.
#[inline(always)]
pub fn ring_push(cpu: usize, record: &Record) {
    let ring = RINGS.of(cpu);
    let slot = usize::try_from(record.seq % u64::from(CAPACITY)).unwrap_or(0);
    // `slot` is below the array's length.
    let place = field!(ring, records).cast::<Record>().wrapping_add(slot);
    // The memory is zero until the CPU writes there, so CPU 0's number and the reserved field need no store.
    let Record {
        seq,
        expires_ns,
        armed_ns,
        first_wake_ns,
        fired_ns,
        fired_tsc,
        deadline,
        page_version,
        early_wakes,
        cpu: _,
        reserved: _,
    } = *record;
    put!(seq => place, seq);
    put!(expires_ns => place, expires_ns);
    put!(armed_ns => place, armed_ns);
    put!(first_wake_ns => place, first_wake_ns);
    put!(fired_ns => place, fired_ns);
    put!(fired_tsc => place, fired_tsc);
    put!(deadline => place, deadline);
    put!(page_version => place, page_version);
    put!(early_wakes => place, early_wakes);
    if cpu != 0 {
        put!(number(cpu) => place, cpu);
    }
    put!(seq.wrapping_add(1) => ring, header.written);
}

/// Physical address of the CPU's count of ticks.
pub(super) fn written_address(cpu: usize) -> u64 {
    field!(RINGS.of(cpu), header.written).addr() as u64
}

/// Stores the clock's steps back.
pub fn ring_steps_back(cpu: usize, count: u64, worst_ns: u64) {
    let ring = RINGS.of(cpu);
    put!(count => ring, header.clock_steps_back);
    put!(worst_ns => ring, header.worst_step_back_ns);
}

/// Stores how often the guest found PVCLOCK_GUEST_STOPPED.
pub fn ring_stopped_seen(cpu: usize, count: u64) {
    put!(count => RINGS.of(cpu), header.guest_stopped_seen);
}

/// Stores how many interrupts the CPU has sent.
pub fn ring_ipis_sent(cpu: usize, count: u64) {
    put!(count => RINGS.of(cpu), header.ipis_sent);
}

/// Stores how many interrupts the CPU has received.
pub fn ring_ipis_received(cpu: usize, count: u64) {
    put!(count => RINGS.of(cpu), header.ipis_received);
}

/// Stores what the clocksource watchdog has found, in CPU 0's ring.
pub fn ring_watchdog(found: &Watchdog) {
    put!(*found => RINGS.of(0), header.watchdog);
}

/// Stores at how many ticks VMClock was wrong, in CPU 0's ring.
pub fn ring_vmclock_wrong(count: u64) {
    put!(count => RINGS.of(0), header.vmclock_wrong);
}

/// The CPU's number in the ring's format.
fn number(cpu: usize) -> u32 {
    u32::try_from(cpu).unwrap_or(u32::MAX)
}
