//! The multipliers and ratios that kernels derive from a frequency, as they derive them.

use vmtime::Khz;

/// A clock that adds `mul / 2^shift` units a tick.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MultShift {
    /// The multiplier.
    pub mult: u32,
    /// Fraction bits.
    pub shift: u32,
}

/// Linux `clocks_calc_mult_shift(mult, shift, from, to, maxsec)` (`kernel/time/clocksource.c`): the most precise
/// multiplier whose products do not overflow 64 bits in `maxsec` seconds, rounded to nearest.
#[must_use]
pub fn clocks_calc_mult_shift(from: u32, to: u32, maxsec: u32) -> MultShift {
    let used = (u64::from(maxsec) * u64::from(from)) >> 32;
    let room = 32_u32.saturating_sub(u64::BITS - used.leading_zeros());
    let mult = |shift: u32| ((u64::from(to) << shift) + u64::from(from) / 2) / u64::from(from);
    let shift = (1..=32).rev().find(|shift| mult(*shift) >> room == 0).unwrap_or(0);
    MultShift { mult: u32::try_from(mult(shift)).unwrap_or(u32::MAX), shift }
}

/// `sched_clock()` on a TSC of `khz`: `__set_cyc2ns_scale` in Linux `arch/x86/kernel/tsc.c`. Its shift is at most 31.
#[must_use]
pub fn cyc2ns(khz: Khz) -> MultShift {
    let MultShift { mult, shift } = clocks_calc_mult_shift(khz.get(), 1_000_000, 0);
    if shift == 32 { MultShift { mult: mult >> 1, shift: 31 } } else { MultShift { mult, shift } }
}

/// `CLOCK_MONOTONIC_RAW` on the clocksource `tsc`: `__clocksource_update_freq_scale` in Linux
/// `kernel/time/clocksource.c` with a scale of 1000, for at most 600 s between two updates.
#[must_use]
pub fn clocksource(khz: Khz) -> MultShift {
    const SCALE: u32 = 1000;
    const MOST_S: u32 = 600;
    clocks_calc_mult_shift(khz.get(), 1_000_000_000 / SCALE, MOST_S * SCALE)
}

/// The TSC multiplier with `bits` fraction bits that KVM sets for a guest TSC of `guest` on a host TSC of `host`
/// (`set_tsc_khz` in Linux `arch/x86/kvm/x86.c`), and what its rounding down dropped, in units of 1 / `host`.
#[must_use]
pub fn tsc_ratio(guest: Khz, host: Khz, bits: u32) -> (u128, u128) {
    let (wide, host) = (u128::from(guest.get()) << bits, u128::from(host.get()));
    (wide / host, wide % host)
}

/// A VMClock's `counter_period_shift` and what rounding down its `counter_period_frac_sec` dropped, in units of 1 /
/// `hz` (Linux `include/uapi/linux/vmclock-abi.h`): the period is in units of 2^−(64 + shift) s and has 64 bits.
#[must_use]
pub fn vmclock(hz: u64) -> (u32, u128) {
    let shift = hz.max(2).ilog2(); // 2⁶⁴ ≤ 2^(64 + shift) · 2 / hz
    let shift = if hz.is_power_of_two() { shift - 1 } else { shift }; // the period must stay below 2⁶⁴
    (shift, (1_u128 << (64 + shift)) % u128::from(hz.max(1)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn khz(khz: u64) -> Khz {
        Khz::new(khz).unwrap()
    }

    // Catches: another multiplier than the kernel's. The values are those that its loops give by hand.
    #[test]
    fn multipliers_are_the_kernels() {
        // 10⁶ · 2³² / 2.6·10⁶ = 1651910498.46…, halved because a shift of 32 is not allowed.
        assert_eq!(cyc2ns(khz(2_600_000)), MultShift { mult: 1_651_910_498 >> 1, shift: 31 });
        // At 1 GHz 2³² does not fit.
        assert_eq!(cyc2ns(khz(1_000_000)), MultShift { mult: 1 << 31, shift: 31 });
        // 600 s at 2.6 GHz are 363 · 2³² ticks: nine bits, so 23 are left for the multiplier.
        assert_eq!(clocksource(khz(2_600_000)), MultShift { mult: 6_452_775, shift: 24 });
        assert_eq!(tsc_ratio(khz(2_500_000), khz(3_000_000), 48), ((5_u128 << 48) / 6, 1_000_000));
        assert_eq!(vmclock(2_600_000_000).0, 31);
        assert_eq!(vmclock(1 << 30), (29, 0));
    }

    proptest! {
        // Catches: a multiplier that does not fit, or that is not the nearest.
        #[test]
        fn a_multiplier_is_the_nearest_that_fits(frequency in Khz::MIN.get()..=Khz::MAX.get(), maxsec in 0_u32..1_000_000) {
            let MultShift { mult, shift } = clocks_calc_mult_shift(frequency, 1_000_000, maxsec);
            let exact = 1_000_000_u128 << shift;
            prop_assert!((u128::from(mult) * u128::from(frequency)).abs_diff(exact) * 2 <= u128::from(frequency));
            // In `maxsec` seconds the product stays below 2⁶⁵: the kernel's loop counts whole bits.
            prop_assert!(u128::from(maxsec) * u128::from(frequency) * u128::from(mult) < 1 << 65);
        }
    }
}
