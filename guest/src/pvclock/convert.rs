//! Converts a VM time to the TSC value at which the page shows it: the three conversions under study.
//!
//! All take the page as read under one version. A multiplier or shift that no host publishes is an error:
//! `mul` is normalised to [2^31, 2^32) by KVM (`kvm_get_time_scale`) and by this project's VMM, and outside
//! −31..=31 the shifts below would leave their words.

use core::fmt;
use core::hint::cold_path;

use guest_abi::pvclock::TimeInfo;

use super::low64;

/// Least `tsc_to_system_mul` of a normalised page.
pub const MUL_MIN: u32 = 1 << 31;
/// Largest magnitude of `tsc_shift`.
pub const SHIFT_MAX: i8 = 31;
/// [`split`] waits no longer than this many bits of nanoseconds: 275 s.
pub const CAP_BITS: u32 = 38;
/// The longest wait of [`split`], in nanoseconds.
pub const CAP_NS: u64 = (1 << CAP_BITS) - 1;

/// The arithmetic that converts nanoseconds to a deadline.
// `repr(u8)`: one comparison distinguishes two of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Conversion {
    /// The patch as posted: see [`split`].
    Split,
    /// The patch as reviewed: see [`mult`].
    Mult,
    /// The exact inverse: see [`exact`].
    Exact,
}

impl Conversion {
    /// Its name on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Split => "split",
            Self::Mult => "mult",
            Self::Exact => "exact",
        }
    }
}

/// A page whose numbers cannot be inverted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadPage {
    /// Its `tsc_to_system_mul`.
    pub mul: u32,
    /// Its `tsc_shift`.
    pub shift: i8,
}

impl fmt::Display for BadPage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { mul, shift } = *self;
        write!(f, "kvmclock page with mul {mul} and shift {shift} cannot be inverted")
    }
}

impl core::error::Error for BadPage {}

/// Checks the page; returns nanoseconds from its base to `expires_ns`, or 0 if that is in the past.
#[inline(always)]
fn delta_ns(page: &TimeInfo, expires_ns: u64) -> Result<u64, BadPage> {
    if page.tsc_to_system_mul < MUL_MIN || !(-SHIFT_MAX..=SHIFT_MAX).contains(&page.tsc_shift) {
        return Err(BadPage { mul: page.tsc_to_system_mul, shift: page.tsc_shift });
    }
    Ok(expires_ns.saturating_sub(page.system_time))
}

/// As posted: the wait capped at [`CAP_NS`], shifted left by 26, divided by `mul`, shifted by the rest.
///
/// `shift = 32 - tsc_shift - 26` lies in −25..=37, so no shift is undefined in C; a left shift drops high bits and the
/// sum wraps, as `u64` does there. Rounds down: the result may be early in VM time. `expires_ns` before the page's
/// base gives its `tsc_timestamp`.
///
/// # Errors
/// [`BadPage`] for a page that is not normalised.
#[inline(always)]
pub fn split(page: &TimeInfo, expires_ns: u64) -> Result<u64, BadPage> {
    const FIRST: u32 = 64 - CAP_BITS;
    let delta = delta_ns(page, expires_ns)?.min(CAP_NS);
    let quotient = (delta << FIRST) / u64::from(page.tsc_to_system_mul);
    let rest = 32 - 26 - i32::from(page.tsc_shift);
    let by = rest.unsigned_abs();
    let ticks = if rest < 0 { slow_tsc(quotient, by) } else { quotient << by };
    Ok(page.tsc_timestamp.wrapping_add(ticks))
}

/// The shift for a TSC of 30 MHz or less. A function of its own, so that a faster TSC does not compute both shifts.
#[cold]
#[inline(never)]
fn slow_tsc(quotient: u64, by: u32) -> u64 {
    quotient >> by
}

/// The multiplier of [`mult`] for a page's `mul`: `2^63 / mul`; `None` for a `mul` of 0.
#[must_use]
pub fn cached_mult(mul: u32) -> Option<u64> {
    (1u64 << 63).checked_div(u64::from(mul))
}

/// As reviewed: `tsc_timestamp + ((delta_ns * mult) >> (63 - (32 - tsc_shift)))` with a 128-bit product.
///
/// `mult` is [`cached_mult`] of this page's multiplier. The shift lies in 0..=62; the product's high bits and the sum
/// wrap, as `u64` does in C. Rounds down twice, so the error grows with the wait. `expires_ns` before the page's base
/// gives its `tsc_timestamp`.
///
/// # Errors
/// [`BadPage`] for a page that is not normalised.
#[inline(always)]
pub fn mult(page: &TimeInfo, mult: u64, expires_ns: u64) -> Result<u64, BadPage> {
    let delta = delta_ns(page, expires_ns)?;
    // 63 - (32 - tsc_shift), which the range check keeps at 0 or more.
    let shift = (31 + i32::from(page.tsc_shift)).unsigned_abs();
    let ticks = low64((u128::from(delta) * u128::from(mult)) >> shift);
    Ok(page.tsc_timestamp.wrapping_add(ticks))
}

/// The least TSC value `d` with `page(d) >= expires_ns`; `u64::MAX` if no 64-bit TSC value reaches it.
///
/// With `m = ceil((delta_ns << 32) / mul)`, the page shows at least `delta_ns` exactly when the shifted TSC delta is
/// at least `m`: so `m << -tsc_shift` for a right shift and `ceil(m / 2^tsc_shift)` for a left one. Two 64-bit
/// divisions give the 96-by-32-bit quotient digit by digit: the first remainder is below `mul`, so its high digit is
/// zero in the second. A 128-bit division would cost the guest hundreds of emulated instructions, and sums of 128 bits
/// some: they are made only where 64 are too few.
///
/// # Errors
/// [`BadPage`] for a page that is not normalised.
#[inline(always)]
pub fn exact(page: &TimeInfo, expires_ns: u64) -> Result<u64, BadPage> {
    let delta = delta_ns(page, expires_ns)?;
    let mul = u64::from(page.tsc_to_system_mul);
    let (high, rest) = (delta / mul, delta % mul);
    let (low, rest) = ((rest << 32) / mul, (rest << 32) % mul);
    let by = u32::from(page.tsc_shift.unsigned_abs());
    // The fast path: a TSC above 1 GHz, where the sum and the deadline fit into 64 bits.
    if page.tsc_shift < 0 && high >> SHIFT_MAX == 0 {
        let m = (high << 32 | low) + u64::from(rest != 0);
        let ticks = m << by;
        if ticks >> by == m
            && let Some(deadline) = page.tsc_timestamp.checked_add(ticks)
        {
            return Ok(deadline);
        }
    }
    cold_path();
    // At most 2^65: delta < 2^64 and mul >= 2^31.
    let m = (u128::from(high) << 32) + u128::from(low) + u128::from(rest != 0);
    let ticks = if page.tsc_shift < 0 { m << by } else { (m + ((1u128 << by) - 1)) >> by };
    let deadline = u128::from(page.tsc_timestamp) + ticks;
    Ok(u64::try_from(deadline).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests;
