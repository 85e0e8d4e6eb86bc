use vmtime::{DowntimePolicy, GuestTsc, HostTsc, Khz, PageClock, Scale, Stood, TscAdjust};

use super::*;
use crate::{
    host::clock::HostClock,
    machine::{
        clock::Clock,
        config::{TimeMode, source::TscSource},
        instant::HostInstant,
    },
};

fn khz(n: u64) -> Khz {
    Khz::new(n).unwrap()
}

fn audit() -> TickAudit {
    TickAudit::new(None, 1)
}

/// As after a ring was found.
fn counted(audit: &mut TickAudit) -> Summary {
    audit.rings[0].header.get_or_insert_default();
    audit.summary().unwrap()
}

fn tick(armed_ns: u64, expires_ns: u64, fired_ns: u64) -> Record {
    Record { armed_ns, expires_ns, first_wake_ns: fired_ns, fired_ns, fired_tsc: fired_ns, ..Record::default() }
}

/// A stopped clock at 1 GHz, so that a tick of the TSC is a nanosecond.
fn clock() -> Clock {
    Clock::new(TscSource::Trapped, TimeMode::Virtual, HostClock::new(|| 0, khz(1_000_000)), khz(1_000_000))
}

/// The clock, started with this frequency.
fn started(mut clock: Clock, to: u64) -> Clock {
    let moment = clock.moment(HostInstant::now(clock.host()));
    let stood = (Stood::For(std::time::Duration::ZERO), HostTsc(0));
    clock.start(&moment, khz(to), DowntimePolicy::Freeze, stood, false).unwrap();
    clock
}

#[test]
fn an_injection_before_the_arming_belongs_to_no_tick() {
    let mut audit = audit();
    for at in [5_000, 30_000, 50_000] {
        audit.injected(0, VmTime(at), None);
    }
    let tick = |seq, armed_ns, expires_ns| Record { seq, armed_ns, expires_ns, ..Record::default() };
    assert_eq!(audit.record(0, &tick(0, 10_000, 29_000), &RecordCheck::allowing_all(clock())), Some(VmTime(30_000)));
    assert_eq!(audit.record(0, &tick(1, 31_000, 49_000), &RecordCheck::allowing_all(clock())), Some(VmTime(50_000)));
    assert_eq!(counted(&mut audit).early_by_host, 0);
}

#[test]
fn an_interrupt_between_arming_and_expiry_is_early() {
    let mut audit = audit();
    audit.injected(0, VmTime(20_000), None);
    audit.record(
        0,
        &Record { armed_ns: 10_000, expires_ns: 29_000, ..Record::default() },
        &RecordCheck::allowing_all(clock()),
    );
    assert_eq!(counted(&mut audit).early_by_host, 1);
}

// A guest that armed a tick an hour late had one on time: lateness was counted from the arming.
#[test]
fn a_tick_armed_after_its_expiry_is_late_since_its_expiry() {
    let mut audit = audit();
    audit.injected(0, VmTime(7_000), None);
    audit.record(0, &tick(6_000, 1_000, 7_500), &RecordCheck::allowing_all(clock()));
    let summary = counted(&mut audit);
    assert_eq!(summary.late_by_guest.unwrap().worst_ns, 6_500);
    assert_eq!(summary.late_by_host.unwrap().worst_ns, 6_000);
    assert_eq!((summary.armed_late, summary.worst_armed_late_ns), (1, 5_000));
}

#[test]
fn a_tick_taken_before_its_expiry_is_not_on_time() {
    let mut audit = audit();
    audit.record(0, &tick(1_000, 9_000, 8_000), &RecordCheck::allowing_all(clock()));
    assert_eq!(counted(&mut audit).taken_early, 1);
}

#[test]
fn a_guest_without_a_ring_is_not_judged() {
    let mut audit = audit();
    assert_eq!(audit.summary(), None);
    let summary = counted(&mut audit);
    assert_eq!((summary.ticks, summary.late_by_guest, summary.late_by_host), (0, None, None));
}

// Catches: an RDTSC that is not in the table and returned another TSC. A record with 6,496 s was accepted.
#[test]
fn an_instant_that_has_not_come_is_a_clock_error() {
    let clock = started(clock(), 1_000_000);
    let check = RecordCheck::of(clock, VmTime(50_000_000), TscAdjust::ZERO);
    let far = 6_496_000_000_000;
    let ahead = |of: u64| Some(i64::try_from(far - of).unwrap());
    assert_eq!(check.clock_error(&tick(10_000_000, 20_000_000, 20_003_000)), None);
    // All three instants, and the TSC with them: each by itself is right.
    assert_eq!(check.clock_error(&tick(10_000_000, 20_000_000, far)), ahead(50_000_000));
    assert_eq!(check.clock_error(&tick(far, 20_000_000, 20_003_000)), ahead(20_003_000));
    // Its instants are in the past, but it was armed after it fired.
    assert_eq!(check.clock_error(&tick(40_000_000, 20_000_000, 20_003_000)), Some(19_997_000));
    // The guest read the right TSC, and computed a wrong VM time from it.
    let slow = Record { fired_tsc: 30_003_000, ..tick(10_000_000, 20_000_000, 20_003_000) };
    assert_eq!(check.clock_error(&slow), Some(-10_000_000));
}

#[test]
fn records_from_before_a_restore_are_checked_with_the_clock_of_then() {
    let mut clock = started(clock(), 1_000_000);
    clock.jump_to(GuestTsc(30_000_000));
    clock.stop_at(HostTsc(0));
    clock = started(clock, 2_000_000);
    clock.jump_to(GuestTsc(90_000_000));
    let check = RecordCheck::of(clock, VmTime(60_000_000), TscAdjust::ZERO);
    assert_eq!(check.clock_error(&tick(1, 20_000_000, 20_000_000)), None);
    // 30 ms, and 40 million ticks of half a nanosecond.
    assert_eq!(check.clock_error(&Record { fired_tsc: 70_000_000, ..tick(1, 50_000_000, 50_000_000) }), None);
    assert!(check.clock_error(&Record { fired_tsc: 70_000_000, ..tick(1, 70_000_000, 70_000_000) }).is_some());
}

#[test]
fn a_cpu_that_wrote_its_tsc_is_checked_with_its_own_tsc() {
    let clock = started(clock(), 1_000_000);
    let record = Record { fired_tsc: 20_003_000u64.wrapping_sub(5_000_000), ..tick(1, 20_000_000, 20_003_000) };
    let adjust = TscAdjust(5_000_000u64.wrapping_neg());
    assert_eq!(RecordCheck::of(clock.clone(), VmTime(50_000_000), adjust).clock_error(&record), None);
    assert_eq!(RecordCheck::of(clock, VmTime(50_000_000), TscAdjust::ZERO).clock_error(&record), Some(5_000_000));
}

/// A page of 1 GHz that shows `ns` at the TSC `tsc`.
fn kvms_page(tsc: u64, ns: u64) -> PageClock {
    PageClock { tsc_timestamp: GuestTsc(tsc), system_time: VmTime(ns), scale: Scale::from_khz(khz(1_000_000)) }
}

/// The check of records with the pages that KVM wrote, one after the other.
fn check_by_pages(pages: &[PageClock]) -> RecordCheck {
    let mut all = KvmPages::default();
    pages.iter().for_each(|page| all.add(vec![*page]));
    let reading = ClockReading { clock: clock(), has_gap: true, converts: Converts::Pages };
    RecordCheck::new(reading, &all)
}

// Catches: a guest whose clock is not the one that KVM publishes, with KVM's LAPIC: its reading was believed to a
// second.
#[test]
fn with_kvms_lapic_the_pages_that_kvm_wrote_judge_the_guest() {
    // The guest was stopped for a while: the second page is 5,000 ns behind the first.
    let pages = [kvms_page(1_000, 100), kvms_page(50_000, 44_100)];
    let check = check_by_pages(&pages);
    let read = |tsc, ns| Record { fired_tsc: tsc, ..tick(1_000, 9_000, ns) };
    // By the page of then, by the page of now, and by the page of then again, which holds until KVM writes the next.
    for (tsc, ns) in [(11_000, 10_100), (60_000, 54_100), (60_000, 59_100)] {
        assert_eq!(check.clock_error(&read(tsc, ns)), None, "{tsc}");
        assert_eq!(check.handled_by_kvms_page(&read(tsc, ns)), Some(VmTime(ns)));
    }
    assert_eq!(check.clock_error(&read(11_000, 8_000)), Some(-2_100));
    // Without a page there is nothing to judge by.
    assert_eq!(check_by_pages(&[]).handled_by_kvms_page(&read(11_000, 10_100)), None);

    let mut audit = audit();
    let host = audit.record(0, &read(11_000, 10_100), &check);
    assert_eq!(host, Some(VmTime(10_100)));
    assert_eq!(counted(&mut audit).late_by_host.unwrap().worst_ns, 1_100);
}

// KVM moves the base of a page between two looks at it. A tick from before the new base was judged by the page before.
#[test]
fn a_tick_from_before_the_base_of_kvms_page_is_judged_by_its_line() {
    let check = check_by_pages(&[kvms_page(1_000, 100), kvms_page(90_000, 40_000)]);
    let before_the_base = Record { fired_tsc: 60_000, ..tick(1_000, 9_000, 10_000) };
    assert_eq!(check.handled_by_kvms_page(&before_the_base), Some(VmTime(10_000)));
    assert_eq!(check.clock_error(&before_the_base), None);
}

// Catches: a page of KVM taken for the time of an injection that the host itself made.
#[test]
fn with_the_vmms_lapic_no_page_is_asked() {
    let check = RecordCheck::of(clock(), VmTime(50_000_000), TscAdjust::ZERO);
    assert_eq!(check.handled_by_kvms_page(&tick(1_000, 9_000, 9_500)), None);
}

#[test]
fn timer_interrupts_are_judged_without_a_ring() {
    let mut audit = audit();
    for (at, due) in [(10_000, Some(9_000)), (20_000, None), (30_000, Some(32_000)), (40_000, Some(40_500))] {
        audit.injected(0, VmTime(at), due.map(VmTime));
    }
    let TimerSummary { interrupts, early, late } = audit.timer();
    // The last one is early by less than the clocks may differ.
    assert_eq!((interrupts, early, late.unwrap().worst_ns), (4, 1, 1_000));
}
