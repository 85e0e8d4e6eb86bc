//! The pair of 8259A interrupt controllers (Intel, "8259A Programmable Interrupt Controller"), connected as in a PC:
//! the second's output is input 2 of the first, whose output is LINT0 of the first CPU's local APIC.
//!
//! Inputs are edge-triggered, because no device here has a level-triggered interrupt. So there is no edge/level
//! register.

use serde::{Deserialize, Serialize};

/// Command and data port of each chip.
const FIRST: u16 = 0x20;
const SECOND: u16 = 0xa0;
/// The input of the first chip that the second's output is connected to.
const CASCADE: u8 = 2;

/// ICW1: begins an initialisation; bit 1 says that there is no second chip, bit 0 that ICW4 follows.
const ICW1: u8 = 1 << 4;
const ICW1_SINGLE: u8 = 1 << 1;
const ICW1_ICW4: u8 = 1 << 0;
/// ICW4: automatic end of interrupt, special fully nested mode.
const ICW4_AUTO_EOI: u8 = 1 << 1;
const ICW4_SPECIAL_NESTED: u8 = 1 << 4;
/// OCW3 and its fields: special mask mode, poll, which register the command port reads.
const OCW3: u8 = 1 << 3;
const OCW3_SPECIAL_MASK: u8 = 1 << 6;
const OCW3_SPECIAL_MASK_ON: u8 = 1 << 5;
const OCW3_POLL: u8 = 1 << 2;
const OCW3_READ: u8 = 1 << 1;
const OCW3_READ_ISR: u8 = 1 << 0;

/// The next byte that the data port expects.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Expects {
    /// The mask, as in operation.
    #[default]
    Mask,
    /// ICW2, the first vector.
    Vector,
    /// ICW3, the wiring of the two chips. Its value is ignored, because the wiring is fixed.
    Wiring,
    /// ICW4, modes.
    Modes,
}

/// One chip, as a snapshot holds it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChipState {
    /// Interrupt request register, without the second chip's request.
    pub irr: u8,
    /// In-service register.
    pub isr: u8,
    /// Interrupt mask register.
    pub imr: u8,
    /// Vector of input 0; a multiple of 8.
    pub vector: u8,
    /// The input of lowest priority.
    pub lowest: u8,
    /// The next byte that the data port expects.
    pub expects: Expects,
    /// From ICW1: there is no second chip.
    pub single: bool,
    /// From ICW1: ICW4 follows.
    pub icw4: bool,
    /// The command port reads ISR.
    pub reads_isr: bool,
    /// The next read is a poll.
    pub poll: bool,
    /// Special mask mode.
    pub special_mask: bool,
    /// Special fully nested mode.
    pub special_nested: bool,
    /// Automatic end of interrupt.
    pub auto_eoi: bool,
    /// Rotation of priorities at an automatic end of interrupt.
    pub rotates: bool,
}

/// The pair, as a snapshot holds it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PicState {
    /// The chip that is connected to the CPU.
    pub first: ChipState,
    /// The chip that is connected to the first.
    pub second: ChipState,
}

/// One chip. All of its state is saved.
#[derive(Clone, Copy, Debug)]
struct Chip(ChipState);

/// Which port of a chip.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Port {
    Command,
    Data,
}

impl Chip {
    /// The unmasked requests. `cascaded` is the request of the chip at input 2.
    fn requests(&self, cascaded: bool) -> u8 {
        (self.0.irr | if cascaded { 1 << CASCADE } else { 0 }) & !self.0.imr
    }

    /// How far `input` is from the highest priority.
    fn rank(&self, input: u8) -> u8 {
        input.wrapping_sub(self.0.lowest).wrapping_sub(1) & 7
    }

    /// The input of highest priority among `inputs`.
    fn first_of(&self, inputs: u8) -> Option<u8> {
        (0..8).filter(|input| inputs & 1 << input != 0).min_by_key(|input| self.rank(*input))
    }

    /// The input whose request interrupts: it must have a higher priority than all inputs in service.
    fn pending(&self, cascaded: bool) -> Option<u8> {
        let input = self.first_of(self.requests(cascaded))?;
        let mut serving = self.0.isr;
        if self.0.special_mask {
            serving &= !self.0.imr;
        }
        if self.0.special_nested && input == CASCADE {
            // "A slave with a higher priority interrupt is not locked out by the master's priority logic".
            serving &= !(1 << CASCADE);
        }
        self.first_of(serving).is_none_or(|serving| self.rank(input) < self.rank(serving)).then_some(input)
    }

    /// Acknowledges the pending interrupt, and returns its input; none if there is none any more.
    fn acknowledge(&mut self, cascaded: bool) -> Option<u8> {
        let input = self.pending(cascaded)?;
        self.0.irr &= !(1 << input);
        if !self.0.auto_eoi {
            self.0.isr |= 1 << input;
        } else if self.0.rotates {
            self.0.lowest = input;
        }
        Some(input)
    }

    fn vector(&self, input: Option<u8>) -> u8 {
        // "If the IR input goes inactive before INTA, the 8259A will issue an interrupt level 7."
        self.0.vector | input.unwrap_or(7) & 7
    }

    /// Ends the interrupt at `input`, and gives it the lowest priority if `rotate`.
    fn end(&mut self, input: Option<u8>, rotate: bool) {
        let Some(input) = input else { return };
        self.0.isr &= !(1 << input);
        if rotate {
            self.0.lowest = input;
        }
    }

    fn write(&mut self, port: Port, value: u8) {
        match (port, self.0.expects) {
            (Port::Command, _) if value & ICW1 != 0 => {
                self.0 = ChipState {
                    vector: self.0.vector,
                    lowest: 7,
                    expects: Expects::Vector,
                    single: value & ICW1_SINGLE != 0,
                    icw4: value & ICW1_ICW4 != 0,
                    ..ChipState::default()
                };
            }
            (Port::Command, _) if value & OCW3 != 0 => self.ocw3(value),
            (Port::Command, _) => self.ocw2(value),
            (Port::Data, Expects::Mask) => self.0.imr = value,
            (Port::Data, Expects::Vector) => {
                self.0.vector = value & !7;
                self.0.expects = match (self.0.single, self.0.icw4) {
                    (false, _) => Expects::Wiring,
                    (true, true) => Expects::Modes,
                    (true, false) => Expects::Mask,
                };
            }
            (Port::Data, Expects::Wiring) => {
                self.0.expects = if self.0.icw4 { Expects::Modes } else { Expects::Mask };
            }
            (Port::Data, Expects::Modes) => {
                self.0.auto_eoi = value & ICW4_AUTO_EOI != 0;
                self.0.special_nested = value & ICW4_SPECIAL_NESTED != 0;
                self.0.expects = Expects::Mask;
            }
        }
    }

    fn ocw2(&mut self, value: u8) {
        let named = Some(value & 7);
        let serving = self.first_of(self.0.isr);
        match value >> 5 {
            0b000 => self.0.rotates = false,
            0b001 => self.end(serving, false),
            0b011 => self.end(named, false),
            0b100 => self.0.rotates = true,
            0b101 => self.end(serving, true),
            0b110 => self.0.lowest = value & 7,
            0b111 => self.end(named, true),
            _ => {}
        }
    }

    fn ocw3(&mut self, value: u8) {
        if value & OCW3_SPECIAL_MASK != 0 {
            self.0.special_mask = value & OCW3_SPECIAL_MASK_ON != 0;
        }
        self.0.poll = value & OCW3_POLL != 0;
        if value & OCW3_READ != 0 {
            self.0.reads_isr = value & OCW3_READ_ISR != 0;
        }
    }

    fn read(&mut self, port: Port, cascaded: bool) -> u8 {
        if std::mem::take(&mut self.0.poll) {
            return self.acknowledge(cascaded).map_or(0, |input| 1 << 7 | input);
        }
        match port {
            Port::Data => self.0.imr,
            Port::Command if self.0.reads_isr => self.0.isr,
            Port::Command => self.0.irr | if cascaded { 1 << CASCADE } else { 0 },
        }
    }

    fn is_valid(state: &ChipState) -> bool {
        state.vector.is_multiple_of(8) && state.lowest < 8
    }
}

/// The pair.
#[derive(Clone, Copy, Debug)]
pub struct Pic {
    first: Chip,
    second: Chip,
}

impl Default for Pic {
    /// After power-up. The chips have not been initialised, and all inputs are masked.
    fn default() -> Self {
        let chip = Chip(ChipState { imr: 0xff, lowest: 7, ..ChipState::default() });
        Self { first: chip, second: chip }
    }
}

impl Pic {
    /// Initialised as by a PC's firmware: with the `vectors` of the two chips, and all inputs masked but the timer's
    /// and the cascade.
    #[must_use]
    pub fn initialized(vectors: [u8; 2]) -> Self {
        let mut pic = Self::default();
        for (command, vector, mask) in [(FIRST, vectors[0], !(1 | 1 << CASCADE)), (SECOND, vectors[1], 0xff)] {
            pic.write(command, ICW1 | ICW1_ICW4);
            for value in [vector, 0, 1, mask] {
                pic.write(command + 1, value);
            }
        }
        pic
    }

    fn find(port: u16) -> Option<(bool, Port)> {
        match port {
            FIRST => Some((false, Port::Command)),
            0x21 => Some((false, Port::Data)),
            SECOND => Some((true, Port::Command)),
            0xa1 => Some((true, Port::Data)),
            _ => None,
        }
    }

    /// Whether `port` is one of the pair's.
    #[must_use]
    pub fn owns(port: u16) -> bool {
        Self::find(port).is_some()
    }

    /// OUT of a byte.
    pub fn write(&mut self, port: u16, value: u8) {
        match Self::find(port) {
            Some((false, port)) => self.first.write(port, value),
            Some((true, port)) => self.second.write(port, value),
            None => {}
        }
    }

    /// IN of a byte. A poll acknowledges.
    pub fn read(&mut self, port: u16) -> u8 {
        let cascaded = self.second_interrupts();
        match Self::find(port) {
            Some((false, port)) => self.first.read(port, cascaded),
            Some((true, port)) => self.second.read(port, false),
            None => 0xff,
        }
    }

    /// A rising edge at input `irq`, 0 to 15. Input 2 is the cascade, and is ignored.
    pub fn edge(&mut self, irq: u8) {
        match irq {
            CASCADE => {}
            0..8 => self.first.0.irr |= 1 << irq,
            8..16 => self.second.0.irr |= 1 << (irq - 8),
            _ => {}
        }
    }

    fn second_interrupts(&self) -> bool {
        self.second.pending(false).is_some()
    }

    /// The INT output, which is LINT0.
    #[must_use]
    pub fn interrupts(&self) -> bool {
        self.first.pending(self.second_interrupts()).is_some()
    }

    /// Whether an edge at input 0 to 7 of the first chip would make a new request: the input is not masked, and not
    /// requested yet.
    #[must_use]
    pub fn would_request(&self, irq: u8) -> bool {
        irq < 8 && (self.first.0.irr | self.first.0.imr) & 1 << irq == 0
    }

    /// Acknowledges the interrupt for the CPU (INTA), and returns its vector.
    pub fn acknowledge(&mut self) -> u8 {
        let cascaded = self.second_interrupts();
        match self.first.acknowledge(cascaded) {
            Some(CASCADE) if cascaded => {
                let input = self.second.acknowledge(false);
                self.second.vector(input)
            }
            input => self.first.vector(input),
        }
    }

    /// For a snapshot.
    #[must_use]
    pub fn state(&self) -> PicState {
        let Self { first: Chip(first), second: Chip(second) } = *self;
        PicState { first, second }
    }

    /// A pair with a saved state; none if a pair cannot have that state.
    #[must_use]
    pub fn from_state(state: &PicState) -> Option<Self> {
        let PicState { first, second } = *state;
        let valid = Chip::is_valid(&first) && Chip::is_valid(&second);
        valid.then_some(Self { first: Chip(first), second: Chip(second) })
    }
}

#[cfg(test)]
mod tests;
