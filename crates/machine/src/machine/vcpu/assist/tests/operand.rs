//! Operands: segments, canonical addresses, two pages, and the instruction's own bytes.

use vm_memory::{Bytes, GuestAddress};

use super::{fault, flat, long_mode, map, memory, not_covered, protected_mode, put, run, state};
use crate::{
    kvm::{
        Exception,
        state::{GeneralRegisters, Segment, SystemRegisters},
    },
    machine::vcpu::assist::{fetch, next_rip},
};

const PAGE: u64 = 0xffff_8000_0000_0000;
/// POPCNT RBX, [RAX]; POPCNT EBX, [EAX] outside 64-bit mode.
const POPCNT_RAX: [u8; 5] = [0xf3, 0x48, 0x0f, 0xb8, 0x18];
const POPCNT_EAX: [u8; 4] = [0xf3, 0x0f, 0xb8, 0x18];

fn rax(rax: u64) -> GeneralRegisters {
    GeneralRegisters { rax, ..Default::default() }
}

// Catches: an access that is cut at a page's end, or whose second page is taken to follow the first in RAM; a fault
// that names the first page for the second.
#[test]
fn an_operand_across_two_pages() {
    let (memory, system) = (memory(), long_mode());
    map(&memory, PAGE, 0x4003);
    map(&memory, PAGE + 0x1000, 0x9003);
    memory.write_slice(&[0xff; 3], GuestAddress(0x4ffd)).unwrap();
    memory.write_slice(&[0x01; 5], GuestAddress(0x9000)).unwrap();
    assert_eq!(run(&memory, &system, rax(PAGE + 0xffd), &POPCNT_RAX).unwrap().0.rbx, 29);
    map(&memory, PAGE + 0x1000, 0);
    assert_eq!(fault(run(&memory, &system, rax(PAGE + 0xffd), &POPCNT_RAX)), Exception::page_fault(0, PAGE + 0x1000));
    assert_eq!(run(&memory, &system, rax(PAGE + 0xff8), &POPCNT_RAX).unwrap().0.rbx, 24);
    // Beyond RAM, where a device could be.
    map(&memory, PAGE + 0x1000, 0x20_0003);
    not_covered(run(&memory, &system, rax(PAGE + 0xffd), &POPCNT_RAX));
}

// Catches: an address that is not canonical taken for one, the wrong exception for the stack, a base of FS or GS that
// is left out, an address register of 32 bits taken whole.
#[test]
fn addresses_of_64_bit_mode() {
    let memory = memory();
    let system = SystemRegisters { gs: Segment { base: PAGE, ..flat(false) }, ..long_mode() };
    map(&memory, PAGE, 0x4003);
    put(&memory, 0x4010, 0x0f0fu64);
    for (at, bad) in [(0x8000_0000_0000, true), (0x7fff_ffff_fff9, true), (PAGE - 1, true), (PAGE + 0x10, false)] {
        let popcnt = run(&memory, &system, rax(at), &POPCNT_RAX);
        if bad {
            assert_eq!(fault(popcnt), Exception::GENERAL_PROTECTION, "{at:#x}");
        } else {
            assert_eq!(popcnt.unwrap().0.rbx, 8);
        }
    }
    // popcnt rbx, [rsp]
    let stack = GeneralRegisters { rsp: 1 << 50, ..Default::default() };
    assert_eq!(fault(run(&memory, &system, stack, &[0xf3, 0x48, 0x0f, 0xb8, 0x1c, 0x24])), Exception::STACK_FAULT);
    // popcnt rbx, gs:[eax]
    let wide = rax(0xdead_0000_0010);
    assert_eq!(run(&memory, &system, wide, &[0x65, 0x67, 0xf3, 0x48, 0x0f, 0xb8, 0x18]).unwrap().0.rbx, 8);
}

// Catches: limits that are not checked, by one byte too, downwards or upwards; a null segment; a segment's base; a
// linear address that does not wrap at 4 GiB.
#[test]
fn segments_of_protected_mode() {
    let memory = memory();
    put(&memory, 0x4010, 0x0f0fu32);
    let with = |ds: Segment| SystemRegisters { ds, ..protected_mode() };
    let popcnt = |ds: Segment, at: u64| run(&memory, &with(ds), rax(at), &POPCNT_EAX).map(|(after, _)| after.rbx);
    assert_eq!(popcnt(flat(false), 0x4010).unwrap(), 8);
    assert_eq!(popcnt(Segment { base: 0x4000, limit: 0x13, ..flat(false) }, 0x10).unwrap(), 8);
    assert_eq!(popcnt(Segment { base: 0xffff_f010, ..flat(false) }, 0x5000).unwrap(), 8);
    let down = Segment { type_: 7, limit: 0x400f, ..flat(false) };
    assert_eq!(popcnt(down, 0x4010).unwrap(), 8);
    let refused = [
        Segment { base: 0x4000, limit: 0x12, ..flat(false) },
        Segment { unusable: 1, ..flat(false) },
        Segment { present: 0, ..flat(false) },
        Segment { type_: 9, ..flat(true) },
    ];
    for segment in refused {
        assert_eq!(fault(popcnt(segment, 0x10)), Exception::GENERAL_PROTECTION, "{segment:?}");
    }
    assert_eq!(fault(popcnt(Segment { limit: 0x4010, ..down }, 0x4010)), Exception::GENERAL_PROTECTION);
    assert_eq!(fault(popcnt(Segment { db: 0, ..down }, 0xfffe)), Exception::GENERAL_PROTECTION);
    assert_eq!(fault(popcnt(flat(false), 0xffff_fffd)), Exception::GENERAL_PROTECTION);
}

// Catches: an instruction that is cut where its page ends, or where RAM does; one that is read from the wrong base; RIP
// that does not wrap with the code segment's size.
#[test]
fn an_instruction_is_fetched_from_where_it_is() {
    let (memory, system) = (memory(), long_mode());
    let at = |rip: u64| GeneralRegisters { rip, ..Default::default() };
    map(&memory, PAGE, 0x4003);
    map(&memory, PAGE + 0x1000, 0x9003);
    memory.write_slice(&POPCNT_RAX[..2], GuestAddress(0x4ffe)).unwrap();
    memory.write_slice(&POPCNT_RAX[2..], GuestAddress(0x9000)).unwrap();
    let crossing = state(&memory, &system, at(PAGE + 0xffe));
    let (instruction, _) = fetch(&crossing).unwrap();
    assert_eq!((instruction.len(), next_rip(&crossing, &instruction)), (5, PAGE + 0x1003));
    map(&memory, PAGE + 0x1000, 0);
    assert!(fetch(&state(&memory, &system, at(PAGE + 0xffe))).is_none());
    // The last bytes of RAM: an instruction that is whole, and one that is not.
    map(&memory, PAGE, 0x1f_f003);
    memory.write_slice(&[0x0f, 0x01, 0xca], GuestAddress(0x1f_fffd)).unwrap();
    assert_eq!(fetch(&state(&memory, &system, at(PAGE + 0xffd))).unwrap().0.len(), 3);
    memory.write_slice(&[0x0f, 0x01], GuestAddress(0x1f_fffe)).unwrap();
    assert!(fetch(&state(&memory, &system, at(PAGE + 0xffe))).is_none());
    let based = SystemRegisters { cs: Segment { base: 0xffff_0000, ..flat(true) }, ..protected_mode() };
    memory.write_slice(&[0xcc], GuestAddress(0x4000)).unwrap();
    assert_eq!(fetch(&state(&memory, &based, at(0x1_4000))).unwrap().0.len(), 1);
    let last = state(&memory, &based, at(0xffff_ffff));
    let (int3, _) = fetch(&state(&memory, &based, at(0x1_4000))).unwrap();
    assert_eq!(next_rip(&last, &int3), 0);
}

// Catches: code at the end of a segment's addresses that goes on beyond them.
#[test]
fn the_next_instruction_is_in_the_segment() {
    assert_eq!(super::super::behind(0xffff_fffe, 3, 32), 1);
    assert_eq!(super::super::behind(0xffff_fffe, 3, 64), 0x1_0000_0001);
    assert_eq!(super::super::behind(0x1_fffd, 3, 16), 0);
}
