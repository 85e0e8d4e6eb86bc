//! The tick layer on mock hardware.

use super::*;
use crate::clockevent::{KvmTscDeadline, LapicDeadline};
use crate::mock::{Mock, page_at};
use crate::pvclock::Conversion;

/// A page on which one tick is one nanosecond.
fn gigahertz() -> Mock {
    Mock::new(page_at(2, 0, 0, 1 << 31, 1))
}

fn kvm(conversion: Conversion) -> Device {
    Device::KvmTscDeadline(KvmTscDeadline::new(conversion, true))
}

/// Handles one timer interrupt.
fn interrupt(t: &mut Ticks, m: &mut Mock) -> Result<State, BadPage> {
    let now = t.now(m);
    t.interrupt(m, &now)
}

fn ticks(device: Device, hz: u32, count: u64) -> Ticks {
    Ticks::new(Clock::new(), device, Scenario::periodic(hz, Some(count)))
}

#[test]
fn a_run_writes_one_record_a_tick_and_shuts_the_device_down() {
    let mut m = gigahertz();
    m.tsc = 500;
    let mut t = ticks(kvm(Conversion::Exact), 1_000, 3);
    assert_eq!(t.start(&mut m), Ok(State::Waiting));
    for n in 1..=3 {
        m.tsc = m.tsc_deadline + 10;
        let want = if n == 3 { State::Done } else { State::Waiting };
        assert_eq!(interrupt(&mut t, &mut m), Ok(want));
    }
    let first = m.records[0];
    assert_eq!((first.seq, first.expires_ns, first.armed_ns, first.fired_ns), (0, 1_000_500, 500, 1_000_510));
    assert_eq!((first.deadline, first.fired_tsc, first.page_version), (1_000_500, 1_000_510, 2));
    assert_eq!((m.records[2].seq, m.records[2].expires_ns), (2, 3_000_500));
    assert_eq!(m.records.len(), 3);
    assert_eq!(m.lvt, crate::clockevent::LVT_VECTOR | crate::clockevent::LVT_MASKED);
    assert_eq!(t.totals(), Totals { ticks: 3, early_wakes: 0, worst_late_ns: 10 });
    // An interrupt after the last tick does nothing.
    assert_eq!(interrupt(&mut t, &mut m), Ok(State::Done));
    assert_eq!(m.records.len(), 3);
}

#[test]
fn an_early_wake_arms_again_and_is_counted() {
    let mut m = gigahertz();
    let mut t = ticks(kvm(Conversion::Exact), 1_000, 1);
    t.start(&mut m).unwrap();
    for tsc in [400_000, 999_999] {
        m.tsc = tsc;
        m.tsc_deadline = 0;
        assert_eq!(interrupt(&mut t, &mut m), Ok(State::Waiting));
        assert_eq!(m.tsc_deadline, 1_000_000);
    }
    m.tsc = 1_000_000;
    assert_eq!(interrupt(&mut t, &mut m), Ok(State::Done));
    let r = m.records[0];
    assert_eq!((r.early_wakes, r.first_wake_ns, r.fired_ns), (2, 400_000, 1_000_000));
}

#[test]
fn a_tick_reads_the_tsc_once_where_the_deadline_comes_from_the_page() {
    let mut m = gigahertz();
    let mut t = ticks(kvm(Conversion::Exact), 1_000, 9);
    t.start(&mut m).unwrap();
    m.tsc = 2_000_000;
    m.tsc_reads = 0;
    interrupt(&mut t, &mut m).unwrap();
    assert_eq!(m.tsc_reads, 1);
}

#[test]
fn expiries_that_were_missed_are_all_recorded() {
    let mut m = gigahertz();
    let mut t = ticks(kvm(Conversion::Exact), 1_000, 5);
    t.start(&mut m).unwrap();
    m.tsc = 10_000_000;
    while interrupt(&mut t, &mut m) == Ok(State::Waiting) {}
    assert_eq!(m.records.iter().map(|r| r.expires_ns / 1_000_000).sum::<u64>(), 1 + 2 + 3 + 4 + 5);
}

#[test]
fn after_a_migration_only_the_boot_frequency_is_wrong() {
    // From 1 GHz to 2 GHz at VM time 1 ms: the page halves what a tick is worth.
    let migrated = page_at(4, 1_000_000, 1_000_000, 1 << 31, 0);
    for (device, want) in [
        (kvm(Conversion::Split), 3_000_000),
        (kvm(Conversion::Mult), 3_000_000),
        (kvm(Conversion::Exact), 3_000_000),
        (Device::LapicDeadline(LapicDeadline::new(1_000_000)), 2_000_000),
    ] {
        let mut m = gigahertz();
        let mut t = ticks(device, 1_000, 9);
        t.start(&mut m).unwrap();
        m.tsc = 1_000_000;
        m.page = migrated;
        interrupt(&mut t, &mut m).unwrap();
        assert_eq!(m.tsc_deadline, want, "{device:?}");
    }
}

#[test]
fn periods_can_count_from_a_given_origin() {
    let mut m = gigahertz();
    m.tsc = 500;
    let mut t = ticks(kvm(Conversion::Exact), 1_000, 2);
    assert_eq!(t.start_from(&mut m, 7_000), Ok(State::Waiting));
    assert_eq!(m.tsc_deadline, 1_007_000);
    m.tsc = 1_007_100;
    interrupt(&mut t, &mut m).unwrap();
    assert_eq!((m.records[0].expires_ns, m.records[0].armed_ns), (1_007_000, 500));
    assert_eq!(m.tsc_deadline, 2_007_000);
}

#[test]
fn a_wake_after_the_last_tick_is_no_tick() {
    let mut m = gigahertz();
    let mut t = ticks(kvm(Conversion::Exact), 1_000, 1);
    t.start(&mut m).unwrap();
    m.tsc = 1_000_000;
    assert_eq!(interrupt(&mut t, &mut m), Ok(State::Done));
    let now = t.now(&mut m);
    t.wake_at(&mut m, 3_000_000, &now).unwrap();
    assert_eq!((m.tsc_deadline, m.lvt), (3_000_000, 0x4_0040));
    m.tsc = 3_000_000;
    assert_eq!(interrupt(&mut t, &mut m), Ok(State::Done));
    assert_eq!((m.records.len(), t.now(&mut m).ns), (1, 3_000_000));
}

#[test]
fn a_page_that_cannot_be_inverted_is_an_error() {
    let mut m = Mock::new(page_at(2, 0, 0, 1, 0));
    let mut t = ticks(kvm(Conversion::Mult), 1_000, 1);
    assert_eq!(t.start(&mut m), Err(BadPage { mul: 1, shift: 0 }));
}
