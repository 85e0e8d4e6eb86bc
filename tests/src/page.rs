//! kvmclock's arithmetic in 128 bits, written from the definition (Linux `Documentation/virt/kvm/x86/msr.rst`,
//! MSR_KVM_SYSTEM_TIME_NEW) and not shared with `vmm`, so that an error in `vmm`'s arithmetic does not hide itself.

/// The numbers of a published page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page {
    /// Guest TSC at which the clock showed `system_time`.
    pub tsc_timestamp: u64,
    /// Nanoseconds.
    pub system_time: u64,
    /// 32-bit fraction.
    pub mul: u32,
    /// Left shift of the TSC delta; right if negative.
    pub shift: i8,
}

impl Page {
    /// The guest's kvmclock reading when RDTSC returns `tsc`.
    ///
    /// # Panics
    /// For a `tsc` before the page's base.
    #[must_use]
    pub fn ns(&self, tsc: u64) -> i128 {
        let delta = u128::from(tsc.checked_sub(self.tsc_timestamp).expect("a TSC after the page's base"));
        let places = u32::from(self.shift.unsigned_abs());
        let shifted = if self.shift < 0 { delta >> places } else { delta << places };
        let ns = u128::from(self.system_time) + ((shifted * u128::from(self.mul)) >> 32);
        i128::try_from(ns).expect("far below 2^127")
    }

    /// The line through the page's base at `tsc`, without the roundings of a reading: in units of 1 / [`Self::PER_NS`]
    /// ns.
    ///
    /// # Panics
    /// For a `tsc` before the page's base, and for a TSC of 256 GHz or more.
    #[must_use]
    pub fn line(&self, tsc: u64) -> i128 {
        let delta = i128::from(tsc.checked_sub(self.tsc_timestamp).expect("a TSC after the page's base"));
        let places = u32::try_from(self.shift + 8).expect("a TSC below 256 GHz");
        i128::from(self.system_time) * Self::PER_NS + ((delta * i128::from(self.mul)) << places)
    }

    /// The unit of [`Self::line`]: 2^-40 ns.
    pub const PER_NS: i128 = 1 << 40;

    /// The least TSC, not before the page's base, at which the clock shows `ns` or more: by bisection, which needs no
    /// inverse of the formula.
    #[must_use]
    pub fn least_tsc(&self, ns: i128) -> u64 {
        let (mut low, mut high) = (self.tsc_timestamp, u64::MAX);
        while low < high {
            let middle = low + (high - low) / 2;
            if self.ns(middle) >= ns { high = middle } else { low = middle + 1 }
        }
        low
    }
}

#[cfg(test)]
mod tests {
    use super::Page;

    #[test]
    fn the_documents_formula() {
        // 2 GHz: half a nanosecond a tick, 0x80000000 / 2^32.
        let page = Page { tsc_timestamp: 100, system_time: 7, mul: 1 << 31, shift: 0 };
        assert_eq!([100, 101, 102, 110].map(|tsc| page.ns(tsc)), [7, 7, 8, 12]);
        assert_eq!([7, 8, 12].map(|ns| page.least_tsc(ns)), [100, 102, 110]);
        assert_eq!([100, 101].map(|tsc| page.line(tsc) * 2 / Page::PER_NS), [14, 15]);
        let slow = Page { shift: 3, ..page };
        assert_eq!(slow.ns(101), 11);
        let fast = Page { shift: -3, ..page };
        assert_eq!((fast.ns(107), fast.ns(116), fast.least_tsc(8)), (7, 8, 116));
    }
}
