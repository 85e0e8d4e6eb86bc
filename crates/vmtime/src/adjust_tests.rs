//! Restores of every ratio, from ordinary and from extreme moments.

use super::*;
use proptest::prelude::*;

fn khz(n: u64) -> Khz {
    Khz::new(n).unwrap()
}

fn moment(f: u64, base: u64, system_time: u64, tsc: u64, wall_ns: u64) -> Moment {
    let scale = Scale::from_khz(khz(f));
    let page = PageClock { tsc_timestamp: GuestTsc(base), system_time: VmTime(system_time), scale };
    Moment::new(page, GuestTsc(tsc), khz(f), wall_ns)
}

#[test]
fn the_worked_example() {
    let saved = moment(1_000_000, 0, 0, 5_000_000_000, 50);
    let wall = 50 + 3_000_000_000;
    let armed = GuestTsc(5_001_000_000);
    for (policy, tsc, vm, downtime, rescaled) in [
        (DowntimePolicy::Freeze, 5_000_000_000, 5_000_000_000, 0, 5_002_000_000),
        (DowntimePolicy::CatchUp, 11_000_000_000, 8_000_000_000, 3_000_000_000, 11_000_000_000),
    ] {
        let new = restore(&saved, khz(2_000_000), policy, Stood::UntilWall(wall), None).unwrap();
        assert_eq!((new.tsc, new.vm), (GuestTsc(tsc), VmTime(vm)));
        assert_eq!((new.downtime_ns, new.clamped), (downtime, false));
        let at = |policy| deadline(policy, armed, None, &saved, &new).0;
        assert_eq!(at(DeadlinePolicy::Keep), armed);
        assert_eq!(at(DeadlinePolicy::Rescale), GuestTsc(rescaled));
        assert_eq!(at(DeadlinePolicy::Fire), new.tsc);
    }
}

#[test]
fn a_wall_clock_that_was_set_back_is_no_time_at_all() {
    let saved = moment(1_000_000, 0, 0, 5_000, 50);
    let new = restore(&saved, khz(2_000_000), DowntimePolicy::CatchUp, Stood::UntilWall(49), None).unwrap();
    assert_eq!((new.tsc, new.vm, new.downtime_ns, new.clamped), (saved.tsc, saved.vm, 0, true));
    let new = restore(&saved, khz(2_000_000), DowntimePolicy::Freeze, Stood::UntilWall(49), None).unwrap();
    assert!(!new.clamped, "freeze does not look at the wall clock");
    let new = restore(&saved, khz(2_000_000), DowntimePolicy::CatchUp, Stood::UntilWall(50), None).unwrap();
    assert!(!new.clamped, "a wall clock that has not advanced was not set back");
}

// Catches: a downtime of more than 584 years that is clipped to what 64 bits hold.
#[test]
fn a_downtime_beyond_the_range_is_refused() {
    let saved = moment(1_000_000, 0, 0, 5_000, 50);
    let stood = |length| restore(&saved, khz(1_000_000), DowntimePolicy::CatchUp, Stood::For(length), None);
    let new = stood(Duration::from_secs(3)).unwrap();
    assert_eq!((new.vm, new.downtime_ns, new.clamped), (VmTime(3_000_005_000), 3_000_000_000, false));
    for length in [Duration::from_nanos(u64::MAX), Duration::from_secs(u64::MAX)] {
        let refused = AdjustError::VmTimeOverflow { vm: saved.vm, downtime_ns: length.as_nanos() };
        assert_eq!(stood(length), Err(refused));
    }
    assert_eq!(stood(Duration::from_nanos(u64::MAX - 5_000)).unwrap().vm, VmTime(u64::MAX));
}

#[test]
fn a_tsc_that_cannot_be_set_moves_the_page_only() {
    let saved = moment(1_000_000, 0, 0, 5_000, 50);
    // Either side of the saved TSC: another host may have booted later.
    for held in [7, 1 << 60] {
        let new = restore(&saved, khz(2_000_000), DowntimePolicy::CatchUp, Stood::UntilWall(60), Some(GuestTsc(held)))
            .unwrap();
        assert_eq!((new.tsc, new.vm, new.downtime_ns), (GuestTsc(held), VmTime(5_010), 10));
        assert_eq!((new.page.vm_time(new.tsc), new.remainder), (new.vm, Remainder::ZERO));
    }
}

#[test]
fn each_failure_has_its_error() {
    let catch_up =
        |saved: &Moment, wall| restore(saved, khz(3_000_000), DowntimePolicy::CatchUp, Stood::UntilWall(wall), None);
    let good = moment(1_000_000, 100, 0, 200, 0);
    let before = Moment { tsc: GuestTsc(99), vm: VmTime(0), ..good };
    assert!(matches!(catch_up(&before, 0), Err(AdjustError::BeforePage { .. })));
    let edited = Moment { vm: VmTime(101), ..good };
    assert!(matches!(catch_up(&edited, 0), Err(AdjustError::Contradiction { .. })));
    let old = moment(1_000_000, 100, u64::MAX - 5, 100, 0);
    assert!(matches!(catch_up(&old, 6), Err(AdjustError::VmTimeOverflow { .. })));
    assert!(catch_up(&old, 5).is_ok());
    let high = moment(1_000_000, u64::MAX - 5, 0, u64::MAX - 5, 0);
    assert!(matches!(catch_up(&high, 2), Err(AdjustError::TscOverflow { .. })));
    assert!(catch_up(&high, 1).is_ok());
    assert!(matches!(catch_up(&good, u64::MAX / 2), Err(AdjustError::TscOverflow { .. })));
}

#[test]
fn a_deadline_past_the_new_tscs_end_is_the_end() {
    let saved = moment(1_000_000, 0, 0, 5_000, 0);
    let new = restore(&saved, khz(10_000_000), DowntimePolicy::Freeze, Stood::UntilWall(0), None).unwrap();
    let (at, _) = deadline(DeadlinePolicy::Rescale, GuestTsc(u64::MAX), None, &saved, &new);
    assert_eq!(at, GuestTsc(u64::MAX));
}

#[test]
fn no_policy_disarms() {
    let saved = moment(1_000_000, 0, 0, 0, 0);
    let new = restore(&saved, khz(2_000_000), DowntimePolicy::Freeze, Stood::UntilWall(0), None).unwrap();
    for policy in [DeadlinePolicy::Rescale, DeadlinePolicy::Fire] {
        assert_ne!(deadline(policy, GuestTsc(1), None, &saved, &new).0, GuestTsc(0));
    }
    assert_eq!(ns_deadline(DeadlinePolicy::Fire, VmTime(9), VmTime(0)), VmTime(1));
}

#[test]
fn a_deadline_in_vm_time_needs_no_rescaling() {
    for policy in [DeadlinePolicy::Keep, DeadlinePolicy::Rescale] {
        assert_eq!(ns_deadline(policy, VmTime(500), VmTime(20)), VmTime(500));
    }
    assert_eq!(ns_deadline(DeadlinePolicy::Fire, VmTime(500), VmTime(20)), VmTime(20));
}

#[cfg(feature = "serde")]
#[test]
fn names_are_the_same_everywhere() {
    for policy in [DeadlinePolicy::Keep, DeadlinePolicy::Rescale, DeadlinePolicy::Fire] {
        assert_eq!(serde_json::to_string(&policy).unwrap(), format!("{:?}", policy.as_str()));
    }
    for policy in [DowntimePolicy::Freeze, DowntimePolicy::CatchUp] {
        assert_eq!(serde_json::to_string(&policy).unwrap(), format!("{:?}", policy.as_str()));
    }
}

/// TSCs from the ordinary to the ends of 64 bits.
fn tscs() -> impl Strategy<Value = u64> {
    prop_oneof![any::<u64>(), 0..1_u64 << 50, u64::MAX - 1000..=u64::MAX, 0_u64..1000]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]

    #[test]
    fn vm_time_goes_on_by_exactly_the_downtime(
        f in 1_000_000..4_000_000_u64, tenths in 1..=100_u64, base in tscs(), later in tscs(), system_time in tscs(),
        wall in tscs(), wall_now in tscs(), catch_up in any::<bool>(), held in prop::option::of(tscs()),
    ) {
        let saved = moment(f, base, system_time, base.saturating_add(later), wall);
        let policy = if catch_up { DowntimePolicy::CatchUp } else { DowntimePolicy::Freeze };
        let target = khz(f * tenths / 10);
        let expect = if catch_up { wall_now.saturating_sub(wall) } else { 0 };
        let ticks = u128::from(expect) * u128::from(target.get()) / 1_000_000;
        match restore(&saved, target, policy, Stood::UntilWall(wall_now), held.map(GuestTsc)) {
            Ok(new) => {
                prop_assert_eq!(new.page.exact(new.tsc).ahead_by(new.remainder), saved.exact(saved.tsc).after_ns(expect));
                prop_assert!(new.vm.0 - saved.vm.0 >= expect);
                prop_assert_eq!(new.downtime_ns, expect);
                prop_assert_eq!(new.page.now(new.tsc).vm, new.vm);
                prop_assert!(new.page.tsc_timestamp <= new.tsc);
                prop_assert_eq!(new.clamped, catch_up && wall_now < wall);
                match held {
                    Some(held) => prop_assert_eq!(new.tsc, GuestTsc(held)),
                    None => prop_assert_eq!(u128::from(new.tsc.0), u128::from(saved.tsc.0) + ticks),
                }
            }
            Err(AdjustError::VmTimeOverflow { .. }) => prop_assert!(saved.vm.0.checked_add(expect).is_none()),
            Err(AdjustError::TscOverflow { .. }) => {
                prop_assert!(held.is_none() && u128::from(saved.tsc.0) + ticks > u128::from(u64::MAX));
            }
            Err(other) => prop_assert!(false, "{}", other),
        }
    }

    #[test]
    fn rescale_is_the_least_tsc_of_the_same_vm_time(
        f in 1_000_000..4_000_000_u64, tenths in 1..=100_u64, base in 0..1_u64 << 62, later in 0..1_u64 << 50,
        ahead in prop_oneof![-1_000_000_i64..1_000_000, any::<i64>()], down in 0..1_u64 << 40, catch_up in any::<bool>(),
    ) {
        let saved = moment(f, base, 77, base + later, 0);
        let policy = if catch_up { DowntimePolicy::CatchUp } else { DowntimePolicy::Freeze };
        let new = restore(&saved, khz(f * tenths / 10), policy, Stood::UntilWall(down), None).unwrap();
        let armed = GuestTsc(saved.tsc.0.saturating_add_signed(ahead).max(1));
        let due = saved.page.vm_time(armed);
        let (at, moved) = deadline(DeadlinePolicy::Rescale, armed, None, &saved, &new);
        if ahead <= 0 {
            prop_assert!(at <= new.tsc.max(GuestTsc(1)));
        }
        let line = |tsc: u64| new.page.exact(GuestTsc(tsc)).ahead_by(new.remainder);
        let (exact, least) = (saved.exact(armed), new.page.tsc_timestamp.0.max(1));
        prop_assert_eq!(moved, Some(Due { tsc: at, exact, read: due }));
        if at == GuestTsc(u64::MAX) {
            prop_assert!(new.page.vm_time(GuestTsc(u64::MAX - 1)) < due || line(u64::MAX - 1) < exact);
        } else if new.page != saved.page {
            prop_assert!(new.page.vm_time(at) >= due && line(at.0) >= exact);
            prop_assert!(at.0 <= least || new.page.vm_time(GuestTsc(at.0 - 1)) < due || line(at.0 - 1) < exact);
        } else {
            prop_assert_eq!(at, armed);
        }
    }
}

/// A guest that is frozen and restored again and again: the instants of its saves, the frequencies it is restored with.
struct Guest {
    now: Moment,
    armed: GuestTsc,
    due: Option<Due>,
}

impl Guest {
    fn new(f: u64, armed: u64) -> Self {
        Self { now: moment(f, 0, 0, 0, 0), armed: GuestTsc(armed), due: None }
    }

    /// Runs for `ticks`, and is restored with a TSC of `to`.
    fn migrate(&mut self, ticks: u64, to: Khz) {
        let tsc = GuestTsc(self.now.tsc.0 + ticks);
        let saved = Moment { tsc, vm: self.now.page.vm_time(tsc), ..self.now };
        let new = restore(&saved, to, DowntimePolicy::Freeze, Stood::UntilWall(0), None).unwrap();
        (self.armed, self.due) = deadline(DeadlinePolicy::Rescale, self.armed, self.due, &saved, &new);
        assert!(new.vm >= saved.vm, "the guest's clock went back");
        assert_eq!(new.page.exact(new.tsc).ahead_by(new.remainder), saved.exact(tsc), "VM time was lost");
        self.now = Moment { khz: to, page: new.page, remainder: new.remainder, vm: new.vm, ..saved };
    }
}

// Catches: a restore that makes a base from a rounded VM time. It lost 0.95 ns a migration at 2.1 GHz, and moved the
// deadline by two ticks.
#[test]
fn restores_with_the_same_frequency_change_nothing() {
    for f in [1_000_000, 2_000_000, 2_100_000, 2_600_000, 3_999_999] {
        let mut guest = Guest::new(f, 1 << 50);
        let page = guest.now.page;
        for n in 0..10_000 {
            guest.migrate(n % 1001, khz(f));
            assert_eq!((guest.now.page, guest.now.remainder, guest.armed), (page, Remainder::ZERO, GuestTsc(1 << 50)));
        }
    }
}

// Catches: rounding that adds up, of VM time or of the deadline. What is left after a million restores is the last
// one's: less than a nanosecond, and two ticks of the deadline.
#[test]
fn a_million_restores_lose_nothing() {
    let mut seed = 7_u64;
    let mut random = || {
        // Knuth's MMIX generator.
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        seed >> 33
    };
    let (mut guest, armed) = (Guest::new(2_100_000, 1 << 50), GuestTsc(1 << 50));
    let (exact, read) = (guest.now.exact(armed), guest.now.page.vm_time(armed));
    let (mut sum, mut worst) = (0.0, 0.0_f64);
    for _ in 0..1_000_000 {
        guest.migrate(random() % 1_000_000, khz(1_000_000 + random() % 3_000_000));
        worst = worst.max(guest.now.remainder.as_ns().abs());
        sum += guest.now.remainder.as_ns().abs();
    }
    assert!(worst < 1.0, "{worst}");
    assert!(sum / 1e6 < 0.01, "{}", sum / 1e6);
    assert!(guest.now.exact(guest.armed) >= exact && guest.now.page.vm_time(guest.armed) >= read);
    let before = GuestTsc(guest.armed.0 - 3);
    assert!(guest.now.exact(before) < exact && guest.now.page.vm_time(before) < read, "the deadline crept");
}
