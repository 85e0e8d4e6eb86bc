//! KVM's LAPIC timer as an absolute instant, and back.
//!
//! KVM saves what is left of a count (TMCCT), and both of its clocks go on while it is read and while it is set. What is
//! left is therefore turned into the VM time at which it is over, and that into what is left when it is set.

use guest_abi::lapic::{LVTT, TDCR, TMCCT, TMICT};
use vlapic::{Armed, tick_ns};
use vmtime::{GuestTsc, VmTime};

use crate::kvm::state::LapicPage;

/// What the timer waits for, whose registers were `page` at VM time `now` or a little before.
///
/// Never too early: a count is the next higher one, since KVM rounds down, and `now` is not before the reading. A one-shot
/// count that is over counts as being due. Whether KVM has delivered it does not show, and an interrupt too many is better
/// than none: KVM does the same when it is given a TMCCT of 0.
pub(crate) fn armed(page: &LapicPage, tsc_deadline: u64, now: VmTime) -> Armed {
    match page.register(LVTT) >> 17 & 0b11 {
        0b10 if tsc_deadline != 0 => Armed::Tsc(GuestTsc(tsc_deadline)),
        0b00 | 0b01 if page.register(TMICT) != 0 => {
            let left = match page.register(TMCCT) {
                0 => 0,
                count => u64::from(count) + 1,
            };
            // At most 2³² · 128 ns.
            let left_ns = left * tick_ns(page.register(TDCR));
            Armed::Count { expires: VmTime(now.0.saturating_add(left_ns)) }
        }
        _ => Armed::Disarmed,
    }
}

/// Whether a one-shot count is over: then nothing of it is left that could be moved.
pub(crate) fn one_shot_is_over(page: &LapicPage) -> bool {
    page.register(LVTT) >> 17 & 0b11 == 0b00 && page.register(TMICT) != 0 && page.register(TMCCT) == 0
}

/// The registers and the TSC deadline to set, at VM time `now`, for a timer that waits for `armed`.
pub(crate) fn to_set(page: &LapicPage, armed: Armed, now: VmTime) -> (LapicPage, u64) {
    let mut page = page.clone();
    let (count, deadline) = match armed {
        Armed::Count { expires } => {
            let left = expires.0.saturating_sub(now.0).div_ceil(tick_ns(page.register(TDCR)));
            // KVM takes 0 for a whole period in periodic mode, and more than TMICT for a mistake.
            let most = page.register(TMICT);
            (u32::try_from(left).unwrap_or(u32::MAX).max(1).min(most), 0)
        }
        Armed::Tsc(deadline) => (0, deadline.0),
        Armed::Disarmed | Armed::Ns(_) => (0, 0),
    };
    page.set_register(TMCCT, count);
    (page, deadline)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn page(lvtt: u32, initial: u32, current: u32, divide: u32) -> LapicPage {
        let mut page = LapicPage::default();
        for (offset, value) in [(LVTT, lvtt), (TMICT, initial), (TMCCT, current), (TDCR, divide)] {
            page.set_register(offset, value);
        }
        page
    }

    #[test]
    fn the_mode_decides_what_is_armed() {
        let now = VmTime(1000);
        assert_eq!(armed(&page(2 << 17, 9, 9, 0), 77, now), Armed::Tsc(GuestTsc(77)));
        assert_eq!(armed(&page(2 << 17, 9, 9, 0), 0, now), Armed::Disarmed);
        // Divide by 2, and the next higher count.
        assert_eq!(armed(&page(0, 9, 5, 0), 77, now), Armed::Count { expires: VmTime(1012) });
        assert_eq!(armed(&page(1 << 17, 0, 0, 0), 0, now), Armed::Disarmed);
        assert_eq!(armed(&page(3 << 17, 9, 9, 0), 77, now), Armed::Disarmed);
    }

    #[test]
    fn a_one_shot_that_is_over_is_due() {
        let over = page(0, 9, 0, 0xb);
        assert_eq!(
            [&over, &page(0, 9, 1, 0xb), &page(1 << 17, 9, 0, 0xb), &page(0, 0, 0, 0xb)].map(one_shot_is_over),
            [true, false, false, false]
        );
        assert_eq!(armed(&over, 0, VmTime(5)), Armed::Count { expires: VmTime(5) });
        assert_eq!(to_set(&over, armed(&over, 0, VmTime(5)), VmTime(5)).0.register(TMCCT), 1);
    }

    #[test]
    fn a_deadline_leaves_the_registers_alone() {
        let saved = page(2 << 17, 0, 0, 0);
        assert_eq!(to_set(&saved, Armed::Tsc(GuestTsc(7)), VmTime(0)), (saved.clone(), 7));
        assert_eq!(to_set(&saved, Armed::Disarmed, VmTime(0)), (saved, 0));
    }

    proptest! {
        /// At whatever later time it is set again: not before the VM time at which KVM would have ended it, and at most two
        /// ticks after.
        #[test]
        fn a_count_keeps_its_vm_time(
            mode in 0_u32..2, initial in 1..=u32::MAX, part in any::<u32>(), divide in 0_u32..16,
            now in 0..u64::MAX / 2, later in 0_u64..1 << 42,
        ) {
            let tick = tick_ns(divide);
            let current = part % initial + 1;
            let saved = page(mode << 17, initial, current, divide);
            // KVM rounded what was left down to whole ticks.
            let (least, most) = (u64::from(current) * tick, u64::from(current) * tick + tick - 1);
            let at = VmTime(now + later);
            let (set, deadline) = to_set(&saved, armed(&saved, 0, VmTime(now)), at);
            prop_assert_eq!(deadline, 0);
            let count = set.register(TMCCT);
            prop_assert!((1..=initial).contains(&count));
            let end = at.0 + u64::from(count) * tick;
            prop_assert!(count == initial || end >= now + most);
            prop_assert!(end <= (now + least + 2 * tick).max(at.0 + tick));
        }
    }
}
