#![doc = include_str!("../README.md")]
//! ## Modules
//!
//! - [`scale`]: ticks to nanoseconds by multiplier and shift, and the exact way back.
//! - [`page`]: what VM time *is*: the numbers of the published page, used in both directions.
//! - [`exact`]: VM time without rounding, which a restore continues.
//! - [`exact_span`]: a signed length of VM time without rounding, to compare two pages.
//! - [`rebase`]: gives a page another base without losing what is below a nanosecond.
//! - [`rate`]: how many ticks a guest's TSC makes for some of the host's, as a CPU that scales it computes them.
//! - [`timeline`]: how the guest's TSC runs against the host's, or by itself in virtual time.
//! - [`reference_clock`]: a second opinion on VM time that knows nothing of pages.
//! - [`adjust`]: what a restore does to TSC, VM time and the deadline in flight.
//! - [`length`]: lengths of time for people.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

pub mod adjust;
pub mod exact;
pub mod exact_span;
pub mod length;
pub mod page;
pub mod rate;
pub mod rebase;
pub mod reference_clock;
pub mod scale;
pub mod timeline;
pub mod units;

pub use adjust::{AdjustError, Adjusted, DeadlinePolicy, DowntimePolicy, Due, Moment, Stood};
pub use exact::{BadFraction, ExactTime, Remainder};
pub use exact_span::ExactSpan;
pub use length::Length;
pub use page::PageClock;
pub use rate::Rate;
pub use reference_clock::{ReferenceClock, ReferenceClockState};
pub use scale::{BadScale, Scale};
pub use timeline::Timeline;
pub use units::{GuestTsc, HostTsc, Khz, Now, TscAdjust, VmTime};

/// Nanoseconds × kHz ÷ this = ticks: 10⁹ ns/s ÷ 10³ Hz/kHz.
pub const NS_KHZ_PER_TICK: u128 = 1_000_000;

/// `n`, or [`u64::MAX`] if it is larger: the end of a 64-bit clock's range, where a clock stands still instead of
/// wrapping to its beginning and making everything armed on it due.
#[must_use]
pub fn saturate(n: u128) -> u64 {
    u64::try_from(n).unwrap_or(u64::MAX)
}
