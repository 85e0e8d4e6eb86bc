//! One entry of the redirection table ("I/O Redirection Table Registers").

use vlapic::{DeliveryMode, Destination};

/// Delivery mode.
const MODE_SHIFT: u32 = 8;
/// Destination mode: logical.
const LOGICAL: u64 = 1 << 11;
/// Remote IRR, read-only: a local APIC has accepted the level-triggered interrupt and not ended it yet.
const REMOTE_IRR: u64 = 1 << 14;
/// Trigger mode: level.
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
const DESTINATION_SHIFT: u32 = 56;
/// A physical destination that is every CPU.
const BROADCAST: u32 = 0xff;
/// What a guest may write: vector, delivery and destination mode, polarity (bit 13), trigger mode, mask, destination.
/// The delivery status (bit 12) reads 0, idle: a message is sent before the guest runs on.
const WRITABLE: u64 = 0xff00_0000_0001_afff;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry(u64);

impl Entry {
    /// After reset.
    pub(super) const RESET: Self = Self(MASKED);

    pub(super) const fn bits(self) -> u64 {
        self.0
    }

    /// Whether an entry can read as `bits`.
    pub(super) fn is_valid(bits: u64) -> bool {
        let entry = Self(bits);
        bits & !(WRITABLE | REMOTE_IRR) == 0 && (!entry.remote_irr() || entry.is_level())
    }

    pub(super) const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// Its low or high 32 bits.
    pub(super) fn half(self, high: bool) -> u32 {
        u32::try_from(if high { self.0 >> 32 } else { self.0 & u64::from(u32::MAX) }).unwrap_or(0)
    }

    /// After a write of one half.
    pub(super) fn with_half(self, high: bool, value: u32) -> Self {
        let (shift, other) = if high { (32, u64::from(u32::MAX)) } else { (0, !u64::from(u32::MAX)) };
        let written = Self((self.0 & other | u64::from(value) << shift) & WRITABLE);
        written.with_remote_irr(self.remote_irr() && written.is_level())
    }

    pub(super) const fn with_remote_irr(self, accepted: bool) -> Self {
        Self(if accepted { self.0 | REMOTE_IRR } else { self.0 & !REMOTE_IRR })
    }

    pub(super) const fn vector(self) -> u8 {
        let [vector, ..] = self.0.to_le_bytes();
        vector
    }

    /// What it sends; none for ExtINT and for the reserved modes.
    pub(super) const fn mode(self) -> Option<DeliveryMode> {
        match self.0 >> MODE_SHIFT & 0b111 {
            0b000 => Some(DeliveryMode::Fixed),
            0b001 => Some(DeliveryMode::LowestPriority),
            0b010 => Some(DeliveryMode::Smi),
            0b100 => Some(DeliveryMode::Nmi),
            0b101 => Some(DeliveryMode::Init),
            _ => None,
        }
    }

    pub(super) fn destination(self) -> Destination {
        match u32::try_from(self.0 >> DESTINATION_SHIFT).unwrap_or(BROADCAST) {
            to if self.0 & LOGICAL != 0 => Destination::Logical(to),
            BROADCAST => Destination::Everyone,
            to => Destination::Physical(to),
        }
    }

    /// Whether it is level-triggered. Only vectors are: an NMI "is treated as an edge triggered interrupt, even if it
    /// is programmed as a level triggered interrupt", and SMI and INIT must be programmed as edge-triggered.
    pub(super) fn is_level(self) -> bool {
        self.0 & LEVEL != 0 && matches!(self.mode(), Some(DeliveryMode::Fixed | DeliveryMode::LowestPriority))
    }

    pub(super) const fn remote_irr(self) -> bool {
        self.0 & REMOTE_IRR != 0
    }

    /// Whether an active line sends a message: the entry is not masked, its mode sends one, and no EOI is awaited.
    pub(super) const fn would_send(self) -> bool {
        self.0 & MASKED == 0 && self.mode().is_some() && !self.remote_irr()
    }
}
