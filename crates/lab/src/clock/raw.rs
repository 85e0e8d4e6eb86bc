//! VM time beside CLOCK_MONOTONIC_RAW.

use machine::{Machine, TimeMode, host::reading::Reading};
use vmtime::{ExactSpan, GuestTsc, PageClock};

/// The guest's TSC and the host's CLOCK_MONOTONIC_RAW at one instant.
#[derive(Clone, Copy, Debug)]
pub(super) struct RawReading {
    pub tsc: GuestTsc,
    pub raw_ns: u64,
    /// How far the two readings may be apart.
    pub within_ns: u64,
}

impl RawReading {
    /// Reads both; none in virtual time, which no clock of the host has to do with.
    pub(super) fn take(machine: &Machine) -> Option<Self> {
        if machine.time_mode() == TimeMode::Virtual {
            return None;
        }
        let (tsc, Reading { ns: raw_ns, error_ns, .. }) = machine.beside_monotonic_raw();
        Some(Self { tsc, raw_ns, within_ns: error_ns? })
    }

    /// How much more VM time than CLOCK_MONOTONIC_RAW has passed until `later`, by the page that the guest had at each.
    pub(super) fn until(&self, page: &PageClock, later: &Self, later_page: &PageClock) -> ExactSpan {
        let vm = later_page.line(later.tsc) - page.line(self.tsc);
        let (from, to) = (ExactSpan::of_u64_ns(self.raw_ns), ExactSpan::of_u64_ns(later.raw_ns));
        vm - (to - from)
    }
}
