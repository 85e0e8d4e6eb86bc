//! Converts the state of KVM's LAPIC timer into an absolute instant, and back.
//!
//! KVM saves a count as what is left of it (TMCCT), and its clocks count on while the state is read and set. What is
//! left is therefore converted into the VM time at which the count expires, and back when it is set.

use guest_abi::lapic::{LVTT, TDCR, TMCCT, TMICT};
use vlapic::{Armed, tick_ns};
use vmtime::{GuestTsc, VmTime};

use crate::kvm::state::LapicPage;

/// What a timer waits for whose registers were `page` at VM time `now` or a little before.
///
/// Never too early: the count is increased by one, because KVM rounds down, and `now` is not before the reading. A
/// one-shot count that has expired is due. The registers do not show whether KVM has delivered it, and an extra
/// interrupt is better than a lost one. KVM does the same if a TMCCT of 0 is set.
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

/// Whether a one-shot count has expired: then no deadline is left to move.
pub(crate) fn one_shot_is_over(page: &LapicPage) -> bool {
    page.register(LVTT) >> 17 & 0b11 == 0b00 && page.register(TMICT) != 0 && page.register(TMCCT) == 0
}

/// The registers and the TSC deadline to set, at VM time `now`, for a timer that waits for `armed`.
pub(crate) fn to_set(page: &LapicPage, armed: Armed, now: VmTime) -> (LapicPage, u64) {
    let mut page = page.clone();
    let (count, deadline) = match armed {
        Armed::Count { expires } => {
            let left = expires.0.saturating_sub(now.0).div_ceil(tick_ns(page.register(TDCR)));
            // In periodic mode KVM treats 0 as a whole period. It warns of a count above TMICT, and reduces it.
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
        /// At whatever later time it is set again: not before the VM time at which KVM would have ended it, and at most
        /// two ticks after.
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
