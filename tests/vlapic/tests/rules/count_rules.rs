//! The rules of one-shot and periodic mode, one test each, through both doors.
//!
//! "SDM" is the Intel SDM vol. 3, sections "APIC Timer" and "TSC-Deadline Mode", in other words.

use vlapic::Deadline;

use super::*;

/// SDM, "TSC-Deadline Mode": in this mode writes to the initial count are ignored and the current count reads zero.
#[test]
fn deadline_mode_has_no_count() {
    for mut bench in Bench::timers(ONE_SHOT) {
        bench.write(TMICT, 77, at(0));
        bench.write(LVTT, DEADLINE | VECTOR, at(1));
        bench.wrmsr(TSC_DEADLINE, 3000, at(1));
        bench.write(TMICT, 5000, at(2));
        assert_eq!((bench.read(TMICT, at(3)), bench.read(TMCCT, at(3))), (77, 0));
        assert_eq!(bench.rdmsr(TSC_DEADLINE, at(4)), 3000);
    }
}

/// SDM, "APIC Timer": one-shot counts down once from the initial count and interrupts when it reaches zero.
#[test]
fn one_shot_counts_down_once() {
    for mut bench in Bench::timers(ONE_SHOT) {
        bench.write(TDCR, BY_4, at(0));
        bench.write(TMICT, 1000, at(10));
        let counts = [10, 13, 14, 17, 4009, 4010].map(|ns| bench.read(TMCCT, at(ns)));
        assert_eq!(counts, [1000, 1000, 999, 999, 1, 0]);
        assert_eq!(bench.interrupts(at(4010)), 1);
        assert_eq!(bench.interrupts(at(1_000_000)), 0);
        assert_eq!(bench.read(TMICT, at(1_000_000)), 1000);
    }
}

/// SDM, "APIC Timer": in periodic mode the count is reloaded when it reaches zero, and counts again.
#[test]
fn periodic_keeps_its_phase() {
    for mut bench in Bench::timers(PERIODIC) {
        bench.write(TMICT, 1_000_000, at(7));
        assert_eq!(bench.interrupts(at(1_000_006)), 0);
        assert_eq!(bench.interrupts(at(1_000_107)), 1, "100 ns late");
        assert_eq!(bench.apic.next_deadline(), Some(Deadline::Vm(VmTime(2_000_007))));
        assert_eq!(bench.read(TMCCT, at(1_000_107)), 999_900);
        assert_eq!(bench.interrupts(at(1_000_000_000_500)), 1, "a million missed periods are one interrupt");
        assert_eq!(bench.apic.next_deadline(), Some(Deadline::Vm(VmTime(1_000_001_000_007))));
        assert_eq!(bench.interrupts(at(1_000_001_000_007)), 1);
    }
}

/// KVM's `limit_periodic_timer_frequency`: no guest can ask for interrupts so often that it never gets past them.
#[test]
fn a_period_is_200_microseconds_at_least() {
    for mut bench in Bench::timers(PERIODIC) {
        for count in [1, 199_999, 200_000] {
            bench.write(TMICT, count, at(0));
            assert_eq!(bench.interrupts(at(199_999)), 0, "the first one too");
            assert_eq!(bench.interrupts(at(200_050)), 1);
            assert_eq!((bench.interrupts(at(399_999)), bench.interrupts(at(400_000))), (0, 1));
        }
        bench.write(TMICT, 200_001, at(0));
        assert_eq!((bench.interrupts(at(200_000)), bench.interrupts(at(200_001))), (0, 1), "and no longer than asked");
        // The count reads as if it began to drop late.
        bench.write(TMICT, 1000, at(0));
        assert_eq!([0, 199_000, 199_001, 199_999].map(|ns| bench.read(TMCCT, at(ns))), [1000, 1000, 999, 1]);
        // By the divider that is in force when the period begins.
        bench.write(TDCR, BY_128, at(199_000));
        assert_eq!(bench.read(TMCCT, at(199_000)), 1000);
        assert_eq!(bench.apic.next_deadline(), Some(Deadline::Vm(VmTime(199_000 + 128_000))));
        assert_eq!(bench.interrupts(at(327_000)), 1);
        assert_eq!(bench.apic.next_deadline(), Some(Deadline::Vm(VmTime(527_000))));
    }
    for mut bench in Bench::timers(ONE_SHOT) {
        bench.write(TMICT, 1, at(0));
        assert_eq!(bench.interrupts(at(1)), 1, "one-shot is not limited");
        bench.write(TMICT, 50, at(10));
        bench.write(LVTT, PERIODIC | VECTOR, at(20));
        assert_eq!(bench.interrupts(at(60)), 1, "a count that runs is not a period yet");
        assert_eq!(bench.apic.next_deadline(), Some(Deadline::Vm(VmTime(200_060))));
    }
}

/// SDM, "APIC Timer": writing an initial count of zero stops the timer, in one-shot and in periodic mode.
#[test]
fn an_initial_count_of_zero_stops() {
    for lvtt in [ONE_SHOT, PERIODIC] {
        for mut bench in Bench::timers(lvtt) {
            bench.write(TMICT, 1000, at(0));
            bench.write(TMICT, 0, at(500));
            assert_eq!((bench.read(TMCCT, at(501)), bench.apic.next_deadline()), (0, None));
            assert_eq!(bench.interrupts(at(1_000_000)), 0);
        }
    }
}

/// SDM, "APIC Timer": a write to the initial count restarts the count with the new value.
#[test]
fn an_initial_count_restarts() {
    for mut bench in Bench::timers(ONE_SHOT) {
        bench.write(TMICT, 1000, at(0));
        bench.write(TMICT, 2000, at(900));
        assert_eq!(bench.interrupts(at(2899)), 0);
        assert_eq!(bench.interrupts(at(2900)), 1);
    }
}

/// As KVM's `apic_update_lvtt`: only crossing deadline mode touches a running count.
#[test]
fn one_shot_to_periodic_and_back_does_not_reset_the_count() {
    for mut bench in Bench::timers(ONE_SHOT) {
        bench.write(TMICT, 1_000_000, at(0));
        bench.write(LVTT, PERIODIC | VECTOR, at(400_000));
        assert_eq!(bench.read(TMCCT, at(400_000)), 600_000);
        assert_eq!((bench.interrupts(at(1_000_000)), bench.read(TMCCT, at(1_000_001))), (1, 999_999));
        bench.write(LVTT, ONE_SHOT | VECTOR, at(1_300_000));
        assert_eq!(bench.read(TMCCT, at(1_300_000)), 700_000);
        assert_eq!((bench.interrupts(at(2_000_000)), bench.read(TMCCT, at(2_000_001))), (1, 0));
        assert_eq!(bench.apic.next_deadline(), None);
    }
}

/// SDM, "Divide Configuration Register": the divider is in front of the counter. The counter holds ticks, so that a
/// change of the divider keeps the ticks and changes how long they take.
#[test]
fn a_divide_change_takes_effect_at_once() {
    for mut bench in Bench::timers(PERIODIC) {
        bench.write(TDCR, BY_2, at(0));
        bench.write(TMICT, 1_000_000, at(0));
        bench.write(TDCR, BY_8, at(501));
        assert_eq!(bench.read(TMCCT, at(501)), 999_750, "999,749 ticks and a half");
        let first = 501 + 1_999_499 * 4;
        assert_eq!(bench.apic.next_deadline(), Some(Deadline::Vm(VmTime(first))));
        assert_eq!(bench.interrupts(at(first - 1)), 0);
        assert_eq!(bench.interrupts(at(first)), 1);
        assert_eq!(bench.apic.next_deadline(), Some(Deadline::Vm(VmTime(first + 8_000_000))), "the next period too");
        bench.write(TDCR, BY_128, at(first));
        assert_eq!(bench.read(TMCCT, at(first)), 1_000_000);
    }
}

/// SDM, "Divide Configuration Register": 000 divides by 2, 001 by 4, … 110 by 128, and 111 by 1.
#[test]
fn every_divide_value() {
    for (divide, tick_ns) in [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1)] {
        for mut bench in Bench::timers(ONE_SHOT) {
            bench.write(TDCR, divide, at(0));
            bench.write(TMICT, u32::MAX, at(5));
            assert_eq!(bench.apic.next_deadline(), Some(Deadline::Vm(VmTime(5 + tick_ns * 0xffff_ffff))));
        }
    }
}

/// A stopped count has nothing to reload from: as KVM, TMCCT stays 0 until TMICT is written.
#[test]
fn after_one_shot_expiry_the_count_stays_zero_in_periodic_mode() {
    for mut bench in Bench::timers(ONE_SHOT) {
        bench.write(TMICT, 1000, at(0));
        bench.write(LVTT, PERIODIC | VECTOR, at(1000));
        assert_eq!((bench.interrupts(at(1001)), bench.read(TMCCT, at(1500))), (1, 0));
        assert_eq!((bench.interrupts(at(1_000_000)), bench.apic.next_deadline()), (0, None));
    }
}

/// An instant that a `u64` cannot hold never comes; it does not come at once either.
#[test]
fn a_count_that_ends_after_the_end_of_time_stops() {
    for mut bench in Bench::timers(PERIODIC) {
        let end = |before| Now::new(GuestTsc(0), VmTime(u64::MAX - before));
        bench.write(TMICT, 1_000_000, end(1_500_000));
        assert_eq!(bench.interrupts(end(500_000)), 1);
        assert_eq!((bench.apic.next_deadline(), bench.read(TMCCT, end(400_000))), (None, 0));
        bench.write(TMICT, u32::MAX, end(0));
        assert_eq!((bench.interrupts(end(0)), bench.apic.next_deadline()), (0, None));
    }
}
