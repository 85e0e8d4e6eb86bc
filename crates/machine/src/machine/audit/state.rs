//! The tick audit as a snapshot holds it.

use guest_abi::report::MAX_CPUS;
use serde::{Deserialize, Serialize};
use vmtime::VmTime;

use super::{MAX_UNCLAIMED, Ring};

/// The tick audit as a snapshot holds it: where to continue reading, without the counts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TickAuditState {
    /// Guest physical address of CPU 0's ring.
    pub ring: Option<u64>,
    /// Each CPU's ring.
    pub rings: Vec<RingState>,
}

/// One CPU's ring as a snapshot holds it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RingState {
    /// Records read so far.
    pub read: u64,
    /// Sequence number of the next tick.
    pub next_seq: Option<u64>,
    /// Injections not yet claimed by a record.
    pub injections: Vec<VmTime>,
}

/// The rings of `cpus` CPUs, read as far as `rings` says.
pub(crate) fn rings(rings: &[RingState], cpus: usize) -> Vec<Ring> {
    let saved = rings.iter().map(|RingState { read, next_seq, injections }| Ring {
        read: *read,
        next_seq: *next_seq,
        injections: injections.iter().take(MAX_UNCLAIMED).copied().collect(),
        header: None,
        broken: false,
    });
    saved.chain(std::iter::repeat_with(Ring::default)).take(cpus.min(MAX_CPUS)).collect()
}
