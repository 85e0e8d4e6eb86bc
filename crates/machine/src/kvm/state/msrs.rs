//! Model-specific registers.

use std::collections::HashMap;

use guest_abi::msr;
use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use crate::{kvm::Error, x86::emulates_msr};

/// One MSR.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Msr {
    /// Number.
    pub index: u32,
    /// Value.
    pub value: u64,
}

/// The most that one call takes (`MAX_IO_MSRS` in Linux arch/x86/kvm/x86.c).
const MOST_AT_ONCE: usize = 256;

/// MSRs that must be neither read from KVM nor written to it: the VMM emulates them, or no guest is offered them
/// (Hyper-V's).
fn is_not_kvms(index: u32) -> bool {
    emulates_msr(index) || msr::HYPER_V.contains(index)
}

/// MSRs with guest state that are not in KVM's list: MTRRs and the machine-check banks of most CPUs.
fn unlisted() -> impl Iterator<Item = u32> {
    // Default type and fixed ranges, variable ranges, the ten banks that there are.
    [0x2ff, 0x250, 0x258, 0x259].into_iter().chain(0x268..=0x26f).chain(0x200..=0x20f).chain(0x400..=0x427)
}

fn one(index: u32, data: u64) -> Result<Msrs, Error> {
    list(&[kvm_msr_entry { index, data, reserved: 0 }])
}

fn list(entries: &[kvm_msr_entry]) -> Result<Msrs, Error> {
    Msrs::from_entries(entries)
        .map_err(|_| Error::Call { call: "KVM_GET_MSRS", source: std::io::Error::from_raw_os_error(libc::ENOMEM) })
}

/// One MSR's value.
pub(in crate::kvm) fn read(fd: &VcpuFd, index: u32) -> Result<u64, Error> {
    let mut msrs = one(index, 0)?;
    fd.get_msrs(&mut msrs).map_err(Error::call("KVM_GET_MSRS"))?;
    Ok(msrs.as_slice().first().map_or(0, |msr| msr.data))
}

/// The values of several MSRs, by one call.
pub(in crate::kvm) fn read_each<const N: usize>(fd: &VcpuFd, indices: [u32; N]) -> Result<[u64; N], Error> {
    let mut msrs = list(&indices.map(|index| kvm_msr_entry { index, ..Default::default() }))?;
    fd.get_msrs(&mut msrs).map_err(Error::call("KVM_GET_MSRS"))?;
    let mut values = [0; N];
    for (value, msr) in values.iter_mut().zip(msrs.as_slice()) {
        *value = msr.data;
    }
    Ok(values)
}

/// Sets one MSR.
pub(in crate::kvm) fn write(fd: &VcpuFd, index: u32, value: u64) -> Result<(), Error> {
    let written = fd.set_msrs(&one(index, value)?).map_err(Error::call("KVM_SET_MSRS"))?;
    if written == 1 { Ok(()) } else { Err(Error::Msr { index, value }) }
}

pub(super) fn get(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<Msr>, Error> {
    let wanted: Vec<u32> = indices.iter().copied().chain(unlisted()).filter(|index| !is_not_kvms(*index)).collect();
    read_all(fd, &wanted)
}

/// Reads those of the MSRs that the vCPU has.
fn read_all(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<Msr>, Error> {
    let mut found = Vec::new();
    let mut rest = indices;
    while !rest.is_empty() {
        let batch = rest.get(..MOST_AT_ONCE).unwrap_or(rest);
        let entries: Vec<_> = batch.iter().map(|index| kvm_msr_entry { index: *index, ..Default::default() }).collect();
        let mut msrs = list(&entries)?;
        let read = fd.get_msrs(&mut msrs).map_err(Error::call("KVM_GET_MSRS"))?;
        found.extend(msrs.as_slice().iter().take(read).map(|m| Msr { index: m.index, value: m.data }));
        // KVM stops at the first MSR that this guest's CPUID does not have: that one holds no state.
        let done = if read < batch.len() { read.saturating_add(1) } else { read };
        rest = rest.get(done..).unwrap_or(&[]);
    }
    Ok(found)
}

/// The MSRs of `saved` that must be written to a vCPU that has `present`: those that differ, and those that it does not
/// have. Equal ones must not be written: some are read-only, and for others KVM refuses and logs every write, even of
/// the current value.
fn to_write(saved: &[Msr], present: &[Msr]) -> Vec<Msr> {
    let present: HashMap<u32, u64> = present.iter().map(|msr| (msr.index, msr.value)).collect();
    let differs = |msr: &&Msr| !is_not_kvms(msr.index) && present.get(&msr.index) != Some(&msr.value);
    saved.iter().filter(differs).copied().collect()
}

/// Sets the `saved` MSRs of a fresh vCPU.
pub(super) fn set(fd: &VcpuFd, saved: &[Msr]) -> Result<(), Error> {
    let indices: Vec<u32> = saved.iter().map(|msr| msr.index).filter(|index| !is_not_kvms(*index)).collect();
    let changes = to_write(saved, &read_all(fd, &indices)?);
    for batch in changes.chunks(MOST_AT_ONCE) {
        let entry = |msr: &Msr| kvm_msr_entry { index: msr.index, data: msr.value, reserved: 0 };
        let entries: Vec<_> = batch.iter().map(entry).collect();
        // KVM writes them in order, and stops at the first that it refuses.
        let written = fd.set_msrs(&list(&entries)?).map_err(Error::call("KVM_SET_MSRS"))?;
        if let Some(Msr { index, value }) = batch.get(written).copied() {
            return Err(Error::Msr { index, value });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn msrs(pairs: &[(u32, u64)]) -> Vec<Msr> {
        pairs.iter().map(|(index, value)| Msr { index: *index, value: *value }).collect()
    }

    // KVM logs every write of DEBUGCTL (0x1d9), also of the 0 that it already has.
    #[test]
    fn a_restore_writes_no_msr_that_has_its_value() {
        let fresh = msrs(&[(0x1d9, 0), (0xc000_0081, 0), (0x277, 0x0007_0406_0007_0406), (0x2ff, 0)]);
        assert_eq!(to_write(&fresh, &fresh), []);
        let saved = msrs(&[(0x1d9, 0), (0xc000_0081, 0x23 << 48), (0x277, 0x0007_0406_0007_0406), (0x2ff, 0xc06)]);
        // In the order of the snapshot.
        assert_eq!(to_write(&saved, &fresh), msrs(&[(0xc000_0081, 0x23 << 48), (0x2ff, 0xc06)]));
        let reordered: Vec<Msr> = fresh.iter().rev().copied().collect();
        assert_eq!(to_write(&saved, &reordered).len(), 2);
    }

    #[test]
    fn an_msr_that_the_vcpu_lacks_is_written_so_that_kvm_can_refuse_it() {
        assert_eq!(to_write(&msrs(&[(0x1d9, 0)]), &[]), msrs(&[(0x1d9, 0)]));
        // Those that the VMM emulates are never written.
        assert_eq!(to_write(&msrs(&[(0x10, 5), (0x6e0, 1), (0x4b56_4d01, 1), (0x830, 0)]), &[]), []);
    }
}
