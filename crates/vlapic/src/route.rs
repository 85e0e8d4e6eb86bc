//! Who a message is for: an APIC's address as plain data, and the choice among several.
//!
//! A sender needs to know where a message goes without touching the other CPUs' APICs, which their own threads use. So
//! each APIC returns a [`Route`], and the VMM keeps a table of them.

use crate::{
    Destination, LocalApic,
    base::Mode,
    vectors::{class, low_byte},
};

/// What others must know of a local APIC to send it messages.
///
/// It is as of [`LocalApic::route`]. [`Effects::route_changed`](crate::Effects::route_changed) says when to ask again;
/// `priority` changes with every interrupt and need not be the latest, as it is not on a real bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// The physical destination: the x2APIC ID in x2APIC mode, and else the 8 bits of the xAPIC ID.
    pub id: u32,
    /// Which of the IDs and formats count.
    pub mode: Mode,
    /// The logical ID, as LDR reads.
    pub ldr: u32,
    /// DFR, which says what an xAPIC's LDR means.
    pub dfr: u32,
    /// Enabled by SVR: takes vectors.
    pub enabled: bool,
    /// The arbitration priority, for [`lowest_priority`].
    pub priority: u8,
}

impl Route {
    /// Whether a message for `destination` is for this CPU; `from_itself` says that this CPU sent it.
    ///
    /// CPUs in xAPIC and in x2APIC mode may be mixed, of which the manual says nothing: each compares the number that
    /// it is sent with what it has, so that an xAPIC, whose IDs have 8 bits, is addressed by no greater number.
    #[must_use]
    pub fn addressed_by(&self, destination: Destination, from_itself: bool) -> bool {
        match (destination, self.mode) {
            (_, Mode::Disabled) => false,
            (Destination::Itself, _) => from_itself,
            (Destination::Everyone, _) => true,
            (Destination::Others, _) => !from_itself,
            (Destination::Physical(id), _) => id == self.id,
            // SDM vol. 3, "Logical Destination Mode in x2APIC Mode": cluster, and a bit for each of its CPUs.
            (Destination::Logical(to), Mode::X2Apic) => to >> 16 == self.ldr >> 16 && to & self.ldr & 0xffff != 0,
            (Destination::Logical(to), Mode::XApic) => u8::try_from(to).is_ok_and(|to| self.is_logical(to)),
        }
    }

    /// SDM vol. 3, "Logical Destination Mode": DFR chooses between a flat mask and cluster plus mask. In both,
    /// "broadcast to all local APICs is achieved by setting all destination bits to one": also to one whose LDR is 0.
    fn is_logical(&self, to: u8) -> bool {
        let [.., own] = self.ldr.to_le_bytes();
        to == u8::MAX
            || match self.dfr >> 28 {
                0b1111 => to & own != 0,
                0b0000 => to >> 4 == own >> 4 && to & own & 0xf != 0,
                _ => false,
            }
    }
}

/// The one of several addressed CPUs that a lowest-priority message goes to; none if no APIC among them is enabled.
///
/// SDM vol. 3, "Lowest Priority Delivery Mode": the one with the lowest arbitration priority. Of equals it leaves the
/// choice to the bus; here it is the one with the lowest index, so that runs can be repeated.
#[must_use]
pub fn lowest_priority(targets: impl Iterator<Item = (usize, Route)>) -> Option<usize> {
    targets
        .filter(|(_, route)| route.enabled && route.mode != Mode::Disabled)
        .min_by_key(|(index, route)| (route.priority, *index))
        .map(|(index, _)| index)
}

/// The logical x2APIC ID (SDM vol. 3, "Deriving Logical x2APIC ID from the Local x2APIC ID").
pub(super) const fn x2apic_ldr(id: u32) -> u32 {
    (id >> 4) << 16 | 1 << (id & 0xf)
}

impl LocalApic {
    /// What others must know to send messages here, as of now.
    #[must_use]
    pub fn route(&self) -> Route {
        Route { priority: self.arbitration_priority(), ..self.address() }
    }

    /// [`route`](Self::route) without the priority.
    pub(super) fn address(&self) -> Route {
        let mode = self.base.mode();
        Route {
            id: self.visible_id(),
            mode,
            ldr: if mode == Mode::X2Apic { x2apic_ldr(self.config.id) } else { self.ldr },
            dfr: self.dfr,
            enabled: self.software_enabled(),
            priority: 0,
        }
    }

    /// Whether a message for `destination` is for this CPU; `from_itself` says that this CPU sent it.
    ///
    /// To deliver an [`Effects::ipi`](crate::Effects::ipi), call it for every CPU, the sender included, or for its
    /// [`Route`].
    #[must_use]
    pub fn addressed_by(&self, destination: Destination, from_itself: bool) -> bool {
        self.address().addressed_by(destination, from_itself)
    }

    /// SDM vol. 3, "Lowest Priority Delivery Mode": APR is TPR if its class is at least that of the highest requested
    /// vector and above that of the highest in service, and else the highest of the three classes.
    fn arbitration_priority(&self) -> u8 {
        let requested = class(self.irr.highest().unwrap_or(0));
        let in_service = class(self.isr.highest().unwrap_or(0));
        let task = class(self.tpr);
        if task >= requested && task > in_service { self.tpr } else { task.max(requested).max(in_service) << 4 }
    }

    /// The APIC ID as the open door shows it: 8 bits wide in the xAPIC.
    pub(super) fn visible_id(&self) -> u32 {
        if self.base.mode() == Mode::X2Apic {
            self.config.id
        } else {
            u32::from(self.xapic_id.unwrap_or(low_byte(self.config.id)))
        }
    }

    /// A write of the xAPIC ID. Writing the one from reset is as not having written it.
    pub(super) fn write_xapic_id(&mut self, register: u32) {
        let [.., id] = register.to_le_bytes();
        self.xapic_id = Some(id).filter(|id| *id != low_byte(self.config.id));
    }
}
