//! The error status register and the interrupt that announces an error.

use super::LocalApic;
use super::vectors::FIRST_LEGAL;

/// ESR bit 5: a message was sent with a vector below 16.
pub(super) const SEND_ILLEGAL_VECTOR: u32 = 1 << 5;
/// ESR bit 6: an interrupt with a vector below 16 arrived, or the local vector table raised one.
pub(super) const RECEIVE_ILLEGAL_VECTOR: u32 = 1 << 6;
/// ESR bit 7: a reserved register was accessed through the xAPIC page.
pub(super) const ILLEGAL_REGISTER: u32 = 1 << 7;
/// The errors that exist here. The others are of buses that no current processor has.
pub(super) const ALL: u32 = SEND_ILLEGAL_VECTOR | RECEIVE_ILLEGAL_VECTOR | ILLEGAL_REGISTER;

impl LocalApic {
    /// Logs an error and raises the LVT error interrupt.
    ///
    /// SDM vol. 3, "Error Handling": a write to ESR shows the errors logged so far, clears the log, and rearms the
    /// interrupt. So a second error before that write is logged without another interrupt.
    pub(super) fn log_error(&mut self, error: u32) {
        let rearmed = self.errors == 0;
        self.errors |= error;
        if !rearmed || self.lvt.error.masked() {
            return;
        }
        let vector = self.lvt.error.vector();
        if vector < FIRST_LEGAL {
            // The same again: to raise an interrupt for it would have no end.
            self.errors |= RECEIVE_ILLEGAL_VECTOR;
        } else {
            self.request(vector, false);
        }
    }

    /// A write of ESR.
    pub(super) fn latch_errors(&mut self) {
        self.esr = std::mem::take(&mut self.errors);
    }
}
