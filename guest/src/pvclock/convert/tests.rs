//! The conversions against references written independently of them.

use proptest::prelude::*;

use super::*;
use crate::mock::page_at;

/// `page(d)` without wrapping: what the page shows at TSC `d`, which is not below its base.
fn page_ns(page: &TimeInfo, d: u64) -> u128 {
    let delta = u128::from(d - page.tsc_timestamp);
    let shifted =
        if page.tsc_shift < 0 { delta >> -i32::from(page.tsc_shift) } else { delta << i32::from(page.tsc_shift) };
    u128::from(page.system_time) + ((shifted * u128::from(page.tsc_to_system_mul)) >> 32)
}

/// The thread's first version, statement by statement, with C's wrapping written out in wider integers.
fn posted_c(page: &TimeInfo, ns: u64) -> u64 {
    const U64: u128 = 1 << 64;
    if ns < page.system_time {
        return page.tsc_timestamp;
    }
    let mut delta_ns = u128::from(ns - page.system_time);
    if delta_ns > (1 << 38) - 1 {
        delta_ns = (1 << 38) - 1;
    }
    let mut shift = 32 - i32::from(page.tsc_shift);
    delta_ns = (delta_ns << (64 - 38)) % U64;
    shift -= 64 - 38;
    let mut tsc = delta_ns / u128::from(page.tsc_to_system_mul);
    if shift < 0 {
        tsc >>= -shift;
    } else {
        tsc = (tsc << shift) % U64;
    }
    u64::try_from((tsc + u128::from(page.tsc_timestamp)) % U64).unwrap()
}

/// The reviewer's version: `mul_u64_u64_shr` of the cached multiplier.
fn reviewed_c(page: &TimeInfo, ns: u64) -> u64 {
    const U64: u128 = 1 << 64;
    if ns < page.system_time {
        return page.tsc_timestamp;
    }
    let mult = (1u128 << 63) / u128::from(page.tsc_to_system_mul);
    let shift = 63 - (32 - i32::from(page.tsc_shift));
    let product = u128::from(ns - page.system_time).checked_mul(mult).unwrap();
    let tsc = (product >> shift) % U64;
    u64::try_from((tsc + u128::from(page.tsc_timestamp)) % U64).unwrap()
}

prop_compose! {
    fn pages()(
        tsc in prop_oneof![any::<u64>(), 0..1u64 << 48],
        ns in prop_oneof![any::<u64>(), 0..1u64 << 48],
        mul in prop_oneof![MUL_MIN..=u32::MAX, Just(MUL_MIN), Just(u32::MAX)],
        shift in -SHIFT_MAX..=SHIFT_MAX,
    ) -> TimeInfo {
        page_at(2, tsc, ns, mul, shift)
    }
}

fn bad_pages() -> impl Strategy<Value = (u32, i8)> {
    prop_oneof![(0..MUL_MIN, any::<i8>()), (any::<u32>(), prop_oneof![i8::MIN..-SHIFT_MAX, SHIFT_MAX + 1..=i8::MAX])]
}

fn times() -> impl Strategy<Value = u64> {
    prop_oneof![any::<u64>(), 0..1u64 << 40, (0..64u32).prop_map(|n| 1 << n), (0..64u32).prop_map(|n| (1 << n) - 1)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]

    #[test]
    fn exact_is_the_least_deadline_that_is_not_early(page in pages(), delta in times()) {
        let ns = page.system_time.saturating_add(delta);
        let d = exact(&page, ns).unwrap();
        prop_assert!(d >= page.tsc_timestamp);
        prop_assert!(d == u64::MAX || page_ns(&page, d) >= u128::from(ns));
        prop_assert!(d == page.tsc_timestamp || page_ns(&page, d - 1) < u128::from(ns));
    }

    #[test]
    fn exact_is_the_formula(page in pages(), ns in times()) {
        let delta = u128::from(ns.saturating_sub(page.system_time));
        let m = (delta << 32).div_ceil(u128::from(page.tsc_to_system_mul));
        let s = i32::from(page.tsc_shift);
        let ticks = if s < 0 { m << -s } else { m.div_ceil(1 << s) };
        let want = u64::try_from(u128::from(page.tsc_timestamp) + ticks).unwrap_or(u64::MAX);
        prop_assert_eq!(exact(&page, ns).unwrap(), want);
    }

    #[test]
    fn split_is_the_posted_arithmetic(page in pages(), ns in times(), near in any::<bool>()) {
        let ns = if near { page.system_time.saturating_add(ns) } else { ns };
        prop_assert_eq!(split(&page, ns).unwrap(), posted_c(&page, ns));
    }

    #[test]
    fn mult_is_the_reviewed_arithmetic(page in pages(), ns in times(), near in any::<bool>()) {
        let ns = if near { page.system_time.saturating_add(ns) } else { ns };
        let cached = cached_mult(page.tsc_to_system_mul).unwrap();
        prop_assert_eq!(mult(&page, cached, ns).unwrap(), reviewed_c(&page, ns));
    }

    #[test]
    fn other_pages_are_errors((mul, shift) in bad_pages(), ns in any::<u64>()) {
        let page = page_at(2, 0, 0, mul, shift);
        let bad = Err(BadPage { mul, shift });
        prop_assert_eq!(split(&page, ns), bad);
        prop_assert_eq!(mult_of(&page, ns), bad);
        prop_assert_eq!(exact(&page, ns), bad);
    }
}

fn mult_of(page: &TimeInfo, ns: u64) -> Result<u64, BadPage> {
    mult(page, cached_mult(page.tsc_to_system_mul).unwrap_or(0), ns)
}

#[test]
fn a_past_expiry_gives_the_base_in_all_three() {
    let page = page_at(2, 777, 1_000, 3_303_820_997, -1);
    for ns in [0, 999, 1_000] {
        assert_eq!(split(&page, ns), Ok(777));
        assert_eq!(mult_of(&page, ns), Ok(777));
        assert_eq!(exact(&page, ns), Ok(777));
    }
}

#[test]
fn split_caps_at_38_bits() {
    let page = page_at(2, 0, 0, 3_303_820_997, -1);
    assert_eq!(split(&page, 1 << 38), split(&page, CAP_NS));
    assert_ne!(split(&page, CAP_NS), split(&page, CAP_NS - 100));
}

#[test]
fn at_2600_mhz_both_of_the_thread_are_early_and_exact_is_not() {
    // The bounds of `split`: its step is 2^7 ticks, 50 ns.
    let page = page_at(2, 0, 0, 3_303_820_997, -1);
    let (mut worst_split, mut worst_mult) = (0, 0);
    for ns in (1..CAP_NS).step_by(99_999_989) {
        let early = |d: u64| i128::from(ns) - i128::try_from(page_ns(&page, d)).unwrap();
        worst_split = worst_split.max(early(split(&page, ns).unwrap()));
        worst_mult = worst_mult.max(early(mult_of(&page, ns).unwrap()));
        assert!(early(exact(&page, ns).unwrap()) <= 0);
    }
    assert!((1..=50).contains(&worst_split), "{worst_split}");
    // Its multiplier is short by less than one part in 2^31, which over 275 s is up to 128 ns on a bad page.
    assert!((1..=128).contains(&worst_mult), "{worst_mult}");
}
