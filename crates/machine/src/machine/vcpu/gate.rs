//! Where the guest's interrupt descriptor table leads.

use vm_memory::{Bytes, GuestAddress};

use crate::{
    kvm::Vcpu,
    machine::{error::RunError, shared::Shared},
};

/// The address of `vector`'s handler (SDM vol. 3, "IDT Descriptors" and "64-Bit Mode IDT"); none in real mode, or if
/// the table is too short or not in RAM.
pub(crate) fn handler(vcpu: &mut Vcpu, shared: &Shared, vector: u8) -> Result<Option<u64>, RunError> {
    let Some((table, limit, long)) = vcpu.idt() else { return Ok(None) };
    let size = if long { 16 } else { 8 };
    let offset = u64::from(vector) * size;
    if offset + size - 1 > u64::from(limit) {
        return Ok(None);
    }
    let gate = table.wrapping_add(offset);
    // Offset bits 15:0 and 31:16 are on both sides of the selector and the attributes, bits 63:32 in the upper half.
    let low = u64_at(vcpu, shared, gate)?.map(|low| low & 0xffff | low >> 32 & 0xffff_0000);
    let high = if long { u64_at(vcpu, shared, gate.wrapping_add(8))? } else { Some(0) };
    Ok(low.zip(high).map(|(low, high)| low | high << 32))
}

/// The eight bytes at the linear address `linear`; none where there is no RAM.
pub(crate) fn u64_at(vcpu: &Vcpu, shared: &Shared, linear: u64) -> Result<Option<u64>, RunError> {
    let physical = vcpu.translate(linear)?;
    Ok(physical.and_then(|physical| shared.memory.read_obj(GuestAddress(physical)).ok()))
}
