//! The I/O APIC (Intel, "82093AA I/O Advanced Programmable Interrupt Controller"): 24 pins, and for each an entry that
//! says which message an interrupt there sends, and to which local APICs.
//!
//! It sends nothing itself: what it has to send waits as a request until the caller takes it
//! ([`Ioapic::take_message`]). It is of version 0x11, as the 82093AA and KVM's: that of version 0x20 has an EOI
//! register besides, for local APICs that can suppress the broadcast of an EOI, and [`vlapic`]'s cannot.
//!
//! Where the datasheet leaves room it is as KVM's (Linux `arch/x86/kvm/ioapic.c`): polarity is kept and has no effect,
//! because a device here says whether it interrupts, and not whether its wire is high; an entry that becomes
//! edge-triggered loses its Remote IRR, by which operating systems end an interrupt without an EOI; ExtINT sends
//! nothing, because the 8259 pair is wired to LINT0 and to no pin.

mod entry;

use guest_abi::ioapic;
use serde::{Deserialize, Serialize};
use vlapic::{DeliveryMode, Destination, Ipi, Trigger};

use self::entry::Entry;

/// How many pins it has.
pub const PINS: usize = 24;
/// Guest physical addresses of I/O register select and I/O window.
const SELECT: u64 = ioapic::ADDRESS as u64 + ioapic::SELECT as u64;
const WINDOW: u64 = ioapic::ADDRESS as u64 + ioapic::WINDOW as u64;
/// The registers behind the window: ID, version, arbitration ID, and two for each entry.
const ID: u8 = 0;
const VERSION: u8 = 1;
const ARBITRATION: u8 = 2;
const TABLE: u8 = 0x10;
/// Version 0x11; bits 23:16 are the number of the last entry.
const VERSION_VALUE: u32 = 0x0017_0011;
/// An ID has four bits, 27:24 of its register.
const ID_SHIFT: u32 = 24;
const ID_MAX: u8 = 0xf;

/// The I/O APIC, as a snapshot holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IoapicState {
    /// The ID that the guest wrote.
    pub id: u8,
    /// The register select register.
    pub select: u8,
    /// The pins that have a message to send, a bit each.
    pub requests: u32,
    /// The redirection table, as it reads.
    pub table: [u64; PINS],
}

impl Default for IoapicState {
    /// After reset.
    fn default() -> Self {
        Self { id: 0, select: 0, requests: 0, table: [Entry::RESET.bits(); PINS] }
    }
}

/// The I/O APIC.
#[derive(Clone, Copy, Debug)]
pub struct Ioapic {
    id: u8,
    select: u8,
    requests: u32,
    table: [Entry; PINS],
    /// The pins at which a device interrupts now, a bit each. Only level-triggered entries look at it.
    lines: u32,
}

impl Default for Ioapic {
    /// After reset: every entry is masked.
    fn default() -> Self {
        Self { id: 0, select: 0, requests: 0, table: [Entry::RESET; PINS], lines: 0 }
    }
}

/// A pin's bit.
const fn bit(pin: u8) -> u32 {
    1u32.wrapping_shl(pin as u32)
}

impl Ioapic {
    /// Whether one of its registers is at `address`.
    #[must_use]
    pub const fn owns(address: u64) -> bool {
        matches!(address, SELECT | WINDOW)
    }

    fn entry(&self, pin: u8) -> Entry {
        self.table.get(usize::from(pin)).copied().unwrap_or(Entry::RESET)
    }

    fn set_entry(&mut self, pin: u8, entry: Entry) {
        if let Some(slot) = self.table.get_mut(usize::from(pin)) {
            *slot = entry;
        }
    }

    /// The pin and the half of its entry that the selected register is.
    fn selected(&self) -> Option<(u8, bool)> {
        let register = self.select.checked_sub(TABLE)?;
        let pin = register >> 1;
        (usize::from(pin) < PINS).then_some((pin, register & 1 != 0))
    }

    /// A guest reads `data.len()` bytes at `address`, a register. Of a register's four bytes a narrower access reads
    /// the low ones.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        let value = match (address, self.select, self.selected()) {
            (SELECT, _, _) => u32::from(self.select),
            (_, ID | ARBITRATION, _) => u32::from(self.id) << ID_SHIFT,
            (_, VERSION, _) => VERSION_VALUE,
            (_, _, Some((pin, high))) => self.entry(pin).half(high),
            // There is no such register.
            (_, _, None) => u32::MAX,
        };
        data.fill(0);
        for (to, from) in data.iter_mut().zip(value.to_le_bytes()) {
            *to = from;
        }
    }

    /// A guest writes `data` to `address`, a register; of a narrower access the missing bytes count as 0.
    pub fn write(&mut self, address: u64, data: &[u8]) {
        let mut bytes = [0; 4];
        for (to, from) in bytes.iter_mut().zip(data) {
            *to = *from;
        }
        let [low, _, _, high] = bytes;
        match (address, self.select, self.selected()) {
            (SELECT, _, _) => self.select = low,
            (_, ID, _) => self.id = high & ID_MAX,
            (_, _, Some((pin, half))) => {
                self.set_entry(pin, self.entry(pin).with_half(half, u32::from_le_bytes(bytes)));
                self.sample(pin);
            }
            // Read-only, or there is no such register.
            (_, _, None) => {}
        }
    }

    /// The device at `pin` interrupts: its line has risen, at least for a moment.
    ///
    /// "Edge-sensitive interrupts signaled on a masked interrupt pin are ignored (i.e., not delivered or held pending)"
    /// ("I/O Redirection Table Registers").
    pub fn edge(&mut self, pin: u8) {
        if self.entry(pin).would_send() {
            self.requests |= bit(pin);
        }
    }

    /// Whether the device at `pin` interrupts now.
    pub fn set_line(&mut self, pin: u8, active: bool) {
        self.lines = if active { self.lines | bit(pin) } else { self.lines & !bit(pin) };
        self.sample(pin);
    }

    /// Whether the entry of `pin` is level-triggered.
    #[must_use]
    pub fn is_level(&self, pin: u8) -> bool {
        self.entry(pin).is_level()
    }

    /// Requests the message of a level-triggered entry whose line is active, unless the EOI of the last one is awaited.
    fn sample(&mut self, pin: u8) {
        let entry = self.entry(pin);
        if entry.is_level() && self.lines & bit(pin) != 0 && entry.would_send() {
            self.requests |= bit(pin);
        }
    }

    /// What an edge at `pin` would send, and to which CPUs; none if it would send nothing.
    #[must_use]
    pub fn would_send(&self, pin: u8) -> Option<(DeliveryMode, Destination)> {
        let entry = self.entry(pin);
        entry.mode().filter(|_| entry.would_send()).map(|mode| (mode, entry.destination()))
    }

    /// Whether a message waits to be sent.
    #[must_use]
    pub const fn has_message(&self) -> bool {
        self.requests != 0
    }

    /// Takes a message that is to be sent, and the pin that it is from, the lowest first.
    ///
    /// The message of a level-triggered entry counts as accepted: if no local APIC accepts it, call
    /// [`Self::not_accepted`].
    pub fn take_message(&mut self) -> Option<(u8, Ipi)> {
        while self.requests != 0 {
            let pin = u8::try_from(self.requests.trailing_zeros()).ok()?;
            self.requests &= !bit(pin);
            let entry = self.entry(pin);
            // The guest may have masked it since.
            let Some(mode) = entry.mode().filter(|_| entry.would_send()) else { continue };
            let level = entry.is_level();
            if level {
                self.set_entry(pin, entry.with_remote_irr(true));
            }
            let trigger = if level { Trigger::Level } else { Trigger::Edge };
            let message = Ipi { vector: entry.vector(), mode, destination: entry.destination(), assert: true, trigger };
            return Some((pin, message));
        }
        None
    }

    /// No local APIC accepted the message from `pin`: "this bit is set to 1 when local APIC(s) accept the level
    /// interrupt sent by the IOAPIC" ("I/O Redirection Table Registers", Remote IRR). It is sent again when the entry
    /// is written or the line rises.
    pub fn not_accepted(&mut self, pin: u8) {
        self.set_entry(pin, self.entry(pin).with_remote_irr(false));
    }

    /// A local APIC has ended the level-triggered interrupt `vector`. "The Remote IRR bit is set to 0 when an EOI
    /// message with a matching interrupt vector is received from a local APIC"; what is still active then interrupts
    /// again.
    pub fn end_of_interrupt(&mut self, vector: u8) {
        for pin in (0..).take(PINS) {
            let entry = self.entry(pin);
            if entry.vector() == vector && entry.remote_irr() {
                self.set_entry(pin, entry.with_remote_irr(false));
                self.sample(pin);
            }
        }
    }

    /// For a snapshot. The lines are the devices' to tell again.
    #[must_use]
    pub fn state(&self) -> IoapicState {
        let Self { id, select, requests, table, lines: _ } = *self;
        IoapicState { id, select, requests, table: table.map(Entry::bits) }
    }

    /// One with a saved state, at which no device interrupts yet; none if it cannot have that state.
    #[must_use]
    pub fn from_state(state: &IoapicState) -> Option<Self> {
        let IoapicState { id, select, requests, table } = *state;
        let valid = id <= ID_MAX && requests >> PINS == 0 && table.iter().all(|bits| Entry::is_valid(*bits));
        valid.then(|| Self { id, select, requests, table: table.map(Entry::from_bits), lines: 0 })
    }
}

#[cfg(test)]
mod tests;
