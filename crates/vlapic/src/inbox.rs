//! What others have sent to a CPU that does not look: pending state, not a queue.
//!
//! A CPU's thread may not run for a while, and others go on sending. What their messages will do is kept, in a few
//! bytes however many they are, and when the CPU looks, it finds what it would have found had it taken them one by one.
//! So no message is ever lost for want of room. These rules make it so:
//!
//! - Vectors are a set, as in IRR: the same one twice is one. The last one's trigger mode counts, as in TMR. Illegal
//!   ones are kept as well, since the receiver logs them in its ESR.
//! - INIT discards what was pending before it: the receiver would take that first, and lose it to INIT.
//! - NMIs are counted up to two: one that enters, and one that waits for the end of its handler. More are merged there,
//!   as processors do.
//! - The first start-up message after INIT counts. A CPU that waits for one starts by it and ignores the others; one
//!   that does not wait ignores all.
//! - NMIs before and after that message are kept apart, since a CPU that waits for it takes no NMI.
//! - SMI and INIT level de-assert do nothing to a receiver here, and are not kept.
//!
//! They are taken in the order INIT, earlier NMIs, start-up, later NMIs, vectors. A vector's place among them does not
//! matter: it only changes the LAPIC, of which only INIT changes as much.

use crate::{
    DeliveryMode, Ipi,
    ipi::{Destination, Trigger},
    vectors::Vectors,
};

/// NMIs that can make a difference.
const MOST_NMIS: u8 = 2;

/// Messages that wait for one CPU. See the module's documentation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Inbox {
    init: bool,
    /// NMIs before [`Self::startup`], or without one.
    nmis: u8,
    /// The page number of the first start-up message since INIT.
    startup: Option<u8>,
    /// NMIs after it.
    later_nmis: u8,
    vectors: Vectors,
    /// Those of them that are level-triggered.
    level: Vectors,
}

impl Inbox {
    /// A message arrives that is for this CPU.
    pub fn post(&mut self, ipi: &Ipi) {
        let level = ipi.trigger == Trigger::Level;
        if level && !ipi.assert {
            return;
        }
        match ipi.mode {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority => {
                self.vectors.set(ipi.vector, true);
                self.level.set(ipi.vector, level);
            }
            DeliveryMode::Nmi => {
                let nmis = if self.startup.is_some() { &mut self.later_nmis } else { &mut self.nmis };
                *nmis = nmis.saturating_add(1).min(MOST_NMIS);
            }
            DeliveryMode::Init => *self = Self { init: true, ..Self::default() },
            DeliveryMode::StartUp => {
                self.startup.get_or_insert(ipi.vector);
            }
            DeliveryMode::Smi => {}
        }
    }

    /// Whether nothing waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// The next message for [`deliver`](crate::LocalApic::deliver); none when all are taken.
    pub fn take(&mut self) -> Option<Ipi> {
        let message =
            |mode, vector, trigger| Some(Ipi { vector, mode, destination: Destination::Itself, assert: true, trigger });
        if core::mem::take(&mut self.init) {
            return message(DeliveryMode::Init, 0, Trigger::Edge);
        }
        if let Some(fewer) = self.nmis.checked_sub(1) {
            self.nmis = fewer;
            return message(DeliveryMode::Nmi, 0, Trigger::Edge);
        }
        if let Some(page) = self.startup.take() {
            self.nmis = core::mem::take(&mut self.later_nmis);
            return message(DeliveryMode::StartUp, page, Trigger::Edge);
        }
        let vector = self.vectors.highest()?;
        let trigger = if self.level.contains(vector) { Trigger::Level } else { Trigger::Edge };
        self.vectors.set(vector, false);
        self.level.set(vector, false);
        message(DeliveryMode::Fixed, vector, trigger)
    }
}
