//! Model-specific registers.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use super::super::Error;

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

/// MSRs that the VMM owns: TSC, kvmclock, LAPIC. KVM must neither be asked for them nor be given them: writing
/// 0x4b564d0x would make KVM take over our page, and a TSC written is a TSC "synchronised" by KVM's own ideas.
#[must_use]
pub fn is_ours(index: u32) -> bool {
    matches!(index, 0x10..=0x12 | 0x1b | 0x3b | 0x6e0 | 0x800..=0x8ff | 0x4b56_4d00..=0x4b56_4dff)
        // Hyper-V's synthetic MSRs: not offered to any guest.
        || matches!(index, 0x4000_0000..=0x4000_ffff)
}

/// MSRs with guest state that KVM does not list: MTRRs and the machine-check banks of most CPUs.
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

/// Sets one MSR.
pub(super) fn write(fd: &VcpuFd, index: u32, value: u64) -> Result<(), Error> {
    let written = fd.set_msrs(&one(index, value)?).map_err(Error::call("KVM_SET_MSRS"))?;
    if written == 1 { Ok(()) } else { Err(Error::Msr { index, value }) }
}

pub(super) fn get(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<Msr>, Error> {
    let mut found = Vec::new();
    let wanted: Vec<u32> = indices.iter().copied().chain(unlisted()).filter(|index| !is_ours(*index)).collect();
    let mut rest = wanted.as_slice();
    while !rest.is_empty() {
        let entries: Vec<_> = rest.iter().map(|index| kvm_msr_entry { index: *index, ..Default::default() }).collect();
        let mut msrs = list(&entries)?;
        let read = fd.get_msrs(&mut msrs).map_err(Error::call("KVM_GET_MSRS"))?;
        found.extend(msrs.as_slice().iter().take(read).map(|m| Msr { index: m.index, value: m.data }));
        // KVM stops at the first MSR that this guest's CPUID does not have: that one holds no state.
        rest = rest.get(read.saturating_add(1)..).unwrap_or(&[]);
    }
    Ok(found)
}

pub(super) fn set(fd: &VcpuFd, msrs: &[Msr]) -> Result<(), Error> {
    let ours = msrs.iter().filter(|msr| !is_ours(msr.index));
    let entries: Vec<_> =
        ours.map(|Msr { index, value }| kvm_msr_entry { index: *index, data: *value, reserved: 0 }).collect();
    let mut rest = entries.as_slice();
    while !rest.is_empty() {
        // KVM takes them in order and stops at the first that it does not take.
        let batch = rest.get(..MOST_AT_ONCE).unwrap_or(rest);
        let written = fd.set_msrs(&list(batch)?).map_err(Error::call("KVM_SET_MSRS"))?;
        let Some(kvm_msr_entry { index, data, .. }) = batch.get(written).copied() else {
            rest = rest.get(batch.len()..).unwrap_or(&[]);
            continue;
        };
        // Some MSRs of the list are read-only; a fresh vCPU then already has the value.
        let mut present = one(index, 0)?;
        let read = fd.get_msrs(&mut present).map_err(Error::call("KVM_GET_MSRS"))?;
        if read != 1 || present.as_slice().first().is_none_or(|m| m.data != data) {
            return Err(Error::Msr { index, value: data });
        }
        rest = rest.get(written.saturating_add(1)..).unwrap_or(&[]);
    }
    Ok(())
}
