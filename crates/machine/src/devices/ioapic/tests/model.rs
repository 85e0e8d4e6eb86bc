//! The same rules a second time, without bits: an entry is its fields, and a message is sent at once into a list.
//! Random accesses and devices must read and send the same in both.

use proptest::prelude::*;

use super::{super::*, SELECT, WINDOW, messages};

/// One entry.
#[derive(Clone, Copy, Debug, Default)]
struct Fields {
    vector: u8,
    mode: u8,
    logical: bool,
    low_active: bool,
    remote_irr: bool,
    level: bool,
    masked: bool,
    to: u8,
    /// The device interrupts.
    line: bool,
}

impl Fields {
    /// Whether it is a level that counts: of a vector.
    fn is_level(self) -> bool {
        self.level && self.mode < 2
    }

    /// The message, if the pin is active; then an EOI is awaited.
    fn fire(&mut self, pin: u8, sent: &mut Vec<(u8, Ipi)>) {
        let modes = [
            Some(DeliveryMode::Fixed),
            Some(DeliveryMode::LowestPriority),
            Some(DeliveryMode::Smi),
            None,
            Some(DeliveryMode::Nmi),
            Some(DeliveryMode::Init),
            None,
            None,
        ];
        let Some(mode) = modes[usize::from(self.mode)] else { return };
        if self.masked || self.remote_irr {
            return;
        }
        self.remote_irr = self.is_level();
        let destination = match (self.logical, self.to) {
            (true, to) => Destination::Logical(to.into()),
            (false, 255) => Destination::Everyone,
            (false, to) => Destination::Physical(to.into()),
        };
        let trigger = if self.is_level() { Trigger::Level } else { Trigger::Edge };
        sent.push((pin, Ipi { vector: self.vector, mode, destination, assert: true, trigger }));
    }

    fn look(&mut self, pin: u8, sent: &mut Vec<(u8, Ipi)>) {
        if self.is_level() && self.line {
            self.fire(pin, sent);
        }
    }
}

struct Model {
    select: u8,
    id: u8,
    pins: [Fields; 24],
}

impl Model {
    fn read(&self) -> u32 {
        match self.select {
            0 | 2 => u32::from(self.id) << 24,
            1 => 0x0017_0011,
            register @ 0x10..0x40 => {
                let pin = self.pins[usize::from(register - 0x10) / 2];
                if register % 2 == 1 {
                    return u32::from(pin.to) << 24;
                }
                let flags =
                    [(pin.logical, 11), (pin.low_active, 13), (pin.remote_irr, 14), (pin.level, 15), (pin.masked, 16)];
                let flags: u32 = flags.iter().map(|(on, bit)| u32::from(*on) << bit).sum();
                u32::from(pin.vector) + (u32::from(pin.mode) << 8) + flags
            }
            _ => u32::MAX,
        }
    }

    fn write(&mut self, value: u32, sent: &mut Vec<(u8, Ipi)>) {
        let bit = |bit: u32| value >> bit & 1 == 1;
        match self.select {
            0 => self.id = (value >> 24 & 0xf) as u8,
            register @ 0x10..0x40 => {
                let number = (register - 0x10) / 2;
                let pin = &mut self.pins[usize::from(number)];
                if register % 2 == 1 {
                    pin.to = (value >> 24) as u8;
                } else {
                    (pin.vector, pin.mode) = ((value & 0xff) as u8, (value >> 8 & 7) as u8);
                    (pin.logical, pin.low_active, pin.level, pin.masked) = (bit(11), bit(13), bit(15), bit(16));
                    pin.remote_irr &= pin.is_level();
                }
                pin.look(number, sent);
            }
            _ => {}
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Op {
    Select(u8),
    Write(u32),
    Edge(u8),
    Line(u8, bool),
    Eoi(u8),
    Saved,
}

/// Few pins and vectors, so that they meet.
fn op() -> impl Strategy<Value = Op> {
    let pin = prop_oneof![Just(0u8), Just(2), Just(4), Just(23)];
    let register = prop_oneof![
        pin.clone().prop_map(|pin| 0x10 + 2 * pin),
        pin.clone().prop_map(|pin| 0x11 + 2 * pin),
        any::<u8>()
    ];
    let entry = (0x30u32..0x33, 0u32..8, any::<[bool; 5]>()).prop_map(|(vector, mode, [a, b, c, d, rare])| {
        let flags = u32::from(a) << 11 | u32::from(b) << 13 | u32::from(c) << 15 | u32::from(rare && d) << 16;
        vector | flags | if d { 0 } else { mode << 8 }
    });
    prop_oneof![
        3 => register.prop_map(Op::Select),
        4 => entry.prop_map(Op::Write),
        1 => any::<u32>().prop_map(Op::Write),
        2 => pin.clone().prop_map(Op::Edge),
        3 => (pin, any::<bool>()).prop_map(|(pin, line)| Op::Line(pin, line)),
        3 => (0x30u8..0x33).prop_map(Op::Eoi),
        1 => Just(Op::Saved),
    ]
}

proptest! {
    // Catches: a rule that holds alone and not after others, and a state that a guest can reach and not save.
    #[test]
    fn random_accesses_do_what_the_rules_say(ops in prop::collection::vec(op(), 1..120)) {
        let mut ioapic = Ioapic::default();
        let masked = Fields { masked: true, ..Fields::default() };
        let mut model = Model { select: 0, id: 0, pins: [masked; 24] };
        for op in ops {
            let mut expected = Vec::new();
            match op {
                Op::Select(register) => {
                    ioapic.write(SELECT, &[register, 0, 0, 0]);
                    model.select = register;
                }
                Op::Write(value) => {
                    ioapic.write(WINDOW, &value.to_le_bytes());
                    model.write(value, &mut expected);
                }
                Op::Edge(pin) => {
                    ioapic.edge(pin);
                    model.pins[usize::from(pin)].fire(pin, &mut expected);
                }
                Op::Line(pin, line) => {
                    ioapic.set_line(pin, line);
                    let fields = &mut model.pins[usize::from(pin)];
                    fields.line = line;
                    fields.look(pin, &mut expected);
                }
                Op::Eoi(vector) => {
                    ioapic.end_of_interrupt(vector);
                    for (pin, fields) in (0..).zip(&mut model.pins) {
                        if fields.vector == vector && fields.remote_irr {
                            fields.remote_irr = false;
                            fields.look(pin, &mut expected);
                        }
                    }
                }
                Op::Saved => {
                    ioapic = Ioapic::from_state(&ioapic.state()).expect("a state that a guest has reached");
                    for (pin, fields) in (0..).zip(&model.pins) {
                        ioapic.set_line(pin, fields.line);
                    }
                }
            }
            prop_assert_eq!(messages(&mut ioapic), expected);
            let mut data = [0; 4];
            ioapic.read(WINDOW, &mut data);
            prop_assert_eq!(u32::from_le_bytes(data), model.read());
        }
    }
}
