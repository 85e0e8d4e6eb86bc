//! Exact integer arithmetic that the tables of the study share.

/// `num / den` to the nearest integer, a half away from zero; `den` is positive.
#[must_use]
pub fn nearest(num: i128, den: i128) -> i128 {
    (num.abs() * 2 + den) / (den * 2) * num.signum()
}

/// `num / den` rounded up; `den` is positive.
#[must_use]
pub fn ceil(num: i128, den: i128) -> i128 {
    -(-num).div_euclid(den)
}

/// How far a clock is from the truth after `over_ns`, in picoseconds: it adds `mul / 2^bits` ns a tick, and the counter
/// has `hz` ticks a second. Positive if it is ahead.
///
/// `over_ns · (hz · mul / (10⁹ · 2^bits) − 1)`. With `bits` up to 63, `hz` up to 10¹¹ and a clock that is wrong by less
/// than a thousandth, the products of a century stay below 2¹²⁷. Past that they saturate.
#[must_use]
pub fn drift_ps(over_ns: u64, hz: u64, mul: u128, bits: u32) -> i128 {
    let truth = 1_000_000_000_i128 << bits;
    let clock = i128::try_from(mul).unwrap_or(i128::MAX).saturating_mul(i128::from(hz));
    let error = clock.saturating_sub(truth).saturating_mul(i128::from(over_ns));
    // Whole nanoseconds and the rest apart, so that the factor 1000 fits.
    error / truth * 1000 + nearest(error % truth * 1000, truth)
}

/// The greatest common divisor of `a` and a `b` that is not 0, so not 0 itself.
#[must_use]
pub fn gcd(mut a: u128, mut b: u128) -> u128 {
    while a != 0 {
        (a, b) = (b % a, a);
    }
    b
}

#[cfg(test)]
mod tests {
    use super::*;

    // Catches: a quotient that is rounded toward zero, or a half that depends on the sign.
    #[test]
    fn quotients_round_as_they_say() {
        assert_eq!([5, -5, 4, -4, 1, 0].map(|num| nearest(num, 10)), [1, -1, 0, 0, 0, 0]);
        assert_eq!([5, -5, 10, 11, 0].map(|num| ceil(num, 10)), [1, 0, 1, 2, 0]);
        assert_eq!([gcd(12, 18), gcd(0, 7), gcd(7, 7)], [6, 7, 7]);
    }

    // Catches: a drift with the wrong sign, or one that is cut to whole nanoseconds. The figures are those of a page of
    // 2.6 GHz, which docs/study/rebase.md derives.
    #[test]
    fn a_drift_is_signed_and_exact() {
        let second = 1_000_000_000;
        // Exactly half a nanosecond a tick.
        assert_eq!(drift_ps(second, 2_000_000_000, 1 << 31, 32), 0);
        // One unit more of the multiplier: 2⁻³¹ of a second fast.
        assert_eq!(drift_ps(second, 2_000_000_000, (1 << 31) + 1, 32), 466);
        assert_eq!(drift_ps(second, 2_000_000_000, (1 << 31) - 1, 32), -466);
        assert_eq!(drift_ps(3600 * second, 2_600_000_000, 3_303_820_996, 33), -1_005_828);
    }
}
