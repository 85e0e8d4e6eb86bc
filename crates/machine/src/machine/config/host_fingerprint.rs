//! What a snapshot remembers of the host that it was made on.
//!
//! What a host does must be known before a restored guest runs: which CPU features its KVM supports, whether MSRs exit,
//! whether a guest's TSC is the host's. To find out takes a fifth of a restore where the kernel's own CPUID instructions exit
//! (in a virtual machine). KVM itself finds these things out once, when it is loaded; so the snapshot has the answers, and a
//! restore by the same KVM on the same boot believes it. Anywhere else it asks.

use serde::{Deserialize, Serialize};

use crate::{
    host::boot_id::HostId,
    kvm::{HostFacts, probe::DeadlineWrite},
    x86::Leaf,
};

/// Which questions the probes ask, and how: raised when a probe is changed, so that the answers of another build are not
/// taken for this one's.
const PROBES: u32 = 2;

/// A host, and what it does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostFingerprint {
    /// Which host, and which boot of it.
    pub host: HostId,
    /// What the probes saw; nothing if none was needed, or if another host was pretended.
    pub facts: Option<FactsState>,
    /// The leaves with the features that KVM supports, as far as a restore compares them.
    pub features: Vec<Leaf>,
}

/// [`HostFacts`], as a snapshot holds them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FactsState {
    /// Which probes they are the answers of.
    probes: u32,
    /// A guest's TSC is the host's.
    tsc_equals_host: bool,
    /// KVM moves a guest's TSC by an offset.
    tsc_offset: bool,
    /// What becomes of a WRMSR of IA32_TSC_DEADLINE.
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

    // Catches: the answers to other questions, believed.
    #[test]
    fn the_answers_of_other_probes_do_not_count() {
        let facts = FactsState::from(HostFacts::WITHOUT_WORKAROUNDS);
        assert_eq!(FactsState { probes: PROBES + 1, ..facts }.facts(), None);
    }
}
