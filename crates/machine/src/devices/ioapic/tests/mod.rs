//! Rules of the 82093AA's datasheet, one by one; [`model`] compares with a second implementation of them.

mod model;

use super::*;

const MASKED: u32 = 1 << 16;
const LEVEL: u32 = 1 << 15;
const REMOTE_IRR: u32 = 1 << 14;

fn read(ioapic: &mut Ioapic, register: u8) -> u32 {
    ioapic.write(SELECT, &u32::from(register).to_le_bytes());
    let mut data = [0; 4];
    ioapic.read(WINDOW, &mut data);
    u32::from_le_bytes(data)
}

fn write(ioapic: &mut Ioapic, register: u8, value: u32) {
    ioapic.write(SELECT, &u32::from(register).to_le_bytes());
    ioapic.write(WINDOW, &value.to_le_bytes());
}

/// The registers of a pin's entry: bits 31:0, and bits 63:32.
fn low(pin: u8) -> u8 {
    0x10 + 2 * pin
}

fn high(pin: u8) -> u8 {
    low(pin) + 1
}

/// One whose entry for `pin` is `bits`, for the CPU with ID 3.
fn with(pin: u8, bits: u32) -> Ioapic {
    let mut ioapic = Ioapic::default();
    write(&mut ioapic, high(pin), 3 << 24);
    write(&mut ioapic, low(pin), bits);
    ioapic
}

fn messages(ioapic: &mut Ioapic) -> Vec<(u8, Ipi)> {
    std::iter::from_fn(|| ioapic.take_message()).collect()
}

fn vectors(ioapic: &mut Ioapic) -> Vec<u8> {
    messages(ioapic).iter().map(|(_, message)| message.vector).collect()
}

// Catches: registers at other numbers, of other widths, or with other reset values. "IOAPICVER: Bits 23:16 Maximum
// Redirection Entry … 17h (23)"; Linux takes the number of pins from it.
#[test]
fn it_is_an_82093aa() {
    let mut ioapic = Ioapic::default();
    assert_eq!(read(&mut ioapic, 1), 0x17 << 16 | 0x11);
    write(&mut ioapic, 1, 0);
    assert_eq!(read(&mut ioapic, 1), 0x17 << 16 | 0x11, "read-only");
    write(&mut ioapic, 0, u32::MAX);
    assert_eq!(read(&mut ioapic, 0), 0x0f00_0000, "four bits");
    assert_eq!(read(&mut ioapic, 2), 0x0f00_0000, "the arbitration ID is loaded with the ID");
    for pin in 0..24 {
        assert_eq!((read(&mut ioapic, low(pin)), read(&mut ioapic, high(pin))), (MASKED, 0));
        write(&mut ioapic, low(pin), u32::MAX);
        write(&mut ioapic, high(pin), u32::MAX);
        // Without delivery status and Remote IRR, which are read-only, and without reserved bits.
        assert_eq!((read(&mut ioapic, low(pin)), read(&mut ioapic, high(pin))), (0x1_afff, 0xff00_0000));
    }
    for register in (3..0x10).chain(0x40..=0xff) {
        write(&mut ioapic, register, 0x1234);
        assert_eq!(read(&mut ioapic, register), u32::MAX, "{register:#x}");
    }
}

// Catches: an access that is not 4 bytes wide and panics, or changes what it does not name.
#[test]
fn accesses_of_any_width_are_bounded() {
    for address in [SELECT, WINDOW] {
        for width in 0..=16 {
            let mut ioapic = with(4, 0x31);
            ioapic.write(SELECT, &[low(4)]);
            let mut data = vec![0xee; width];
            ioapic.read(address, &mut data);
            let register = if address == SELECT { u32::from(low(4)) } else { 0x31 };
            let expected: Vec<u8> = register.to_le_bytes().into_iter().chain([0; 12]).take(width).collect();
            assert_eq!(data, expected);
            ioapic.write(address, &vec![0x52; width]);
        }
    }
    assert!(Ioapic::owns(0xfec0_0000) && Ioapic::owns(0xfec0_0010));
    assert!([0xfec0_0004, 0xfec0_0011, 0xfec0_0020, 0xfec0_0040].iter().all(|address| !Ioapic::owns(*address)));
}

// Catches: an interrupt in front of its unmasking, or none behind it.
#[test]
fn an_edge_at_a_masked_pin_is_neither_delivered_nor_held_pending() {
    let mut ioapic = with(4, MASKED | 0x31);
    ioapic.edge(4);
    write(&mut ioapic, low(4), 0x31);
    assert_eq!(messages(&mut ioapic), []);
    ioapic.edge(4);
    ioapic.edge(4);
    let expected = Ipi {
        vector: 0x31,
        mode: DeliveryMode::Fixed,
        destination: Destination::Physical(3),
        assert: true,
        trigger: Trigger::Edge,
    };
    assert_eq!(messages(&mut ioapic), [(4, expected)], "a local APIC holds a vector once");
    // No EOI is awaited.
    ioapic.edge(4);
    assert_eq!(vectors(&mut ioapic), [0x31]);
}

// Catches: a line that is taken for an edge, or the other way round.
#[test]
fn edge_triggered_entries_do_not_look_at_the_line() {
    let mut ioapic = with(4, 0x31);
    ioapic.set_line(4, true);
    write(&mut ioapic, low(4), 0x31);
    ioapic.set_line(4, true);
    assert_eq!(messages(&mut ioapic), []);
}

// Catches: a level-triggered interrupt that is lost, or sent again before its EOI. "Level-asserts or negates occurring
// on a masked level-sensitive pin are also ignored and have no side effects": the level counts when it is unmasked.
#[test]
fn a_level_interrupts_until_it_is_gone_and_once_for_each_eoi() {
    let mut ioapic = with(9, MASKED | LEVEL | 0x40);
    ioapic.set_line(9, true);
    assert_eq!(messages(&mut ioapic), []);
    write(&mut ioapic, low(9), LEVEL | 0x40);
    let sent = messages(&mut ioapic);
    assert_eq!((sent.len(), sent[0].1.trigger), (1, Trigger::Level));
    assert_eq!(read(&mut ioapic, low(9)), LEVEL | REMOTE_IRR | 0x40);
    ioapic.set_line(9, false);
    ioapic.set_line(9, true);
    assert_eq!(messages(&mut ioapic), [], "its EOI is awaited");
    ioapic.end_of_interrupt(0x41);
    assert_eq!(messages(&mut ioapic), [], "of another vector");
    ioapic.end_of_interrupt(0x40);
    assert_eq!(vectors(&mut ioapic), [0x40], "still active");
    ioapic.set_line(9, false);
    ioapic.end_of_interrupt(0x40);
    assert_eq!(messages(&mut ioapic), []);
    assert_eq!(read(&mut ioapic, low(9)), LEVEL | 0x40);
}

// Catches: one pin of two with the same vector that waits for ever.
#[test]
fn an_eoi_is_for_every_pin_with_its_vector() {
    let mut ioapic = with(9, LEVEL | 0x40);
    write(&mut ioapic, high(10), 3 << 24);
    write(&mut ioapic, low(10), LEVEL | 0x40);
    ioapic.set_line(9, true);
    ioapic.set_line(10, true);
    assert_eq!(vectors(&mut ioapic), [0x40, 0x40]);
    ioapic.end_of_interrupt(0x40);
    assert_eq!(vectors(&mut ioapic), [0x40, 0x40]);
}

// Catches: a pin that is dead after its message went to a CPU that is not there, or to one whose LAPIC is disabled.
#[test]
fn a_level_that_nobody_accepted_awaits_no_eoi() {
    let mut ioapic = with(9, LEVEL | 0x40);
    ioapic.set_line(9, true);
    assert_eq!(vectors(&mut ioapic), [0x40]);
    ioapic.not_accepted(9);
    assert_eq!(read(&mut ioapic, low(9)), LEVEL | 0x40);
    assert_eq!(messages(&mut ioapic), [], "not at once: that would never end");
    write(&mut ioapic, high(9), 4 << 24);
    assert_eq!(vectors(&mut ioapic), [0x40]);
}

// Catches: a Remote IRR that operating systems cannot clear. With version 0x11 Linux ends a lost interrupt by making
// the entry edge-triggered and back (`__eoi_ioapic_pin` in arch/x86/kernel/apic/io_apic.c).
#[test]
fn an_entry_that_becomes_edge_triggered_loses_its_remote_irr() {
    let mut ioapic = with(9, LEVEL | 0x40);
    ioapic.set_line(9, true);
    assert_eq!(vectors(&mut ioapic), [0x40]);
    write(&mut ioapic, low(9), MASKED | LEVEL | 0x40);
    assert_eq!(read(&mut ioapic, low(9)), MASKED | LEVEL | REMOTE_IRR | 0x40, "masking does not clear it");
    write(&mut ioapic, low(9), MASKED | 0x40);
    write(&mut ioapic, low(9), MASKED | LEVEL | 0x40);
    assert_eq!(read(&mut ioapic, low(9)), MASKED | LEVEL | 0x40);
    write(&mut ioapic, low(9), LEVEL | 0x40);
    assert_eq!(vectors(&mut ioapic), [0x40]);
}

// Catches: a message of another kind or to other CPUs than the entry says. "NMI: … treated as an edge triggered
// interrupt, even if it is programmed as a level triggered interrupt."
#[test]
fn modes_and_destinations_are_the_entrys() {
    let sent = |low_bits: u32, to: u32| {
        let mut ioapic = Ioapic::default();
        write(&mut ioapic, high(2), to << 24);
        write(&mut ioapic, low(2), low_bits);
        ioapic.edge(2);
        let would_send = ioapic.would_send(2);
        let message = ioapic.take_message().map(|(_, message)| (message.mode, message.destination, message.trigger));
        (would_send, message)
    };
    for (mode, expected) in [
        (0, Some(DeliveryMode::Fixed)),
        (1, Some(DeliveryMode::LowestPriority)),
        (2, Some(DeliveryMode::Smi)),
        (3, None),
        (4, Some(DeliveryMode::Nmi)),
        (5, Some(DeliveryMode::Init)),
        (6, None),
        (7, None),
    ] {
        let to = Destination::Physical(5);
        let expected = expected.map(|mode| (mode, to, Trigger::Edge));
        assert_eq!(sent(mode << 8 | 0x31, 5), (expected.map(|(mode, to, _)| (mode, to)), expected), "mode {mode}");
    }
    let nmi = sent(LEVEL | 4 << 8, 5).1;
    assert_eq!(nmi, Some((DeliveryMode::Nmi, Destination::Physical(5), Trigger::Edge)));
    let logical = 1 << 11;
    for (bits, to, expected) in [
        (0x31, 0xff, Destination::Everyone),
        (logical | 0x31, 0xff, Destination::Logical(0xff)),
        (logical | 0x31, 0x0a, Destination::Logical(0x0a)),
    ] {
        assert_eq!(sent(bits, to).1.map(|(_, to, _)| to), Some(expected));
    }
}

// Catches: a request, a Remote IRR or an ID that a restore loses, and a file that brings it where no guest can.
#[test]
fn a_saved_state_goes_on_and_an_impossible_one_is_refused() {
    let mut ioapic = with(9, LEVEL | 0x40);
    ioapic.set_line(9, true);
    assert_eq!(vectors(&mut ioapic), [0x40]);
    write(&mut ioapic, low(4), 0x31);
    ioapic.edge(4);
    let state = ioapic.state();
    let mut restored = Ioapic::from_state(&state).unwrap();
    assert_eq!(restored.state(), state);
    assert_eq!(vectors(&mut restored), [0x31]);
    restored.set_line(9, true);
    assert_eq!(messages(&mut restored), []);
    restored.end_of_interrupt(0x40);
    assert_eq!(vectors(&mut restored), [0x40]);
    assert_eq!(Ioapic::from_state(&IoapicState::default()).map(|it| it.state()), Some(IoapicState::default()));
    let with_entry = |bits| {
        let mut state = state;
        state.table[0] = bits;
        state
    };
    for impossible in [
        IoapicState { id: 16, ..state },
        IoapicState { requests: 1 << 24, ..state },
        // Delivery status; a reserved bit of each half; Remote IRR of an edge, and of an NMI.
        with_entry(1 << 12),
        with_entry(1 << 17),
        with_entry(1 << 55),
        with_entry(1 << 14),
        with_entry(1 << 14 | 1 << 15 | 4 << 8),
    ] {
        assert!(Ioapic::from_state(&impossible).is_none(), "{impossible:x?}");
    }
}
