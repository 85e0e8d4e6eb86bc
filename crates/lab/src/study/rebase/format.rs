//! A kvmclock page's multiplier and shift, as a guest computes with them and as the exact line that they describe.
//!
//! [`vmtime::Scale`] is what this VMM publishes. This one also allows multipliers below 2³¹, which KVM never chooses:
//! the study compares the shifts that a host could choose.

use vmtime::{Khz, Scale};

use crate::study::exact;

/// An hour.
const HOUR_NS: u64 = 3_600_000_000_000;

/// `tsc_to_system_mul` and `tsc_shift` of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    mul: u32,
    shift: i8,
}

impl Format {
    /// What KVM publishes for a TSC of `khz` (`kvm_get_time_scale` in Linux `arch/x86/kvm/x86.c`).
    #[must_use]
    pub fn of_kvm(khz: Khz) -> Self {
        let scale = Scale::from_khz(khz);
        Self { mul: scale.mul(), shift: scale.shift() }
    }

    /// The greatest multiplier with `shift` that does not run fast; `None` if it needs more than 32 bits, or has fewer
    /// than [`Self::LEAST_BITS`].
    #[must_use]
    pub fn with_shift(khz: Khz, shift: i8) -> Option<Self> {
        if !(-Scale::MAX_SHIFT..=Scale::MAX_SHIFT).contains(&shift) {
            return None;
        }
        let hz = u128::from(khz.get()) * 1000;
        let bits = u32::try_from(32 - i32::from(shift)).ok()?; // 1..=63
        let mul = u32::try_from((1_000_000_000_u128 << bits) / hz).ok()?;
        (mul >> (Self::LEAST_BITS - 1) != 0).then_some(Self { mul, shift })
    }

    /// Bits of a multiplier below which nobody would publish a page: it is wrong by up to 2⁻¹⁵.
    pub const LEAST_BITS: u32 = 16;

    /// `tsc_to_system_mul`.
    #[must_use]
    pub fn mul(self) -> u32 {
        self.mul
    }

    /// `tsc_shift`.
    #[must_use]
    pub fn shift(self) -> i8 {
        self.shift
    }

    /// By how many bits the guest shifts a delta to the right.
    #[must_use]
    pub fn right(self) -> u32 {
        u32::from(self.shift.min(0).unsigned_abs())
    }

    /// By how many bits the guest shifts a delta to the left.
    fn left(self) -> u32 {
        u32::from(self.shift.max(0).unsigned_abs())
    }

    /// Nanoseconds that a guest reads `ticks` after the base, as long as its 64-bit delta loses no bit.
    #[must_use]
    pub fn read_ns(self, ticks: u64) -> u128 {
        (((u128::from(ticks) >> self.right()) << self.left()) * u128::from(self.mul)) >> 32
    }

    /// The exact line: what one tick adds, in units of 2^−[`Self::line_bits`] ns.
    #[must_use]
    pub fn tick(self) -> u128 {
        u128::from(self.mul) << self.left()
    }

    /// Fraction bits of the exact line: 32, and those that the guest shifts out of the delta.
    #[must_use]
    pub fn line_bits(self) -> u32 {
        32 + self.right()
    }

    /// How far the exact line is from a TSC of `khz` after an hour, in picoseconds. Positive if it is ahead.
    #[must_use]
    pub fn drift_ps_per_hour(self, khz: Khz) -> i128 {
        exact::drift_ps(HOUR_NS, u64::from(khz.get()) * 1000, self.tick(), self.line_bits())
    }

    /// A format that no frequency has, with few enough residues to try them all.
    #[cfg(test)]
    pub(super) fn of(mul: u32, shift: i8) -> Self {
        Self { mul, shift }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn khz(khz: u64) -> Khz {
        Khz::new(khz).unwrap()
    }

    // Catches: another shift than KVM's, or a multiplier that is not the greatest.
    #[test]
    fn with_kvms_shift_the_multiplier_is_kvms() {
        for frequency in [1_000_000, 1_300_000, 2_000_000, 2_100_000, 2_600_000, 3_900_000, 5_200_000] {
            let kvm = Format::of_kvm(khz(frequency));
            assert_eq!(Format::with_shift(khz(frequency), kvm.shift()), Some(kvm), "{frequency}");
            // One shift less would need 33 bits.
            assert_eq!(Format::with_shift(khz(frequency), kvm.shift() - 1), None, "{frequency}");
        }
        assert_eq!(Format::with_shift(khz(2_600_000), 31), None, "the multiplier has 1 bit");
        assert_eq!(Format::with_shift(khz(2_600_000), 32), None);
        assert_eq!(Format::of_kvm(khz(2_600_000)).drift_ps_per_hour(khz(2_600_000)), -1_005_828);
    }

    proptest! {
        // Catches: a reading that is not the guest's.
        #[test]
        fn a_reading_is_that_of_the_vmms_own_arithmetic(
            frequency in Khz::MIN.get()..=Khz::MAX.get(), ticks in any::<u64>(), by in 0_u32..64,
        ) {
            let (scale, format) = (Scale::from_khz(khz(frequency.into())), Format::of_kvm(khz(frequency.into())));
            prop_assert_eq!(format.read_ns(ticks >> by), scale.ns(ticks >> by));
        }
    }
}
