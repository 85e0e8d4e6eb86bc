//! Paravirtual EOI: a bit in guest memory by which the guest ends an interrupt without an exit.
//!
//! Source: Linux `Documentation/virt/kvm/x86/msr.rst`, MSR_KVM_PV_EOI_EN. The host sets bit 0 of the guest's word when
//! it injects an interrupt for whose end nothing waits; the guest clears it instead of writing EOI, or finds it clear
//! and writes EOI.
//!
//! KVM takes the bit back at every exit. Here it stays set while the vCPU is out, which saves two writes an exit: only
//! the vCPU's own thread reads the word then. After every exit, before anything else, the thread checks whether the
//! guest has cleared it ([`PvEoi::take_ended`]); before every entry it takes the bit back if something now waits for
//! the end of the interrupt ([`PvEoi::withdraw_unless`]), so that the guest writes EOI, which exits.

use guest_abi::pv_eoi::{ENABLE, PENDING};

use crate::{GuestWrite, OutsideRam};

/// One vCPU's MSR_KVM_PV_EOI_EN, and what is in the word that it names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PvEoi {
    /// What the guest wrote last, and reads.
    msr: u64,
    /// The bit is set, and means this vector.
    lent: Option<u8>,
}

/// [`PvEoi`] in a snapshot. Whether the guest has cleared the bit is in its RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct PvEoiState {
    /// The MSR's value: guest physical address of the word, bit 0 = enabled.
    pub msr: u64,
    /// The vector in service that the guest may end by clearing the bit, while it is set.
    pub lent: Option<u8>,
}

/// A value that the MSR does not take: #GP(0).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PvEoiFault {
    /// Bit 1 is reserved, and so the word aligned.
    #[error("the address of the PV EOI word {0:#x} is not a multiple of 4")]
    Misaligned(u64),
    /// There is no word.
    #[error("the PV EOI word is unusable: {0}")]
    OutsideRam(#[from] OutsideRam),
    /// In a snapshot only: a bit that is set nowhere.
    #[error("vector {0} may end by a PV EOI word, but there is none")]
    NoWord(u8),
}

impl PvEoi {
    /// RDMSR.
    #[must_use]
    pub const fn read_msr(&self) -> u64 {
        self.msr
    }

    /// Guest physical address of the word, if there is one.
    #[must_use]
    pub fn address(&self) -> Option<u64> {
        (self.msr & ENABLE != 0).then_some(self.msr & !ENABLE)
    }

    /// WRMSR. Clears the bit in the old word.
    ///
    /// # Errors
    /// [`PvEoiFault`] for a reserved bit, or an enabled address that is not in RAM; nothing has changed then.
    pub fn write_msr(&mut self, value: u64, mem: &impl GuestWrite) -> Result<(), PvEoiFault> {
        let address = value & !ENABLE;
        if !address.is_multiple_of(4) {
            return Err(PvEoiFault::Misaligned(address));
        }
        if value & ENABLE != 0 {
            word(address, mem)?;
        }
        self.take_back(mem);
        self.msr = value;
        Ok(())
    }

    /// INIT: no word, as with KVM. The memory may be anything by now, and is not touched: a guest that registers a word
    /// clears it before (Linux `Documentation/virt/kvm/x86/msr.rst`).
    pub fn reset(&mut self) {
        *self = Self::default();
    }

    /// Call it after an exit: returns the vector whose interrupt the guest has ended by clearing the bit. The caller
    /// must end it in the LAPIC too.
    #[must_use]
    pub fn take_ended(&mut self, mem: &impl GuestWrite) -> Option<u8> {
        self.lent?;
        // A word that was RAM is RAM.
        let ended = word(self.address()?, mem).is_ok_and(|word| word & PENDING == 0);
        if ended { self.lent.take() } else { None }
    }

    /// Call it when an interrupt was injected and acknowledged. `silent_end` is the vector in service if nothing waits
    /// for its end: the bit is then set, so that the guest may end it without a write.
    pub fn lend(&mut self, silent_end: Option<u8>, mem: &impl GuestWrite) {
        let Some(address) = self.address() else { return };
        if silent_end.is_some() && set(address, true, mem).is_ok() {
            self.lent = silent_end;
        }
    }

    /// Call it before an entry, with `silent_end` as for [`Self::lend`]: clears the bit if the interrupt may no longer
    /// end without a write.
    pub fn withdraw_unless(&mut self, silent_end: Option<u8>, mem: &impl GuestWrite) {
        if self.lent.is_some() && self.lent != silent_end {
            self.take_back(mem);
        }
    }

    /// The interrupt in service may end without an exit, so that the VMM does not see when it ends. The timer must then
    /// be watched as if the interrupt had ended.
    #[must_use]
    pub const fn is_lent(&self) -> bool {
        self.lent.is_some()
    }

    fn take_back(&mut self, mem: &impl GuestWrite) {
        if let (Some(_), Some(address)) = (self.lent.take(), self.address()) {
            // A word that was RAM is RAM.
            let _ = set(address, false, mem);
        }
    }

    /// What goes into a snapshot.
    #[must_use]
    pub const fn state(&self) -> PvEoiState {
        let Self { msr, lent } = *self;
        PvEoiState { msr, lent }
    }

    /// What a snapshot holds.
    ///
    /// # Errors
    /// [`PvEoiFault`] if the guest could not have come there.
    pub fn from_state(state: PvEoiState, mem: &impl GuestWrite) -> Result<Self, PvEoiFault> {
        let PvEoiState { msr, lent } = state;
        let mut pv_eoi = Self::default();
        pv_eoi.write_msr(msr, mem)?;
        if let Some(vector) = lent.filter(|_| pv_eoi.address().is_none()) {
            return Err(PvEoiFault::NoWord(vector));
        }
        pv_eoi.lent = lent;
        Ok(pv_eoi)
    }
}

fn word(address: u64, mem: &impl GuestWrite) -> Result<u32, OutsideRam> {
    let mut bytes = [0; 4];
    // Not every memory checks that the end does not wrap.
    address.checked_add(4).ok_or(OutsideRam { addr: address, bytes: bytes.len() })?;
    mem.read(address, &mut bytes)?;
    Ok(u32::from_le_bytes(bytes))
}

fn set(address: u64, pending: bool, mem: &impl GuestWrite) -> Result<(), OutsideRam> {
    let others = word(address, mem)? & !PENDING;
    mem.write(address, &(others | if pending { PENDING } else { 0 }).to_le_bytes())
}

#[cfg(test)]
mod tests;
