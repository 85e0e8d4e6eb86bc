//! The PVH entry, and the loader's data: command line and memory map.

use core::arch::global_asm;
use core::slice;

use guest::clockevent::LVT_VECTOR;
use guest::smp::{IPI_VECTOR, WAKE_VECTOR};
use guest_abi::report::MAX_CPUS;
use guest_abi::sites::Kind;

use super::cpu::{IrqsOff, TSS_DESCRIPTOR_BYTES, TSS_SELECTOR};
use super::load::{PAGE_BYTES, Pages};
use super::shared::TIME;
use crate::apic::SPURIOUS_VECTOR;

// `boot.s` and `vectors.s` depend on this.
const _: () = assert!(LVT_VECTOR < IPI_VECTOR && IPI_VECTOR < WAKE_VECTOR && WAKE_VECTOR < SPURIOUS_VECTOR);
const _: () = assert!(TSS_DESCRIPTOR_BYTES == 16 && MAX_CPUS.is_power_of_two());

global_asm!(
    ".set MAX_CPUS, {max_cpus}",
    ".set TSS_SELECTOR, {tss}",
    include_str!("boot.s"),
    max_cpus = const MAX_CPUS,
    tss = const TSS_SELECTOR,
    options(att_syntax)
);
global_asm!(
    ".set TIMER_VECTOR, {timer}",
    ".set IPI_VECTOR, {ipi}",
    ".set WAKE_VECTOR, {wake}",
    ".set SPURIOUS_VECTOR, {spurious}",
    ".set TIME_PAGE, {time}",
    ".set RDTSC_SITE, {rdtsc}",
    include_str!("vectors.s"),
    timer = const LVT_VECTOR,
    ipi = const IPI_VECTOR,
    wake = const WAKE_VECTOR,
    spurious = const SPURIOUS_VECTOR,
    time = sym TIME,
    rdtsc = const Kind::Rdtsc as u32,
    options(att_syntax)
);

/// `hvm_start_info.magic` ("xEn3" with bit 7 of the E set).
const START_MAGIC: u32 = 0x336e_c578;
/// Where `hvm_start_info` has the command line's address (Xen `xen/include/public/arch-x86/hvm/start_info.h`).
const CMDLINE_OFFSET: u64 = 24;
/// Where it has the memory map's address, and how many entries that has; from version 1 on.
const MEMMAP_OFFSET: u64 = 40;
const MEMMAP_ENTRIES_OFFSET: u64 = 48;
const VERSION_OFFSET: u64 = 4;
/// `hvm_memmap_table_entry` is address, size, type: here its size, the type of RAM, and a limit on entries to read.
const MEMMAP_ENTRY_BYTES: u64 = 24;
const MEMMAP_RAM: u32 = 1;
const MEMMAP_MAX: u32 = 1024;
/// End of what the page tables map.
const MAPPED_END: u64 = 1 << 32;

/// Called once by `boot.s`, on the boot stack, interrupts off.
#[unsafe(no_mangle)]
extern "C" fn boot_entry(start_info: u32) -> ! {
    // SAFETY: called once, by the only CPU that is up.
    crate::kernel::main(start_info, unsafe { IrqsOff::new() })
}

/// `N` bytes of physical memory, if they are mapped. Unaligned: a loader may put its structures anywhere.
fn read<const N: usize>(address: u64) -> Option<[u8; N]> {
    let end = address.checked_add(u64::try_from(N).ok()?)?;
    if address == 0 || end > MAPPED_END {
        return None;
    }
    // SAFETY: not null, identity-mapped up to its last byte, and any bytes are a valid array. The guest has not yet
    // written to the loader's memory.
    Some(unsafe { (address as *const [u8; N]).read_volatile() })
}

/// The command line from the start info, without its NUL: empty if there is none, cut after `max` bytes if it is
/// longer. `None` if the start info is none, or has an address that is not mapped.
pub fn command_line(start_info: u32, max: usize) -> Option<&'static [u8]> {
    let start = u64::from(start_info);
    if u32::from_le_bytes(read(start)?) != START_MAGIC {
        return None;
    }
    let line = u64::from_le_bytes(read(start.checked_add(CMDLINE_OFFSET)?)?);
    if line == 0 {
        return Some(&[]);
    }
    let mut at = line;
    let mut length = 0;
    while length < max && read::<1>(at)? != [0] {
        length += 1;
        at += 1;
    }
    // SAFETY: `read` found each of these bytes mapped and not null; the loader's memory is outside the kernel's image
    // and stack, and is not written to while the line is in use.
    Some(unsafe { slice::from_raw_parts(line as *const u8, length) })
}

/// `count` pages of RAM after the kernel's image, for the guest to overwrite. A loader's data in them is lost.
///
/// # Errors
/// The number of pages there, if it is less than `count`.
pub fn pages_after_image(start_info: u32, count: u64) -> Result<Pages, u64> {
    unsafe extern "C" {
        static image_end: u8;
    }
    let first = ((&raw const image_end).addr() as u64).next_multiple_of(PAGE_BYTES);
    let end = ram_end(start_info, first).unwrap_or(first).min(MAPPED_END);
    let there = end.saturating_sub(first) / PAGE_BYTES;
    if there < count { Err(there) } else { Ok(Pages::new(first, count)) }
}

/// End of the range of RAM that `address` is in.
fn ram_end(start_info: u32, address: u64) -> Option<u64> {
    let start = u64::from(start_info);
    let at = |offset: u64| start.checked_add(offset);
    if u32::from_le_bytes(read(at(VERSION_OFFSET)?)?) == 0 {
        return None;
    }
    let map = u64::from_le_bytes(read(at(MEMMAP_OFFSET)?)?);
    let entries = u32::from_le_bytes(read(at(MEMMAP_ENTRIES_OFFSET)?)?);
    for n in 0..entries.min(MEMMAP_MAX) {
        let entry = map.checked_add(u64::from(n) * MEMMAP_ENTRY_BYTES)?;
        let base = u64::from_le_bytes(read(entry)?);
        let end = base.checked_add(u64::from_le_bytes(read(entry.checked_add(8)?)?))?;
        let ram = u32::from_le_bytes(read(entry.checked_add(16)?)?) == MEMMAP_RAM;
        if ram && (base..end).contains(&address) {
            return Some(end);
        }
    }
    None
}
