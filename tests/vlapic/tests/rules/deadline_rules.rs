//! The rules of deadline mode, of the mask and of LVTT, one test each, through both doors.
//!
//! "SDM" is the Intel SDM vol. 3, sections "APIC Timer" and "TSC-Deadline Mode", in other words.

use vlapic::Deadline;

use super::*;

/// The class of [`VECTOR`].
const VECTOR_CLASS: u8 = 0xe0;

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
            bench.write(TMICT, 500_000, at(0));
            for index in [TSC_DEADLINE, NS_DEADLINE] {
                bench.wrmsr(index, 30, at(0));
                assert_eq!(bench.rdmsr(index, at(1)), 0);
            }
            assert_eq!(bench.interrupts(at(499_999)), 0);
            assert_eq!(bench.read(TMCCT, at(499_999)), 1, "and the count goes on");
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

/// A timer interrupt promises that the instant has passed: one tick before, there is none.
#[test]
fn never_early() {
    let tsc = |tsc| Now::new(GuestTsc(tsc), VmTime(u64::MAX));
    let vm = |ns| Now::new(GuestTsc(u64::MAX), VmTime(ns));
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
        bench.write(TMICT, 500_000, at(0));
        bench.write(LVTT, lvtt | VECTOR, at(1));
        assert_eq!(bench.read(LVTT, at(1)), kept | VECTOR);
        assert_eq!(bench.apic.next_deadline(), Some(Deadline::Vm(VmTime(1_000_000))));

        bench.enter_x2apic();
        let before = bench.apic.clone();
        assert_eq!(bench.apic.msr_write(msr(LVTT), u64::from(lvtt | VECTOR), at(1)), Err(vlapic::MsrFault));
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

/// A vCPU that ends its interrupt without an exit (paravirtual EOI) is then open for what that interrupt kept out.
#[test]
fn a_wake_after_the_end_is_what_the_interrupt_in_service_keeps_out() {
    for mut bench in Bench::timers(DEADLINE) {
        bench.wrmsr(TSC_DEADLINE, 3000, at(0));
        let wake = bench.apic.next_wake();
        assert!(wake.is_some());
        bench.fixed(VECTOR_CLASS | 0xf);
        bench.apic.acknowledge(VECTOR_CLASS | 0xf);
        assert_eq!((bench.apic.next_wake(), bench.apic.next_wake_after_end()), (None, wake));
        bench.write(TPR, u32::from(VECTOR_CLASS), at(1));
        assert_eq!(bench.apic.next_wake_after_end(), None, "TPR stays");
    }
}

/// What a VMM asks when it injects, and when it restores.
#[test]
fn the_timer_entry_can_be_asked_for() {
    for mut bench in Bench::timers(DEADLINE) {
        assert_eq!((bench.apic.timer_vector(), bench.apic.in_deadline_mode()), (0xec, true));
        for mode in [ONE_SHOT, PERIODIC] {
            bench.write(LVTT, mode | 0x45, at(0));
            assert_eq!((bench.apic.timer_vector(), bench.apic.in_deadline_mode()), (0x45, false));
        }
    }
}

/// Of the reserved mode 11b a CPU without deadlines has bit 17 alone: periodic mode.
#[test]
fn a_reserved_bit_of_the_mode_is_dropped_at_the_page() {
    let mut bench = Bench::reset(Config { tsc_deadline: false, ns_deadline: false, ..ALL });
    bench.write(SVR, 0x1ff, at(0));
    bench.write(LVTT, PERIODIC | DEADLINE | VECTOR, at(0));
    assert_eq!(bench.read(LVTT, at(0)), PERIODIC | VECTOR);
    // With deadlines no one bit of it is the reserved one: the mode stays.
    let mut bench = Bench::xapic();
    bench.write(LVTT, PERIODIC | DEADLINE | VECTOR, at(0));
    assert_eq!(bench.read(LVTT, at(0)), ONE_SHOT | VECTOR);
}

/// A halted CPU waits only for what can enter it.
#[test]
fn a_wake_needs_a_deliverable_interrupt() {
    for mut bench in Bench::timers(DEADLINE) {
        bench.wrmsr(TSC_DEADLINE, 3000, at(0));
        assert!(bench.apic.next_wake().is_some());
        bench.write(TPR, 0xe0, at(1));
        assert_eq!(bench.apic.next_wake(), None, "vector 0xec is of class 0xe");
        bench.write(TPR, 0xdf, at(1));
        assert!(bench.apic.next_wake().is_some());
        bench.write(SVR, 0xff, at(1));
        assert_eq!(bench.apic.next_wake(), None, "software disable masks");
        assert!(bench.apic.next_deadline().is_some());
    }
}
