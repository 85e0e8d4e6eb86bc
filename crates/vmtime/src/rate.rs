//! How many ticks a guest's TSC makes while the host's makes some: exactly the quotient of two frequencies, or as a CPU
//! that scales the TSC computes it.

use crate::{Khz, saturate};

/// The rate of a guest's TSC against the host's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rate {
    /// `⌊ticks · guest / host⌋`.
    Quotient {
        /// The guest TSC's frequency.
        guest: Khz,
        /// The host TSC's frequency.
        host: Khz,
    },
    /// `⌊ticks · ratio / 2^bits⌋`, which a CPU computes of the host's whole TSC.
    FixedPoint {
        /// The ratio of the frequencies, times 2^bits, rounded down.
        ratio: u64,
        /// The number of the ratio's fraction bits.
        bits: u8,
    },
}

impl Rate {
    /// Fraction bits of the TSC multiplier of VMX (SDM vol. 3, "Time-Stamp Counter Multiplier").
    pub const VMX_BITS: u8 = 48;
    /// Fraction bits of MSR C000_0104, the TSC ratio of SVM (AMD APM vol. 2, "TSC Ratio MSR").
    pub const SVM_BITS: u8 = 32;

    /// The ratio that KVM programs for a guest of `guest` on a host of `host` (`set_tsc_khz` in Linux
    /// `arch/x86/kvm/x86.c`). None if the ratio has more than 64 bits, or is 0.
    #[must_use]
    pub fn fixed_point(guest: Khz, host: Khz, bits: u8) -> Option<Self> {
        let one = 1u128.checked_shl(u32::from(bits))?;
        let ratio = one.checked_mul(u128::from(guest.get()))? / u128::from(host.get());
        Self::from_ratio(u64::try_from(ratio).ok()?, bits)
    }

    /// The rate of a CPU's `ratio` with `bits` fraction bits. None for a ratio of 0, and for 64 bits or more.
    #[must_use]
    pub fn from_ratio(ratio: u64, bits: u8) -> Option<Self> {
        (ratio > 0 && bits < 64).then_some(Self::FixedPoint { ratio, bits })
    }

    /// The guest's ticks between the host TSCs `from` and `to`; 0 if `to` is before.
    #[must_use]
    pub fn ticks(&self, from: u64, to: u64) -> u64 {
        match *self {
            Self::Quotient { guest, host } => {
                // Below 2⁶⁴ · 2²⁷.
                saturate(u128::from(to.saturating_sub(from)) * u128::from(guest.get()) / u128::from(host.get()))
            }
            Self::FixedPoint { .. } => saturate(self.whole(to).saturating_sub(self.whole(from))),
        }
    }

    /// What a CPU makes of the host's TSC, before an offset: modulo 2^64.
    #[must_use]
    pub fn scaled(&self, host: u64) -> u64 {
        match *self {
            Self::Quotient { .. } => self.ticks(0, host),
            #[allow(clippy::cast_possible_truncation, reason = "a TSC is a number modulo 2^64")]
            Self::FixedPoint { .. } => self.whole(host) as u64,
        }
    }

    /// The least host TSC, not before `from`, by which the guest makes `ticks`; none if the host's TSC ends before
    /// that.
    #[must_use]
    pub fn host_after(&self, from: u64, ticks: u64) -> Option<u64> {
        match *self {
            // `⌊x · guest / host⌋ ≥ n` exactly if `x · guest ≥ n · host`.
            Self::Quotient { guest, host } => {
                let x = (u128::from(ticks) * u128::from(host.get())).div_ceil(u128::from(guest.get()));
                from.checked_add(u64::try_from(x).ok()?)
            }
            // `⌊y · ratio / 2^bits⌋ ≥ n` exactly if `y · ratio ≥ n · 2^bits`. Here y is the whole TSC.
            Self::FixedPoint { ratio, bits } => {
                let target = self.whole(from) + u128::from(ticks);
                let scaled = target.checked_mul(1u128.checked_shl(u32::from(bits))?)?;
                u64::try_from(scaled.div_ceil(u128::from(ratio))).ok().map(|host| host.max(from))
            }
        }
    }

    /// The fixed-point product of a whole host TSC; below 2¹²⁸ before the shift.
    fn whole(&self, host: u64) -> u128 {
        match *self {
            Self::Quotient { .. } => u128::from(self.ticks(0, host)),
            Self::FixedPoint { ratio, bits } => (u128::from(host) * u128::from(ratio)) >> bits,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn khz(n: u32) -> Khz {
        Khz::new(u64::from(n)).unwrap()
    }

    // SDM and APM: 1.0 is 2^48 and 2^32.
    #[test]
    fn the_ratio_of_equal_frequencies_is_one() {
        for (bits, one) in [(Rate::VMX_BITS, 1 << 48), (Rate::SVM_BITS, 1 << 32)] {
            let rate = Rate::fixed_point(khz(2_600_000), khz(2_600_000), bits).unwrap();
            assert_eq!(rate, Rate::FixedPoint { ratio: one, bits });
            assert_eq!((rate.ticks(7, 1_000), rate.host_after(7, 993)), (993, Some(1_000)));
        }
        assert_eq!(Rate::from_ratio(0, 32), None);
        assert_eq!(Rate::from_ratio(1, 64), None);
        // 10 THz on 10 MHz would need 49 bits before the point.
        assert_eq!(Rate::fixed_point(khz(100_000_000), khz(10_000), 63), None);
    }

    // Catches: a deadline under the source `scaled` that is computed with the exact quotient. A CPU's ratio is rounded
    // down, so its guest's TSC is behind: after 275 s at a third of 3 GHz by some 40 ticks with SVM's 32 bits.
    #[test]
    fn a_rounded_ratio_is_slower_than_the_quotient() {
        let (guest, host) = (khz(1_000_000), khz(3_000_000));
        let exact = Rate::Quotient { guest, host };
        let svm = Rate::fixed_point(guest, host, Rate::SVM_BITS).unwrap();
        let ticks = 275_000_000_000;
        let (soon, late) = (exact.host_after(0, ticks).unwrap(), svm.host_after(0, ticks).unwrap());
        assert!(svm.ticks(0, soon) < ticks - 40, "early by {}", ticks - svm.ticks(0, soon));
        assert!(late - soon > 100 && svm.ticks(0, late) == ticks);
    }

    proptest! {
        // The reference is what the manuals say of the CPU: multiply, shift, add an offset.
        #[test]
        fn ticks_are_those_of_a_cpu_that_scales_its_whole_tsc(
            from in any::<u64>(), by in any::<u64>(), guest in 10_000..100_000_001_u32, host in 10_000..100_000_001_u32,
            vmx in any::<bool>(),
        ) {
            let bits = if vmx { Rate::VMX_BITS } else { Rate::SVM_BITS };
            let rate = Rate::fixed_point(khz(guest), khz(host), bits).unwrap();
            let to = from.saturating_add(by);
            let Rate::FixedPoint { ratio, .. } = rate else { panic!("{rate:?}") };
            let cpu = |host: u64| (u128::from(host) * u128::from(ratio)) >> bits;
            prop_assert_eq!(u128::from(ratio), (u128::from(guest) << bits) / u128::from(host));
            prop_assert_eq!(u128::from(rate.ticks(from, to)), (cpu(to) - cpu(from)).min(u128::from(u64::MAX)));
            prop_assert_eq!(u128::from(rate.scaled(to)), cpu(to) % (1 << 64));
            prop_assert_eq!(rate.ticks(to, from), 0);
        }

        #[test]
        fn host_after_is_the_least(
            from in any::<u64>(), by in 0_u32..64, ticks in any::<u64>(), short in 0_u32..64,
            guest in 10_000..100_000_001_u32, host in 10_000..100_000_001_u32, kind in 0..3,
        ) {
            let (guest, host, from, ticks) = (khz(guest), khz(host), from >> by, ticks >> short);
            let rate = match kind {
                0 => Rate::Quotient { guest, host },
                1 => Rate::fixed_point(guest, host, Rate::VMX_BITS).unwrap(),
                _ => Rate::fixed_point(guest, host, Rate::SVM_BITS).unwrap(),
            };
            match rate.host_after(from, ticks) {
                Some(at) => {
                    prop_assert!(at >= from && rate.ticks(from, at) >= ticks);
                    prop_assert!(at == from || rate.ticks(from, at - 1) < ticks);
                }
                None => prop_assert!(rate.ticks(from, u64::MAX) < ticks),
            }
        }
    }
}
