//! Translates a linear address through the guest's page tables, as supervisor code accesses it.
//!
//! KVM_TRANSLATE will not do: it tells whether a page is present, not whether it may be written, and marks nothing as
//! accessed. SDM vol. 3, "Paging"; a reference to a chapter below is to that one.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, VolatileMemory, bitmap::Bitmap};

use super::Stop;
use crate::{
    kvm::{Exception, state::SystemRegisters},
    mem::ram::GuestRam,
};

const CR0_WP: u64 = 1 << 16;
const CR0_PG: u64 = 1 << 31;
const CR4_PSE: u64 = 1 << 4;
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;
const CR4_SMAP: u64 = 1 << 21;
const CR4_PKE: u64 = 1 << 22;
const CR4_PKS: u64 = 1 << 24;
const EFER_LMA: u64 = 1 << 10;
const EFER_NXE: u64 = 1 << 11;

/// Bits of an entry.
const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
/// The address in an entry of 8 bytes.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Bits of a page fault's error code ("Page-Fault Exceptions").
const FAULT_PRESENT: u32 = 1;
const FAULT_WRITE: u32 = 1 << 1;
const FAULT_RESERVED: u32 = 1 << 3;

/// What an address is translated for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// To see the instruction, which the CPU has fetched already: changes and checks nothing.
    Look,
    /// A load.
    Load,
    /// A store, or a load that may be followed by one.
    Store,
}

/// The state of a vCPU on which a translation depends.
#[derive(Clone, Copy, Debug)]
pub(super) struct Paging {
    cr0: u64,
    cr3: u64,
    cr4: u64,
    efer: u64,
    /// RFLAGS.AC, which lets supervisor code access user pages.
    ac: bool,
}

/// An entry of a paging structure.
#[derive(Clone, Copy)]
struct Entry {
    at: u64,
    value: u64,
    wide: bool,
}

impl Paging {
    pub(super) fn new(system: &SystemRegisters, ac: bool) -> Self {
        let SystemRegisters { cr0, cr3, cr4, efer, .. } = *system;
        Self { cr0, cr3, cr4, efer, ac }
    }

    /// How many bits of a linear address are translated, in 64-bit mode.
    pub(super) fn linear_bits(&self) -> u32 {
        if self.cr4 & CR4_LA57 != 0 { 57 } else { 48 }
    }

    /// The shifts of the levels' indices, and whether entries have 8 bytes.
    fn levels(&self) -> (&'static [u32], bool) {
        match (self.efer & EFER_LMA != 0, self.cr4 & CR4_LA57 != 0, self.cr4 & CR4_PAE != 0) {
            (true, true, _) => (&[48, 39, 30, 21, 12], true),
            (true, false, _) => (&[39, 30, 21, 12], true),
            (false, _, true) => (&[30, 21, 12], true),
            (false, _, false) => (&[22, 12], false),
        }
    }

    /// The physical address of `linear`. Marks entries as accessed and, for a store, the page as dirty.
    ///
    /// # Errors
    /// A page fault, or what this does not cover.
    pub(super) fn translate(&self, memory: &GuestRam, linear: u64, purpose: Purpose) -> Result<u64, Stop> {
        if self.cr0 & CR0_PG == 0 {
            return Ok(linear);
        }
        let (levels, wide) = self.levels();
        let long = self.efer & EFER_LMA != 0;
        let store = purpose == Purpose::Store;
        let fault = |code: u32| {
            let write = if store { FAULT_WRITE } else { 0 };
            Stop::Raise(Exception::page_fault(code | write, linear))
        };
        let mut table = match (long, wide) {
            (true, _) => self.cr3 & ADDRESS,
            (false, true) => self.cr3 & 0xffff_ffe0,
            (false, false) => self.cr3 & 0xffff_f000,
        };
        let (mut writable, mut user) = (true, true);
        let mut walked = Vec::new();
        for shift in levels {
            let entry = Entry::read(memory, table, linear >> shift, wide)?;
            let value = entry.value;
            if value & PRESENT == 0 {
                return Err(fault(0));
            }
            // Without long mode the topmost of three levels has four entries, which hold an address only ("PDPTE
            // Registers").
            if !long && wide && *shift == 30 {
                table = value & ADDRESS;
                continue;
            }
            let large = value & LARGE != 0 && *shift != 12 && (wide || self.cr4 & CR4_PSE != 0);
            let reserved = match (large, wide) {
                (true, true) => *shift > 30 || value & ADDRESS & low(*shift) & !low(13) != 0,
                (true, false) => value & 1 << 21 != 0,
                (false, _) => false,
            };
            if reserved || wide && value & NO_EXECUTE != 0 && self.efer & EFER_NXE == 0 {
                return Err(fault(FAULT_PRESENT | FAULT_RESERVED));
            }
            writable &= value & WRITABLE != 0;
            user &= value & USER != 0;
            walked.push(entry);
            let page = match (large, wide) {
                (true, true) => value & ADDRESS & !low(*shift),
                // Bits 20:13 are bits 39:32 of the address.
                (true, false) => value & 0xffc0_0000 | (value >> 13 & 0xff) << 32,
                (false, true) => value & ADDRESS,
                (false, false) => value & 0xffff_f000,
            };
            if large || *shift == 12 {
                if purpose != Purpose::Look {
                    self.check(store, writable, user).map_err(|why| why.map_or(Stop::NotCovered, fault))?;
                    mark(memory, &walked, store)?;
                }
                return Ok(page | linear & low(*shift));
            }
            table = page;
        }
        Err(Stop::NotCovered)
    }

    /// Whether supervisor code may access such a page ("Determination of Access Rights"). The error is a page fault's
    /// code; none if protection keys decide.
    fn check(&self, store: bool, writable: bool, user: bool) -> Result<(), Option<u32>> {
        if user && self.cr4 & CR4_SMAP != 0 && !self.ac || store && !writable && self.cr0 & CR0_WP != 0 {
            return Err(Some(FAULT_PRESENT));
        }
        let keys = if user { CR4_PKE } else { CR4_PKS };
        if self.cr4 & keys != 0 { Err(None) } else { Ok(()) }
    }
}

/// The bits below bit number `bit`.
fn low(bit: u32) -> u64 {
    (1 << bit) - 1
}

impl Entry {
    /// Entry number `index`, modulo the number of entries, of the table at `table`.
    fn read(memory: &GuestRam, table: u64, index: u64, wide: bool) -> Result<Self, Stop> {
        let at = if wide { table | (index & 0x1ff) << 3 } else { table | (index & 0x3ff) << 2 };
        let value = match wide {
            true => memory.load(GuestAddress(at), Ordering::Acquire),
            false => memory.load::<u32>(GuestAddress(at), Ordering::Acquire).map(u64::from),
        };
        // A table outside RAM.
        value.map(|value| Self { at, value, wide }).map_err(|_| Stop::NotCovered)
    }

    /// Sets `bits`, if the entry is still what it was.
    fn set(&self, memory: &GuestRam, bits: u64) -> Result<(), Stop> {
        let size = if self.wide { 8 } else { 4 };
        let slice = memory.get_slice(GuestAddress(self.at), size).map_err(|_| Stop::NotCovered)?;
        let exchanged = if self.wide {
            let entry = slice.get_atomic_ref::<AtomicU64>(0).map_err(|_| Stop::NotCovered)?;
            let (was, is) = (self.value, self.value | bits);
            entry.compare_exchange(was, is, Ordering::SeqCst, Ordering::Relaxed).is_ok()
        } else {
            let entry = slice.get_atomic_ref::<AtomicU32>(0).map_err(|_| Stop::NotCovered)?;
            let [was, is] = [self.value, self.value | bits].map(|value| u32::try_from(value).unwrap_or(0));
            entry.compare_exchange(was, is, Ordering::SeqCst, Ordering::Relaxed).is_ok()
        };
        if !exchanged {
            return Err(Stop::Again);
        }
        slice.bitmap().mark_dirty(0, size);
        Ok(())
    }
}

/// Sets the accessed flags of `walked`, and for a store the dirty flag of the last of them, the page's.
fn mark(memory: &GuestRam, walked: &[Entry], store: bool) -> Result<(), Stop> {
    for (index, entry) in walked.iter().enumerate() {
        let dirty = store && index + 1 == walked.len();
        let bits = if dirty { ACCESSED | DIRTY } else { ACCESSED };
        if entry.value & bits != bits {
            entry.set(memory, bits)?;
        }
    }
    Ok(())
}
