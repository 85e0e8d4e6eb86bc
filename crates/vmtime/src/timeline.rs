//! How the guest's TSC runs: not at all, at a rate of the host's TSC, or by itself in virtual time.

use crate::{GuestTsc, HostTsc, Khz, Rate};

/// What gives the guest's TSC its value.
///
/// Running state only: a snapshot saves the TSC that [`Self::stop`] leaves and the restore builds a new one. A guest
/// that writes its TSC also gets a new one (and a new page). At the end of 64 bits the TSC stands still: wrapping would
/// put every armed deadline into the far future.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Timeline {
    /// The VM is paused.
    Stopped {
        /// The TSC at which it will go on.
        tsc: GuestTsc,
    },
    /// Real time: the TSC follows the host's.
    Running {
        /// Base on the host's side.
        host: HostTsc,
        /// Base on the guest's side: the guest TSC at `host`.
        tsc: GuestTsc,
        /// How it follows the host's from there.
        rate: Rate,
    },
    /// Virtual time: the TSC moves only when the VMM says so.
    Virtual {
        /// The TSC now.
        tsc: GuestTsc,
        /// The frequency that the guest is told.
        khz: Khz,
    },
}

impl Timeline {
    /// The guest TSC when the host's is `host` (which only [`Self::Running`] looks at).
    ///
    /// With equal frequencies the ticks are the difference itself, so the TSC source `host` is an exact offset. A host
    /// TSC before the base (another core's, a few ticks behind) gives the base: the guest's TSC never runs backwards.
    #[must_use]
    pub fn tsc(&self, host: HostTsc) -> GuestTsc {
        match *self {
            Self::Stopped { tsc } | Self::Virtual { tsc, .. } => tsc,
            Self::Running { host: base, tsc, rate } => GuestTsc(tsc.0.saturating_add(rate.ticks(base.0, host.0))),
        }
    }

    /// The least host TSC, not before the base, at which the guest's is `tsc` or later. `None` if the host's TSC ends
    /// before that, and where the host's TSC does not move the guest's.
    #[must_use]
    pub fn host_at(&self, tsc: GuestTsc) -> Option<HostTsc> {
        match *self {
            Self::Stopped { .. } | Self::Virtual { .. } => None,
            Self::Running { host, tsc: base, rate } => {
                rate.host_after(host.0, tsc.0.saturating_sub(base.0)).map(HostTsc)
            }
        }
    }

    /// Virtual time moves on by `ticks`, the cost of one guest operation. The other timelines are not moved by what
    /// the guest does, so they ignore it.
    pub fn spend(&mut self, ticks: u64) {
        match self {
            Self::Virtual { tsc, .. } => tsc.0 = tsc.0.saturating_add(ticks),
            Self::Stopped { .. } | Self::Running { .. } => {}
        }
    }

    /// Virtual time jumps ahead to `to`, the next deadline of an idle VM; never back. The other timelines ignore it.
    pub fn jump_to(&mut self, to: GuestTsc) {
        match self {
            Self::Virtual { tsc, .. } => *tsc = to.max(*tsc),
            Self::Stopped { .. } | Self::Running { .. } => {}
        }
    }

    /// The TSC stands still at its value at `host`.
    pub fn stop(&mut self, host: HostTsc) {
        *self = Self::Stopped { tsc: self.tsc(host) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn khz(n: u32) -> Khz {
        Khz::new(u64::from(n)).unwrap()
    }

    fn running(host: u64, tsc: u64, host_khz: u32, guest_khz: u32) -> Timeline {
        let rate = Rate::Quotient { guest: khz(guest_khz), host: khz(host_khz) };
        Timeline::Running { host: HostTsc(host), tsc: GuestTsc(tsc), rate }
    }

    #[test]
    fn virtual_time_moves_only_when_told_and_never_back() {
        let mut line = Timeline::Virtual { tsc: GuestTsc(100), khz: khz(2_000_000) };
        line.spend(5);
        line.jump_to(GuestTsc(50));
        assert_eq!(line.tsc(HostTsc(u64::MAX)), GuestTsc(105));
        line.jump_to(GuestTsc(200));
        assert_eq!((line.tsc(HostTsc(0)), line.host_at(GuestTsc(300))), (GuestTsc(200), None));
        line.spend(u64::MAX);
        assert_eq!(line.tsc(HostTsc(0)), GuestTsc(u64::MAX));
    }

    #[test]
    fn stopped_keeps_the_value_and_ignores_work() {
        let mut line = running(1000, 50, 2_000_000, 1_000_000);
        line.stop(HostTsc(1005));
        line.spend(9);
        line.jump_to(GuestTsc(99));
        assert_eq!(line, Timeline::Stopped { tsc: GuestTsc(52) });
        assert_eq!(line.host_at(GuestTsc(0)), None);
    }

    #[test]
    fn real_time_is_not_moved_by_work() {
        let mut line = running(1000, 50, 2_000_000, 1_000_000);
        let before = line;
        line.spend(9);
        line.jump_to(GuestTsc(99));
        assert_eq!(line, before);
    }

    proptest! {
        #[test]
        fn the_same_frequency_is_an_exact_offset(base in any::<u64>(), ticks in any::<u64>(), f in 10_000..100_000_001_u32) {
            let host = HostTsc(base.saturating_add(ticks));
            prop_assert_eq!(running(base, base, f, f).tsc(host), GuestTsc(host.0));
            prop_assert_eq!(running(base, base, f, f).host_at(GuestTsc(host.0)), Some(host));
        }

        #[test]
        fn host_at_is_least_and_tsc_monotone(
            base in any::<u64>(), start in any::<u64>(), by in 0_u32..64, to in any::<u64>(), other in any::<u64>(),
            host_khz in 10_000..100_000_001_u32, guest_khz in 10_000..100_000_001_u32,
        ) {
            let line = running(base, start >> by, host_khz, guest_khz);
            match line.host_at(GuestTsc(to)) {
                Some(host) => {
                    prop_assert!(host.0 >= base && line.tsc(host).0 >= to);
                    prop_assert!(host.0 == base || line.tsc(HostTsc(host.0 - 1)).0 < to);
                }
                None => prop_assert!(line.tsc(HostTsc(u64::MAX)).0 < to),
            }
            prop_assert!(line.tsc(HostTsc(to.min(other))) <= line.tsc(HostTsc(to.max(other))));
            prop_assert!(line.tsc(HostTsc(other)).0 >= start >> by);
        }
    }
}
