//! The error status register and the interrupt that announces an error.

use crate::{Delivery, LocalApic, vectors::FIRST_LEGAL};

/// ESR bit 5: a message was sent with a vector below 16.
pub(super) const SEND_ILLEGAL_VECTOR: u32 = 1 << 5;
/// ESR bit 6: an interrupt with a vector below 16 arrived, or the local vector table raised one.
pub(super) const RECEIVE_ILLEGAL_VECTOR: u32 = 1 << 6;
/// ESR bit 7: a reserved register was accessed through the xAPIC page.
pub(super) const ILLEGAL_REGISTER: u32 = 1 << 7;
/// The errors that exist here. Bits 3:0 (checksum and accept errors) are of a bus that no current processor has, and
/// bit 4 (redirectable IPI) of processors that cannot send lowest-priority messages, which this one can.
pub(super) const ALL: u32 = SEND_ILLEGAL_VECTOR | RECEIVE_ILLEGAL_VECTOR | ILLEGAL_REGISTER;

impl LocalApic {
    /// Logs an error and raises the LVT error interrupt.
    ///
    /// SDM vol. 3, "Error Handling": a write to ESR shows the errors logged so far, clears the log, and rearms the
    /// interrupt. So a second error before that write is logged without another interrupt.
    pub(super) fn log_error(&mut self, error: u32) -> Delivery {
        let rearmed = self.errors == 0;
        self.errors |= error;
        if rearmed { self.raise_error() } else { Delivery::None }
    }

    /// Raises the LVT error interrupt: always fixed and edge-triggered.
    pub(super) fn raise_error(&mut self) -> Delivery {
        if self.lvt.error.masked() {
            return Delivery::None;
        }
        let vector = self.lvt.error.vector();
        if vector < FIRST_LEGAL {
            // Another error: to raise an interrupt for it would have no end.
            self.errors |= RECEIVE_ILLEGAL_VECTOR;
            return Delivery::None;
        }
        self.request(vector, false)
    }

    /// A write of ESR.
    pub(super) fn latch_errors(&mut self) {
        self.esr = core::mem::take(&mut self.errors);
    }
}
