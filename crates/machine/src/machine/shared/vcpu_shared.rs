//! The part of a vCPU that other threads read and write.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use vlapic::{Inbox, Route};

use super::{doorbell::Doorbell, host_stop::LastRun};
use crate::machine::{cpu_index::CpuIndex, lock::Ranked};

/// The part of one vCPU that other threads read and write.
#[derive(Default)]
pub struct VcpuShared {
    /// Kicks its thread.
    pub(crate) doorbell: Arc<Doorbell>,
    /// Messages from other LAPICs.
    pub(crate) inbox: Ranked<Inbox, 7>,
    /// The destinations that its LAPIC answers to; none before the vCPU exists.
    pub(crate) route: Ranked<Option<Route>, 8>,
    /// Why only a message can wake it; none if it runs, or a timer or device can wake it.
    pub(crate) unwakeable: Ranked<Option<Unwakeable>, 9>,
    /// Where its kvmclock page is; 0 if it has none.
    pub(crate) page: AtomicU64,
    /// How far its TSC is ahead of the base, modulo 2^64.
    pub(crate) tsc_adjust: AtomicU64,
    /// Until when it may have run.
    pub(crate) last_run: LastRun,
}

/// Why only a message can wake a vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unwakeable {
    /// It halted with interrupts off.
    Halted {
        /// Linear address after the HLT.
        address: u64,
    },
    /// It waits for a start-up message.
    Parked,
}

/// The rank of vCPU `index`'s kvmclock page among all of them, by address; the vCPU's own number if it has none.
pub(super) fn rank(vcpus: &[VcpuShared], index: CpuIndex) -> usize {
    let page = |vcpu_shared: &VcpuShared| vcpu_shared.page.load(Ordering::Relaxed);
    let own = index.of(vcpus).map_or(0, page);
    if own == 0 {
        return index.place();
    }
    vcpus.iter().map(page).filter(|page| (1..own).contains(page)).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rings_are_in_the_order_of_the_pages() {
        let vcpus: Vec<VcpuShared> = (0..4).map(|_| VcpuShared::default()).collect();
        assert_eq!([0, 1, 2, 3].map(|index| rank(&vcpus, CpuIndex::new(index))), [0, 1, 2, 3]);
        for (vcpu_shared, page) in vcpus.iter().zip([0x1000, 0x1080, 0x1040, 0x10c0]) {
            vcpu_shared.page.store(page, Ordering::Relaxed);
        }
        assert_eq!([0, 1, 2, 3].map(|index| rank(&vcpus, CpuIndex::new(index))), [0, 2, 1, 3]);
    }
}
