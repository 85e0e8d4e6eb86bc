//! The interrupt command register, decoded into a value.
//!
//! Delivery between CPUs is not here: an APIC knows only itself. It delivers what concerns itself alone and returns the
//! rest to the VMM, which finds the destinations with `route` and calls their `deliver`.

use crate::{
    Interrupt, LocalApic, errors,
    registers::{self, Door},
    vectors::{FIRST_LEGAL, low_byte},
};

/// ICR bit 12, read-only. It reads 0, idle: a message is gone when the write returns.
pub(super) const DELIVERY_STATUS: u32 = 1 << 12;
/// ICR bit 14, level: assert.
const LEVEL_ASSERT: u32 = 1 << 14;
/// ICR bit 15, trigger mode: level.
const TRIGGER_LEVEL: u32 = 1 << 15;

/// How a message interrupts its destination (SDM vol. 3, "Interrupt Command Register (ICR)", delivery mode). The two
/// reserved encodings send nothing: 011b was remote read, which no current processor answers, and 111b, ExtINT, is for
/// I/O APICs and LINT pins. They are not reserved bits, so that neither door faults on them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trigger {
    /// Edge.
    Edge,
    /// Level. An ICR sends it with INIT level de-assert only; a device's message may be level-triggered too.
    Level,
}

/// An inter-processor interrupt that a guest sent (SDM vol. 3, "Issuing Interprocessor Interrupts"), or a device's
/// message in the same terms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ipi {
    /// The vector, or for [`DeliveryMode::StartUp`] the number of a 4 KiB page.
    pub vector: u8,
    /// What it does at its destination.
    pub mode: DeliveryMode,
    /// For whom it is.
    pub destination: Destination,
    /// False for INIT level de-assert.
    pub assert: bool,
    /// Level for INIT level de-assert.
    pub trigger: Trigger,
}

impl Ipi {
    /// What writing `icr` sends; the xAPIC's destination is in bits 63:56, the x2APIC's in 63:32.
    ///
    /// The level and trigger mode bits tell INIT from INIT level de-assert and have no other meaning: they "will always
    /// be issued" as assert and edge. The combinations of a shorthand and a delivery mode that "Valid Combinations for
    /// the Pentium 4 and Intel Xeon Processors' Local xAPIC Interrupt Command Register" calls invalid (self and all
    /// including self, with anything but fixed) are sent as they read: what else they should do is written nowhere, KVM
    /// does the same, and kvm-unit-tests' `init` sends INIT to itself.
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
            // A logical 0xff is a broadcast to receivers in xAPIC mode only, so that they have to judge it.
            (_, Door::XApic) if to == 0xff && !logical => Destination::Everyone,
            (_, Door::X2Apic) if to == u32::MAX => Destination::Everyone,
            _ if logical => Destination::Logical(to),
            _ => Destination::Physical(to),
        };
        let deassert = mode == DeliveryMode::Init && low & (LEVEL_ASSERT | TRIGGER_LEVEL) == TRIGGER_LEVEL;
        Some(Self {
            vector: low_byte(low),
            mode,
            destination,
            assert: !deassert,
            trigger: if deassert { Trigger::Level } else { Trigger::Edge },
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

impl LocalApic {
    /// Delivers a message that is for this CPU alone, or hands it back.
    ///
    /// Only the self shorthand says so for certain: an xAPIC's physical ID and logical ID are whatever each guest CPU
    /// wrote into its registers, so that two CPUs may share one. And only vectors are for the APIC: what NMI, SMI, INIT
    /// or start-up do, the CPU does.
    pub(super) fn send(&mut self, ipi: Ipi) -> Option<Ipi> {
        if !matches!(ipi.mode, DeliveryMode::Fixed | DeliveryMode::LowestPriority) {
            return Some(ipi);
        }
        if ipi.vector < FIRST_LEGAL {
            let _ = self.log_error(errors::SEND_ILLEGAL_VECTOR);
        }
        if ipi.destination != Destination::Itself {
            return Some(ipi);
        }
        self.accept(Interrupt { vector: ipi.vector, level: false });
        None
    }
}
