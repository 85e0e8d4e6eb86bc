//! The timer's rules, one test each, through both doors.
//!
//! "SDM" is the Intel SDM vol. 3, sections "APIC Timer" and "TSC-Deadline Mode", in other words.

use super::super::Deadline;
use super::*;

/// SDM, "TSC-Deadline Mode": a write of a non-zero value arms the timer, which interrupts once the TSC has got there.
#[test]
fn a_deadline_write_arms() {
    for mut bench in Bench::timers(DEADLINE) {
        assert_eq!(bench.apic.next_deadline(), None);
        bench.wrmsr(TSC_DEADLINE, 3000, at(0));
        assert_eq!(bench.rdmsr(TSC_DEADLINE, at(10)), 3000);
        assert_eq!(bench.apic.next_deadline(), Some(Deadline::Tsc(GuestTsc(3000))));
        assert_eq!(bench.interrupts(at(999)), 0);
        assert_eq!(bench.interrupts(at(1000)), 1);
        assert_eq!(bench.interrupts(at(100_000)), 0, "it generates one interrupt, then is disarmed");
    }
}

/// SDM, "TSC-Deadline Mode": writing zero disarms.
#[test]
fn a_deadline_of_zero_disarms() {
    for mut bench in Bench::timers(DEADLINE) {
        for index in [TSC_DEADLINE, NS_DEADLINE] {
            bench.wrmsr(index, 3000, at(0));
            bench.wrmsr(index, 0, at(1));
            assert_eq!(bench.apic.next_deadline(), None);
            assert_eq!(bench.interrupts(at(1_000_000)), 0);
        }
    }
}

/// SDM, "TSC-Deadline Mode": a value that is not above the present TSC interrupts immediately.
#[test]
fn a_past_deadline_fires_at_once() {
    for mut bench in Bench::timers(DEADLINE) {
        bench.wrmsr(TSC_DEADLINE, 1, at(500));
        assert_eq!(bench.apic.pending(), Some(0xec), "with no further call");
        assert_eq!((bench.interrupts(at(500)), bench.apic.next_deadline()), (1, None));
    }
}

/// SDM, "TSC-Deadline Mode": the MSR reads zero once the timer has fired.
#[test]
fn a_deadline_reads_zero_once_fired() {
    for mut bench in Bench::timers(DEADLINE) {
        bench.wrmsr(TSC_DEADLINE, 3000, at(0));
        assert_eq!(bench.rdmsr(TSC_DEADLINE, at(999)), 3000);
        assert_eq!(bench.rdmsr(TSC_DEADLINE, at(1000)), 0, "the read itself looks at the time");
        assert_eq!(bench.interrupts(at(1000)), 1);
    }
}

/// SDM, "TSC-Deadline Mode": in the other modes the MSR reads zero and writes to it are ignored.
#[test]
fn a_deadline_outside_deadline_mode_is_ignored() {
    for lvtt in [ONE_SHOT, PERIODIC] {
        for mut bench in Bench::timers(lvtt) {
            bench.write(TMICT, 5000, at(0));
            for index in [TSC_DEADLINE, NS_DEADLINE] {
                bench.wrmsr(index, 30, at(0));
                assert_eq!(bench.rdmsr(index, at(1)), 0);
            }
            assert_eq!(bench.interrupts(at(4999)), 0);
            assert_eq!(bench.read(TMCCT, at(4999)), 1, "and the count goes on");
        }
    }
}

/// SDM, "APIC Timer": a change of LVTT from or to TSC-deadline mode disarms the timer.
#[test]
fn changing_into_or_out_of_deadline_mode_disarms() {
    for other in [ONE_SHOT, PERIODIC] {
        for mut bench in Bench::timers(other) {
            bench.write(TMICT, 5000, at(0));
            bench.write(LVTT, DEADLINE | VECTOR, at(10));
            assert_eq!(bench.apic.next_deadline(), None);
            for index in [TSC_DEADLINE, NS_DEADLINE] {
                bench.wrmsr(index, 30_000, at(20));
                bench.write(LVTT, other | VECTOR, at(30));
                assert_eq!((bench.apic.next_deadline(), bench.read(TMCCT, at(30))), (None, 0));
                bench.write(LVTT, DEADLINE | VECTOR, at(40));
                assert_eq!(bench.rdmsr(index, at(50)), 0);
            }
            assert_eq!(bench.interrupts(at(1_000_000)), 0);
        }
    }
}

/// The thread's shutdown, `vector | masked`: clearing the mode bits disarms, whereas setting the mask alone does not.
#[test]
fn masking_in_deadline_mode_stays_armed() {
    for mut bench in Bench::timers(DEADLINE) {
        bench.wrmsr(TSC_DEADLINE, 3000, at(0));
        bench.write(LVTT, DEADLINE | MASKED | VECTOR, at(10));
        assert_eq!(bench.rdmsr(TSC_DEADLINE, at(20)), 3000);
        assert_eq!(bench.apic.next_deadline(), Some(Deadline::Tsc(GuestTsc(3000))));
        assert_eq!(bench.apic.next_wake(), None);
        bench.write(LVTT, DEADLINE | VECTOR, at(30));
        assert_eq!(bench.apic.next_wake(), Some(Deadline::Tsc(GuestTsc(3000))));
        assert_eq!(bench.interrupts(at(1000)), 1);

        bench.wrmsr(TSC_DEADLINE, 9000, at(2000));
        bench.write(LVTT, MASKED | VECTOR, at(2001));
        assert_eq!(bench.apic.next_deadline(), None);
    }
}

/// SDM, "Local Vector Table": the mask inhibits reception of the interrupt, not the timer. Unmasking later does not
/// bring the interrupt back.
#[test]
fn a_masked_timer_expires_silently() {
    for mut bench in Bench::timers(DEADLINE | MASKED) {
        bench.wrmsr(TSC_DEADLINE, 3000, at(0));
        assert_eq!(bench.rdmsr(TSC_DEADLINE, at(1000)), 0);
        bench.write(LVTT, DEADLINE | VECTOR, at(1001));
        assert_eq!(bench.interrupts(at(2000)), 0);
    }
    for mut bench in Bench::timers(ONE_SHOT | MASKED) {
        bench.write(TMICT, 100, at(0));
        bench.write(LVTT, VECTOR, at(100));
        assert_eq!((bench.interrupts(at(2000)), bench.read(TMCCT, at(2000))), (0, 0));
    }
}

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
        bench.write(TMICT, 1000, at(7));
        assert_eq!(bench.interrupts(at(1006)), 0);
        assert_eq!(bench.interrupts(at(1107)), 1, "100 ns late");
        assert_eq!(bench.apic.next_deadline(), Some(Deadline::Vm(VmTime(2007))));
        assert_eq!(bench.read(TMCCT, at(1107)), 900);
        assert_eq!(bench.interrupts(at(1_000_000_500)), 1, "a million missed periods are one interrupt");
        assert_eq!(bench.apic.next_deadline(), Some(Deadline::Vm(VmTime(1_000_001_007))));
        assert_eq!(bench.interrupts(at(1_000_001_007)), 1);
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
        bench.write(TMICT, 1000, at(0));
        bench.write(LVTT, PERIODIC | VECTOR, at(400));
        assert_eq!(bench.read(TMCCT, at(400)), 600);
        assert_eq!((bench.interrupts(at(1000)), bench.read(TMCCT, at(1001))), (1, 999));
        bench.write(LVTT, ONE_SHOT | VECTOR, at(1300));
        assert_eq!(bench.read(TMCCT, at(1300)), 700);
        assert_eq!((bench.interrupts(at(2000)), bench.read(TMCCT, at(2001))), (1, 0));
        assert_eq!(bench.apic.next_deadline(), None);
    }
}

/// SDM, "Divide Configuration Register": the divider is in front of the counter. The counter holds ticks, so that a
/// change of the divider keeps the ticks and changes how long they take.
#[test]
fn a_divide_change_takes_effect_at_once() {
    for mut bench in Bench::timers(PERIODIC) {
        bench.write(TDCR, BY_2, at(0));
        bench.write(TMICT, 1000, at(0));
        bench.write(TDCR, BY_8, at(501));
        assert_eq!(bench.read(TMCCT, at(501)), 750, "749 ticks and a half");
        assert_eq!(bench.apic.next_deadline(), Some(Deadline::Vm(VmTime(501 + 1499 * 4))));
        assert_eq!(bench.interrupts(at(501 + 1499 * 4 - 1)), 0);
        assert_eq!(bench.interrupts(at(501 + 1499 * 4)), 1);
        assert_eq!(
            bench.apic.next_deadline(),
            Some(Deadline::Vm(VmTime(501 + 1499 * 4 + 8000))),
            "the next period too"
        );
        bench.write(TDCR, BY_128, at(501 + 1499 * 4));
        assert_eq!(bench.read(TMCCT, at(501 + 1499 * 4)), 1000);
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

/// A timer interrupt promises that the instant has passed: one tick before, there is none.
#[test]
fn never_early() {
    let tsc = |tsc| Now { tsc: GuestTsc(tsc), vm: VmTime(u64::MAX) };
    let vm = |ns| Now { tsc: GuestTsc(u64::MAX), vm: VmTime(ns) };
    for deadline in [2, 1 << 32, u64::MAX] {
        for mut bench in Bench::timers(DEADLINE) {
            bench.wrmsr(TSC_DEADLINE, deadline, tsc(0));
            assert_eq!(bench.interrupts(tsc(deadline - 1)), 0);
            assert_eq!(bench.interrupts(tsc(deadline)), 1);
            bench.wrmsr(NS_DEADLINE, deadline, vm(0));
            assert_eq!(bench.interrupts(vm(deadline - 1)), 0);
            assert_eq!(bench.interrupts(vm(deadline)), 1);
        }
    }
}

/// What lies in the past is judged by the registers of the past: evaluate up to `now`, then change a register.
#[test]
fn a_write_comes_after_what_was_due() {
    for mut bench in Bench::timers(DEADLINE) {
        bench.wrmsr(TSC_DEADLINE, 3000, at(0));
        bench.write(LVTT, MASKED | VECTOR, at(1000));
        assert_eq!(bench.interrupts(at(1000)), 1, "due before it was masked");
    }
}

/// SDM, "APIC Timer": 11b is reserved, and bit 18 is where deadlines are not supported. Reserved bits are #GP through
/// the MSR and nothing through the page.
#[test]
fn reserved_timer_modes() {
    let none = Config { tsc_deadline: false, ns_deadline: false, ..ALL };
    for (config, lvtt, kept) in
        [(ALL, PERIODIC | DEADLINE, PERIODIC), (none, DEADLINE, ONE_SHOT), (none, PERIODIC | DEADLINE, PERIODIC)]
    {
        let mut bench = Bench::reset(config);
        bench.write(SVR, 0x1ff, at(0));
        bench.write(LVTT, PERIODIC | 0x40, at(0));
        bench.write(TMICT, 1000, at(0));
        bench.write(LVTT, lvtt | VECTOR, at(1));
        assert_eq!(bench.read(LVTT, at(1)), kept | VECTOR);
        assert_eq!(bench.apic.next_deadline(), Some(Deadline::Vm(VmTime(2000))));

        bench.enter_x2apic();
        let before = bench.apic.clone();
        assert_eq!(bench.apic.msr_write(msr(LVTT), u64::from(lvtt | VECTOR), at(1)), Err(super::super::Fault));
        assert_eq!(bench.apic, before);
    }
    for config in [Config { tsc_deadline: true, ..none }, Config { ns_deadline: true, ..none }] {
        let mut bench = Bench::reset(config);
        bench.write(LVTT, DEADLINE | VECTOR, at(0));
        assert_eq!(bench.read(LVTT, at(0)), DEADLINE | MASKED | VECTOR);
    }
}

/// A deadline MSR that CPUID does not offer does not exist.
#[test]
fn a_deadline_msr_without_its_feature_faults() {
    for (index, config) in
        [(TSC_DEADLINE, Config { tsc_deadline: false, ..ALL }), (NS_DEADLINE, Config { ns_deadline: false, ..ALL })]
    {
        let mut apic = LocalApic::new(config);
        assert!(apic.msr_read(index, at(0)).is_err());
        assert!(apic.msr_write(index, 5, at(0)).is_err());
    }
}

/// `guest_abi::ns_deadline`: one timer, so that writing either register replaces the other's deadline.
#[test]
fn the_two_deadline_msrs_share_the_timer() {
    for mut bench in Bench::timers(DEADLINE) {
        bench.wrmsr(TSC_DEADLINE, 3000, at(0));
        bench.wrmsr(NS_DEADLINE, 2000, at(0));
        assert_eq!((bench.rdmsr(TSC_DEADLINE, at(1)), bench.rdmsr(NS_DEADLINE, at(1))), (0, 2000));
        assert_eq!(bench.interrupts(at(1999)), 0);
        assert_eq!(bench.interrupts(at(2000)), 1);
        assert_eq!(bench.rdmsr(NS_DEADLINE, at(2000)), 0);
        bench.wrmsr(NS_DEADLINE, 1, at(2001));
        assert_eq!(bench.interrupts(at(2001)), 1, "what is not in the future fires at once");
        bench.wrmsr(NS_DEADLINE, 5000, at(3000));
        bench.wrmsr(TSC_DEADLINE, 12_000, at(3000));
        assert_eq!((bench.rdmsr(TSC_DEADLINE, at(3001)), bench.rdmsr(NS_DEADLINE, at(3001))), (12_000, 0));
    }
}

/// SDM, "Valid Interrupt Vectors": the local vector table's illegal vectors are errors, not interrupts.
#[test]
fn a_timer_with_an_illegal_vector_is_a_receive_error() {
    for mut bench in [Bench::xapic(), Bench::x2apic()] {
        bench.write(LVTT, DEADLINE | 15, at(0));
        bench.wrmsr(TSC_DEADLINE, 30, at(0));
        assert_eq!(bench.apic.next_wake(), None);
        bench.apic.advance(at(10));
        assert_eq!((bench.apic.pending(), bench.esr()), (None, 1 << 6));
    }
}

/// A halted CPU waits only for what can enter it.
#[test]
fn a_wake_needs_a_deliverable_interrupt() {
    for mut bench in Bench::timers(DEADLINE) {
        bench.wrmsr(TSC_DEADLINE, 3000, at(0));
        assert!(bench.apic.next_wake().is_some());
        bench.write(TPR, 0xe0, at(1));
        assert_eq!(bench.apic.next_wake(), None, "vector 0xec is of class 0xe");
        assert!(bench.write(TPR, 0xdf, at(1)).timer_changed);
        assert!(bench.apic.next_wake().is_some());
        bench.write(SVR, 0xff, at(1));
        assert_eq!(bench.apic.next_wake(), None, "software disable masks");
        assert!(bench.apic.next_deadline().is_some());
    }
}

/// An instant that a `u64` cannot hold never comes; it does not come at once either.
#[test]
fn a_count_that_ends_after_the_end_of_time_stops() {
    for mut bench in Bench::timers(PERIODIC) {
        let end = |before| Now { tsc: GuestTsc(0), vm: VmTime(u64::MAX - before) };
        bench.write(TMICT, 1000, end(1500));
        assert_eq!(bench.interrupts(end(500)), 1);
        assert_eq!((bench.apic.next_deadline(), bench.read(TMCCT, end(400))), (None, 0));
        bench.write(TMICT, u32::MAX, end(0));
        assert_eq!((bench.interrupts(end(0)), bench.apic.next_deadline()), (0, None));
    }
}
