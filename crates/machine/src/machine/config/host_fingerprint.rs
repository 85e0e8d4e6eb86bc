//! The facts in a snapshot about the host that it was made on.
//!
//! Before a restored guest runs, the VMM needs to know which CPU features this host's KVM supports, whether MSRs exit,
//! and whether a guest's TSC is the host's. Measuring that takes a fifth of a restore where the kernel's own CPUID
//! instructions exit (in a virtual machine). None of it changes while KVM stays loaded. So the snapshot contains the
//! results, and a restore on the same boot of the same host uses them. Any other restore measures.

use serde::{Deserialize, Serialize};

use crate::{
    host::boot_id::HostId,
    kvm::{HostFacts, probe::DeadlineWrite},
    x86::Leaf,
};

/// The version of the probes: raised when a probe is changed, so that the results of another build's probes are not
/// used.
const PROBES: u32 = 2;

/// A host and its facts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostFingerprint {
    /// Which host, and which boot of it.
    pub host: HostId,
    /// The results of the probes; none if no probe ran, or if another host was emulated.
    pub facts: Option<FactsState>,
    /// The leaves with the features that KVM supports, as far as a restore compares them.
    pub features: Vec<Leaf>,
}

/// [`HostFacts`], as a snapshot holds them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FactsState {
    /// The version of the probes that found them.
    probes: u32,
    /// A guest's TSC is the host's.
    tsc_equals_host: bool,
    /// KVM moves a guest's TSC by an offset.
    tsc_offset: bool,
    /// The effect of WRMSR IA32_TSC_DEADLINE.
    deadline_write: DeadlineWriteState,
    /// x2APIC MSRs exit.
    x2apic_exits: bool,
}

/// [`DeadlineWrite`], as a snapshot holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum DeadlineWriteState {
    /// It exits.
    Exits,
    /// It exits with MWAIT in the guest.
    ExitsWithMwait,
    /// It is swallowed.
    Swallowed,
}

impl From<HostFacts> for FactsState {
    fn from(facts: HostFacts) -> Self {
        let HostFacts { tsc_equals_host, tsc_offset, deadline_write, x2apic_exits } = facts;
        let deadline_write = match deadline_write {
            DeadlineWrite::Exits => DeadlineWriteState::Exits,
            DeadlineWrite::ExitsWithMwait => DeadlineWriteState::ExitsWithMwait,
            DeadlineWrite::Swallowed => DeadlineWriteState::Swallowed,
        };
        Self { probes: PROBES, tsc_equals_host, tsc_offset, deadline_write, x2apic_exits }
    }
}

impl FactsState {
    /// The facts, if this build's probes found them.
    pub(crate) fn facts(self) -> Option<HostFacts> {
        let Self { probes, tsc_equals_host, tsc_offset, deadline_write, x2apic_exits } = self;
        let deadline_write = match deadline_write {
            DeadlineWriteState::Exits => DeadlineWrite::Exits,
            DeadlineWriteState::ExitsWithMwait => DeadlineWrite::ExitsWithMwait,
            DeadlineWriteState::Swallowed => DeadlineWrite::Swallowed,
        };
        (probes == PROBES).then_some(HostFacts { tsc_equals_host, tsc_offset, deadline_write, x2apic_exits })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Catches: a fact that a snapshot turns into another.
    #[test]
    fn facts_come_back_as_they_were() {
        for (tsc_equals_host, tsc_offset, x2apic_exits) in
            [(true, false, false), (false, true, false), (false, false, true)]
        {
            for deadline_write in [DeadlineWrite::Exits, DeadlineWrite::ExitsWithMwait, DeadlineWrite::Swallowed] {
                let facts = HostFacts { tsc_equals_host, tsc_offset, deadline_write, x2apic_exits };
                let text = serde_json::to_string(&FactsState::from(facts)).unwrap();
                let back: FactsState = serde_json::from_str(&text).unwrap();
                assert_eq!(back.facts(), Some(facts), "{text}");
            }
        }
    }

    // Catches: results of another version's probes that are used.
    #[test]
    fn the_results_of_other_probes_are_not_used() {
        let facts = FactsState::from(HostFacts::WITHOUT_WORKAROUNDS);
        assert_eq!(FactsState { probes: PROBES + 1, ..facts }.facts(), None);
    }
}
