//! The interrupt command register, decoded into a value.
//!
//! Delivery between CPUs is not here: an APIC knows only itself. It delivers what provably concerns itself alone and
//! hands out the rest for whoever holds all the CPUs.

use serde::{Deserialize, Serialize};

use super::LocalApic;
use super::base::Mode;
use super::registers::{self, Door};
use super::vectors::low_byte;

/// ICR bit 12, read-only. It reads 0, idle: a message is gone when the write returns.
pub(super) const DELIVERY_STATUS: u32 = 1 << 12;

/// How a message interrupts its destination (SDM vol. 3, "Interrupt Command Register (ICR)", delivery mode). The two
/// reserved encodings send nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeliveryMode {
    /// The vector, to every destination.
    Fixed,
    /// The vector, to the one destination that runs at the lowest priority.
    LowestPriority,
    /// A system management interrupt.
    Smi,
    /// A non-maskable interrupt; the vector is ignored.
    Nmi,
    /// INIT, or INIT level de-assert when [`Ipi::assert`] is false and the trigger is level.
    Init,
    /// A start-up IPI: the destination starts at the page that the vector names.
    StartUp,
}

/// Which CPUs a message is for: shorthand, destination mode and destination together, because a shorthand makes the
/// other two meaningless.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Destination {
    /// The sender (shorthand).
    Itself,
    /// Every CPU with the sender: the shorthand, or a broadcast destination.
    Everyone,
    /// Every CPU except the sender (shorthand).
    Others,
    /// The CPU with this APIC ID.
    Physical(u32),
    /// The CPUs whose logical destination matches: a message destination address of 8 bits in xAPIC mode, cluster and
    /// bit set in x2APIC mode.
    Logical(u32),
}

/// Trigger mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Trigger {
    /// Edge.
    Edge,
    /// Level; only INIT heeds it.
    Level,
}

/// An inter-processor interrupt that a guest sent (SDM vol. 3, "Issuing Interprocessor Interrupts").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ipi {
    /// The vector, or for [`DeliveryMode::StartUp`] the number of a 4 KiB page.
    pub vector: u8,
    /// What it does at its destination.
    pub mode: DeliveryMode,
    /// For whom it is.
    pub destination: Destination,
    /// ICR's level bit: false only for INIT level de-assert.
    pub assert: bool,
    /// ICR's trigger mode bit.
    pub trigger: Trigger,
}

impl Ipi {
    /// What writing `icr` sends; the xAPIC's destination is in bits 63:56, the x2APIC's in 63:32.
    pub(super) fn decode(icr: u64, door: Door) -> Option<Self> {
        let (low, high) = registers::split(icr);
        let mode = match low >> 8 & 0b111 {
            0b000 => DeliveryMode::Fixed,
            0b001 => DeliveryMode::LowestPriority,
            0b010 => DeliveryMode::Smi,
            0b100 => DeliveryMode::Nmi,
            0b101 => DeliveryMode::Init,
            0b110 => DeliveryMode::StartUp,
            _ => return None,
        };
        let logical = low & 1 << 11 != 0;
        let to = match door {
            Door::XApic => high >> 24,
            Door::X2Apic => high,
        };
        let destination = match (low >> 18 & 0b11, door) {
            (0b01, _) => Destination::Itself,
            (0b10, _) => Destination::Everyone,
            (0b11, _) => Destination::Others,
            // A logical 0xff is a broadcast only under the receivers' DFR, so that they have to judge it.
            (_, Door::XApic) if to == 0xff && !logical => Destination::Everyone,
            (_, Door::X2Apic) if to == u32::MAX => Destination::Everyone,
            _ if logical => Destination::Logical(to),
            _ => Destination::Physical(to),
        };
        Some(Self {
            vector: low_byte(low),
            mode,
            destination,
            assert: low & 1 << 14 != 0,
            trigger: if low & 1 << 15 != 0 { Trigger::Level } else { Trigger::Edge },
        })
    }

    /// What writing `value` to the SELF IPI register sends (SDM vol. 3, "SELF IPI Register": as a fixed, edge-triggered
    /// ICR write with the self shorthand).
    pub(super) const fn to_self(value: u32) -> Self {
        Self {
            vector: low_byte(value),
            mode: DeliveryMode::Fixed,
            destination: Destination::Itself,
            assert: true,
            trigger: Trigger::Edge,
        }
    }
}

/// The logical x2APIC ID (SDM vol. 3, "Deriving Logical x2APIC ID from the Local x2APIC ID").
pub(super) const fn x2apic_ldr(id: u32) -> u32 {
    (id >> 4) << 16 | 1 << (id & 0xf)
}

impl LocalApic {
    /// Whether a message for `destination` is for this CPU; `from_itself` says that this CPU sent it.
    ///
    /// Whoever delivers an [`Effects::ipi`](super::Effects::ipi) asks every CPU, the sender included.
    #[must_use]
    pub fn addressed_by(&self, destination: Destination, from_itself: bool) -> bool {
        let mode = self.base.mode();
        if mode == Mode::Disabled {
            return false;
        }
        match destination {
            Destination::Itself => from_itself,
            Destination::Everyone => true,
            Destination::Others => !from_itself,
            Destination::Physical(id) => id == self.visible_id(),
            Destination::Logical(to) if mode == Mode::X2Apic => {
                let own = x2apic_ldr(self.config.id);
                to >> 16 == own >> 16 && to & own & 0xffff != 0
            }
            Destination::Logical(to) => self.matches_flat_or_cluster(to),
        }
    }

    /// SDM vol. 3, "Logical Destination Mode": DFR chooses between a flat mask and cluster plus mask.
    const fn matches_flat_or_cluster(&self, to: u32) -> bool {
        let own = self.ldr >> 24;
        match self.dfr >> 28 {
            0b1111 => to & own != 0,
            0b0000 => to == 0xff || ((to >> 4 == own >> 4 || to >> 4 == 0xf) && to & own & 0xf != 0),
            _ => false,
        }
    }

    /// Whether a message can be for nobody else. An xAPIC logical ID is whatever each guest CPU wrote into its LDR, so
    /// that two CPUs may share one: never true for it.
    pub(super) fn is_sole_destination(&self, destination: Destination) -> bool {
        match destination {
            Destination::Itself => true,
            Destination::Physical(_) => self.addressed_by(destination, true),
            Destination::Logical(to) => self.base.mode() == Mode::X2Apic && to == x2apic_ldr(self.config.id),
            Destination::Everyone | Destination::Others => false,
        }
    }

    /// The APIC ID as the open door shows it: 8 bits wide in the xAPIC.
    pub(super) fn visible_id(&self) -> u32 {
        if self.base.mode() == Mode::X2Apic { self.config.id } else { self.config.id & 0xff }
    }
}
