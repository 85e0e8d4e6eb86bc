//! Page tables: who may access what, and what an access leaves behind.

use vm_memory::{Bytes, GuestAddress};

use super::{TABLES, fault, leaf_of, long_mode, map, memory, not_covered, put};
use crate::{
    kvm::state::SystemRegisters,
    machine::vcpu::assist::{
        Stop,
        walk::{Paging, Purpose},
    },
    mem::ram::GuestRam,
};

const PAGE: u64 = 0x7fff_1234_5000;

fn walk(memory: &GuestRam, system: &SystemRegisters, linear: u64, purpose: Purpose) -> Result<u64, Stop> {
    Paging::new(system, false).translate(memory, linear, purpose)
}

/// The error code of the page fault at `linear`.
#[track_caller]
fn code(memory: &GuestRam, system: &SystemRegisters, linear: u64, purpose: Purpose) -> u32 {
    let exception = fault(walk(memory, system, linear, purpose));
    assert_eq!((exception.vector, exception.cr2), (14, Some(linear)));
    exception.error_code.unwrap()
}

// Catches: an index of the wrong bits, an offset that is lost, flags that a CPU would set and this does not, or that it
// sets for a look.
#[test]
fn four_levels_lead_to_a_page_and_are_marked() {
    let (memory, system) = (memory(), long_mode());
    map(&memory, PAGE, 0x4003);
    assert_eq!(walk(&memory, &system, PAGE + 0x678, Purpose::Look).unwrap(), 0x4678);
    assert_eq!(leaf_of(&memory, PAGE), 0x4003);
    assert_eq!(walk(&memory, &system, PAGE + 0x678, Purpose::Load).unwrap(), 0x4678);
    assert_eq!(leaf_of(&memory, PAGE), 0x4023);
    assert_eq!(walk(&memory, &system, PAGE + 0x678, Purpose::Store).unwrap(), 0x4678);
    assert_eq!(leaf_of(&memory, PAGE), 0x4063);
    let top: u64 = memory.read_obj(GuestAddress(TABLES + (PAGE >> 39) * 8)).unwrap();
    assert_eq!(top, (TABLES + 0x1000) | 0x27);
    // Without paging a linear address is a physical one.
    assert_eq!(walk(&memory, &SystemRegisters { cr0: 1, ..system }, 0x4678, Purpose::Store).unwrap(), 0x4678);
}

// Catches: an access that a CPU refuses, and a wrong error code, from which a kernel takes copy-on-write for a missing
// page.
#[test]
fn faults_have_their_error_codes() {
    let (memory, system) = (memory(), long_mode());
    map(&memory, PAGE, 0);
    assert_eq!(code(&memory, &system, PAGE, Purpose::Load), 0);
    assert_eq!(code(&memory, &system, PAGE + 9, Purpose::Store), 2);
    map(&memory, PAGE, 0x4001);
    assert_eq!(code(&memory, &system, PAGE, Purpose::Store), 3);
    assert_eq!(leaf_of(&memory, PAGE), 0x4001, "a store that faults leaves no mark");
    assert_eq!(walk(&memory, &system, PAGE, Purpose::Load).unwrap(), 0x4000);
    let unprotected = SystemRegisters { cr0: 0x8000_0001, ..system };
    assert_eq!(walk(&memory, &unprotected, PAGE, Purpose::Store).unwrap(), 0x4000);
    // NX is reserved unless EFER.NXE is set; a page larger than 1 GiB is.
    map(&memory, PAGE, 1 << 63 | 0x4003);
    assert_eq!(walk(&memory, &system, PAGE, Purpose::Load).unwrap(), 0x4000);
    assert_eq!(code(&memory, &SystemRegisters { efer: 0x500, ..system }, PAGE, Purpose::Load), 9);
    put(&memory, TABLES + (PAGE >> 39) * 8, (TABLES + 0x1000) | 0x83);
    assert_eq!(code(&memory, &system, PAGE, Purpose::Store), 11);
}

// Catches: a read-only table above a writable page, SMAP and its exception by RFLAGS.AC, protection keys.
#[test]
fn rights_are_those_of_all_levels() {
    let (memory, system) = (memory(), long_mode());
    map(&memory, PAGE, 0x4007);
    let smap = SystemRegisters { cr4: 0x20_0020, ..system };
    assert_eq!(code(&memory, &smap, PAGE, Purpose::Load), 1);
    assert_eq!(code(&memory, &smap, PAGE, Purpose::Store), 3);
    assert_eq!(Paging::new(&smap, true).translate(&memory, PAGE, Purpose::Store).unwrap(), 0x4000);
    not_covered(walk(&memory, &SystemRegisters { cr4: 0x40_0020, ..system }, PAGE, Purpose::Load));
    let keys = SystemRegisters { cr4: 0x100_0020, ..system };
    assert_eq!(walk(&memory, &keys, PAGE, Purpose::Load).unwrap(), 0x4000);
    map(&memory, PAGE, 0x4003);
    assert_eq!(walk(&memory, &smap, PAGE, Purpose::Load).unwrap(), 0x4000);
    not_covered(walk(&memory, &keys, PAGE, Purpose::Load));
    put(&memory, TABLES + 0x2000 + (PAGE >> 21 & 0x1ff) * 8, (TABLES + 0x3000) | 1);
    assert_eq!(code(&memory, &system, PAGE, Purpose::Store), 3);
}

// Catches: the wrong number of levels, entries of the wrong size, large pages' offsets and reserved bits.
#[test]
fn every_paging_mode_and_page_size() {
    let (memory, system) = (memory(), long_mode());
    // 1 GiB, 2 MiB.
    put(&memory, TABLES + (PAGE >> 39) * 8, (TABLES + 0x1000) | 3);
    put(&memory, TABLES + 0x1000 + (PAGE >> 30 & 0x1ff) * 8, 0x8000_1083u64);
    assert_eq!(walk(&memory, &system, PAGE, Purpose::Load).unwrap(), 0x8000_0000 + PAGE % (1 << 30));
    put(&memory, TABLES + 0x1000 + (PAGE >> 30 & 0x1ff) * 8, 0x8000_2083u64);
    assert_eq!(code(&memory, &system, PAGE, Purpose::Load), 9);
    put(&memory, TABLES + 0x1000 + (PAGE >> 30 & 0x1ff) * 8, (TABLES + 0x2000) | 3);
    put(&memory, TABLES + 0x2000 + (PAGE >> 21 & 0x1ff) * 8, 0x60_0083u64);
    assert_eq!(walk(&memory, &system, PAGE, Purpose::Store).unwrap(), 0x60_0000 + PAGE % (1 << 21));
    // Five levels: one more above these.
    put(&memory, 0x2000, TABLES | 3);
    let five = SystemRegisters { cr3: 0x2000, cr4: 0x1020, ..system };
    assert_eq!(walk(&memory, &five, PAGE, Purpose::Load).unwrap(), 0x60_0000 + PAGE % (1 << 21));
    // PAE: four entries, which have no flags but P.
    let pae = SystemRegisters { cr3: 0x3020, efer: 0x800, ..system };
    put(&memory, 0x3020 + 3 * 8, 0x4001u64);
    put(&memory, 0x4000 + 2 * 8, 0x5003u64);
    put(&memory, 0x5000 + 3 * 8, 0x9003u64);
    assert_eq!(walk(&memory, &pae, 0xc040_3abc, Purpose::Store).unwrap(), 0x9abc);
    assert_eq!(memory.read_obj::<u64>(GuestAddress(0x3020 + 3 * 8)).unwrap(), 0x4001);
    // Two levels of four-byte entries; a 4 MiB page above 4 GiB.
    let two = SystemRegisters { cr3: 0x6000, cr4: 0x10, efer: 0, ..system };
    put(&memory, 0x6000 + 0x301 * 4, 0x7003u32);
    put(&memory, 0x7000 + 3 * 4, 0x9003u32);
    assert_eq!(walk(&memory, &two, 0xc040_3abc, Purpose::Store).unwrap(), 0x9abc);
    assert_eq!(memory.read_obj::<u32>(GuestAddress(0x7000 + 3 * 4)).unwrap(), 0x9063);
    put(&memory, 0x6000 + 0x301 * 4, 0x0080_2083u32);
    assert_eq!(walk(&memory, &two, 0xc040_3abc, Purpose::Load).unwrap(), 0x1_0080_3abc);
    put(&memory, 0x6000 + 0x301 * 4, 0x00a0_0083u32);
    assert_eq!(code(&memory, &two, 0xc040_3abc, Purpose::Load), 9);
}

// Catches: a panic on tables that lie outside RAM, or that lead back to themselves.
#[test]
fn hostile_tables_lead_nowhere() {
    let (memory, system) = (memory(), long_mode());
    for table in [2 << 20, 0x000f_ffff_ffff_f000, 0x20_0000] {
        not_covered(walk(&memory, &SystemRegisters { cr3: table, ..system }, PAGE, Purpose::Store));
        map(&memory, PAGE, 0x4003);
        put(&memory, TABLES + 0x1000 + (PAGE >> 30 & 0x1ff) * 8, table | 3);
        not_covered(walk(&memory, &system, PAGE, Purpose::Store));
    }
    let itself = TABLES | 3;
    (0..512).for_each(|entry| put(&memory, TABLES + entry * 8, itself));
    assert_eq!(walk(&memory, &system, PAGE + 5, Purpose::Store).unwrap(), TABLES + 5);
}
