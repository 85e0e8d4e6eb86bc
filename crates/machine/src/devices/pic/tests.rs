use proptest::prelude::*;

use super::*;

/// Vectors 0x20 and 0x28, nothing masked.
fn open() -> Pic {
    let mut pic = Pic::initialized([0x20, 0x28]);
    pic.write(0x21, 0);
    pic.write(0xa1, 0);
    pic
}

#[test]
fn after_power_up_and_masked_nothing_interrupts() {
    let mut pic = Pic::default();
    let mut masked = open();
    masked.write(0x21, 0xff);
    masked.write(0xa1, 0xff);
    for irq in 0..16 {
        pic.edge(irq);
        masked.edge(irq);
    }
    assert!(!pic.interrupts() && !masked.interrupts());
    assert_eq!((masked.read(0x21), masked.read(0xa1)), (0xff, 0xff));
    // A request that came while the input was masked is not lost.
    masked.write(0x21, 0xfe);
    assert!(masked.interrupts());
    assert_eq!(masked.acknowledge(), 0x20);
}

#[test]
fn priorities_nest_and_end_by_eoi() {
    let mut pic = open();
    pic.edge(3);
    pic.edge(12);
    assert_eq!(pic.acknowledge(), 0x2c, "input 2, so the second chip, is before 3");
    assert!(!pic.interrupts(), "3 waits for 12 to end");
    pic.edge(1);
    assert_eq!(pic.acknowledge(), 0x21, "1 nests");
    pic.write(0x20, 0x20);
    pic.write(0xa0, 0x20);
    pic.write(0x20, 0x20);
    assert_eq!(pic.acknowledge(), 0x23);
}

#[test]
fn nothing_to_acknowledge_is_spurious() {
    let mut pic = open();
    assert_eq!(pic.acknowledge(), 0x27);
    pic.write(0x20, 0x0b);
    assert_eq!(pic.read(0x20), 0, "and not in service");
}

#[test]
fn special_mask_mode_lets_lower_ones_through() {
    let mut pic = open();
    pic.edge(0);
    assert_eq!(pic.acknowledge(), 0x20);
    pic.edge(5);
    assert!(!pic.interrupts());
    pic.write(0x21, 1);
    assert!(!pic.interrupts(), "the mask alone does not");
    pic.write(0x20, 0x68);
    assert_eq!(pic.acknowledge(), 0x25);
}

#[test]
fn rotation_makes_the_served_one_the_lowest() {
    let mut pic = open();
    pic.edge(0);
    assert_eq!(pic.acknowledge(), 0x20);
    pic.write(0x20, 0xa0);
    pic.edge(0);
    pic.edge(1);
    assert_eq!(pic.acknowledge(), 0x21);
}

#[test]
fn a_poll_acknowledges() {
    let mut pic = open();
    pic.edge(4);
    pic.write(0x20, 0x0c);
    assert_eq!(pic.read(0x20), 0x84);
    pic.write(0x20, 0x0c);
    assert_eq!(pic.read(0x20), 0);
    pic.write(0x20, 0x0b);
    assert_eq!(pic.read(0x20), 0x10, "in service");
}

proptest! {
    // Whatever a guest does to the ports: no panic, vectors are the programmed ones, and a snapshot is the same pair.
    #[test]
    fn random_guests(ops in prop::collection::vec((0u8..7, any::<u8>()), 0..200)) {
        let mut pic = Pic::default();
        for (what, value) in ops {
            match what {
                0 => pic.write(0x20, value),
                1 => pic.write(0x21, value),
                2 => pic.write(0xa0, value),
                3 => pic.write(0xa1, value),
                4 => pic.edge(value),
                5 => drop(pic.read(0x20 + u16::from(value & 0x81))),
                _ => {
                    let interrupts = pic.interrupts();
                    let vector = pic.acknowledge();
                    let state = pic.state();
                    prop_assert!([state.first.vector, state.second.vector].contains(&(vector & !7)));
                    prop_assert!(interrupts || vector & 7 == 7);
                }
            }
            let again = Pic::from_state(&pic.state());
            prop_assert_eq!(again.map(|pic| pic.state()), Some(pic.state()));
        }
    }
}
