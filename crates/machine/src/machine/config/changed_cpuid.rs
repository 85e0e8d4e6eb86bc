//! The guest's CPUID as `--cpuid` changes it.

use std::collections::BTreeSet;

use super::HostEnvironment;
use crate::{boot::cpuid_changes::CpuidChanges, kvm::probe, machine::error::RunError, x86::Leaf};

/// Applies `changes` to the `leaves` of a vCPU. Those of the first vCPU are `checked`: whether they have what is
/// insisted on, and whether this host hides what is taken away.
///
/// # Errors
/// [`RunError::HostLacks`].
pub(crate) fn change(
    env: &HostEnvironment,
    changes: &CpuidChanges,
    leaves: &mut Vec<Leaf>,
    checked: bool,
) -> Result<(), RunError> {
    if changes.is_empty() {
        return Ok(());
    }
    changes.apply(leaves);
    if !checked {
        return Ok(());
    }
    let missing = changes.missing(leaves);
    if !missing.is_empty() {
        return Err(RunError::HostLacks(format!(
            "--cpuid +{}: this host's KVM does not offer that to a guest; leave it out, or use a host that does",
            missing.join(",+")
        )));
    }
    let seen = probe::cpuid(&env.host, leaves, changes.changed(leaves))?;
    let shown: BTreeSet<&str> = seen.iter().flat_map(|leaf| changes.still_there(leaf)).collect();
    if !shown.is_empty() {
        return Err(RunError::HostLacks(format!(
            "--cpuid: this host's KVM cannot hide {} from a guest (probed): it adds its own bits to those of the guest's CPUID; \
             leave it out, and tell the guest not to use it (Linux: clearcpuid=NAME)",
            shown.into_iter().collect::<Vec<_>>().join(", ")
        )));
    }
    Ok(())
}
