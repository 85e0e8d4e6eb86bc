//! What VM time is: the numbers of the published kvmclock page.
//!
//! The page's product rounds, so against the true frequency it drifts by up to some µs an hour. Host and
//! guest would disagree about every deadline if the host converted with the frequency instead, so it converts with the
//! page's own numbers, both ways.

use crate::{GuestTsc, Now, Scale, VmTime, saturate};

/// One line of VM time against the guest's TSC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct PageClock {
    /// The guest TSC at which the clock showed `system_time`.
    pub tsc_timestamp: GuestTsc,
    /// VM time at `tsc_timestamp`.
    pub system_time: VmTime,
    /// Ticks to nanoseconds after that.
    pub scale: Scale,
}

impl PageClock {
    /// VM time at `tsc`: what the guest's kvmclock shows when RDTSC gives `tsc`.
    ///
    /// A `tsc` before the base gives the base's VM time. The guest's unsigned delta would wrap there and its clock
    /// jump ahead by centuries, so the publisher never lets a vCPU read such a TSC; the host, which may ask about any
    /// value (a deadline armed in the past), must not act on that jump. Past [`u64::MAX`] ns VM time stands still.
    #[must_use]
    pub fn vm_time(&self, tsc: GuestTsc) -> VmTime {
        let ticks = tsc.0.saturating_sub(self.tsc_timestamp.0);
        // Below 2⁹⁵ + 2⁶⁴.
        VmTime(saturate(u128::from(self.system_time.0) + self.scale.ns(ticks)))
    }

    /// The least guest TSC, not before the page's base, at which VM time is `at` or later; `None` if the TSC ends
    /// before that.
    #[must_use]
    pub fn least_tsc(&self, at: VmTime) -> Option<GuestTsc> {
        let ns = at.0.saturating_sub(self.system_time.0);
        self.tsc_timestamp.0.checked_add(self.scale.ticks(ns)?).map(GuestTsc)
    }

    /// The instant `tsc` on both of the guest's clocks.
    #[must_use]
    pub fn now(&self, tsc: GuestTsc) -> Now {
        Now::new(tsc, self.vm_time(tsc))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::Khz;

    fn page(tsc: u64, vm: u64, khz: u32) -> PageClock {
        let scale = Scale::from_khz(Khz::new(u64::from(khz)).unwrap());
        PageClock { tsc_timestamp: GuestTsc(tsc), system_time: VmTime(vm), scale }
    }

    #[test]
    fn before_the_base_time_stands_still() {
        let page = page(1000, 77, 2_000_000);
        assert_eq!(page.vm_time(GuestTsc(999)), VmTime(77));
        assert_eq!(page.vm_time(GuestTsc(1002)), VmTime(78));
        assert_eq!(page.least_tsc(VmTime(3)), Some(GuestTsc(1000)));
        assert_eq!(page.now(GuestTsc(1002)), Now::new(GuestTsc(1002), VmTime(78)));
    }

    #[test]
    fn the_ends_saturate_or_say_so() {
        let slow = page(0, u64::MAX - 5, 10_000);
        assert_eq!(slow.vm_time(GuestTsc(u64::MAX)), VmTime(u64::MAX));
        let late = page(u64::MAX - 5, 0, 2_000_000);
        assert_eq!(late.least_tsc(VmTime(2)), Some(GuestTsc(u64::MAX - 1)));
        assert_eq!(late.least_tsc(VmTime(3)), None);
    }

    proptest! {
        #[test]
        fn least_tsc_is_least(
            base in any::<u64>(), vm in any::<u64>(), khz in Khz::MIN.get()..=Khz::MAX.get(), at in any::<u64>(),
        ) {
            let page = page(base, vm, khz);
            match page.least_tsc(VmTime(at)) {
                Some(tsc) => {
                    prop_assert!(tsc.0 >= base && page.vm_time(tsc).0 >= at);
                    prop_assert!(tsc.0 == base || page.vm_time(GuestTsc(tsc.0 - 1)).0 < at);
                }
                None => prop_assert!(page.vm_time(GuestTsc(u64::MAX)).0 < at),
            }
        }
    }
}
