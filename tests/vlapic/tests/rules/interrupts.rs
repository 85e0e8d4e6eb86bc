//! Acceptance, priority, EOI, errors, software disable and IPIs.

use vlapic::{Delivery, DeliveryMode, Destination, Ipi, LocalSource, Trigger};

use super::*;

/// SDM vol. 3, "Task and Processor Priorities" and "Interrupt Acceptance for Fixed Interrupts".
#[test]
fn the_highest_class_above_the_processor_priority_is_pending() {
    for mut bench in [Bench::xapic(), Bench::x2apic()] {
        bench.fixed(0x51);
        bench.fixed(0x5f);
        assert_eq!(bench.apic.pending(), Some(0x5f));
        bench.apic.acknowledge(0x5f);
        assert_eq!((bench.apic.pending(), bench.read(PPR, at(0))), (None, 0x50), "the same class waits");
        assert!(bench.apic.blocked_by_priority());
        bench.apic.set_cr8(1);
        assert!(!bench.apic.blocked_by_tpr(), "the one in service blocks it, and its EOI exits");
        bench.apic.set_cr8(0);
        bench.fixed(0x60);
        assert_eq!(bench.apic.pending(), Some(0x60));
        assert!(!bench.apic.blocked_by_priority());
        bench.apic.acknowledge(0x60);
        assert_eq!(bench.read(ISR + 0x30, at(0)), 1);
        bench.write(EOI, 0, at(0));
        bench.write(EOI, 0, at(0));
        assert_eq!(bench.apic.pending(), Some(0x51));
        bench.apic.set_cr8(5);
        assert_eq!(bench.apic.pending(), None);
        assert!(bench.apic.blocked_by_tpr());
        bench.apic.set_cr8(4);
        assert_eq!(bench.interrupts(at(0)), 1);
        assert!(!bench.apic.blocked_by_priority());
    }
}

/// SDM vol. 3, "Signaling Interrupt Servicing Completion": the EOI of a level-triggered interrupt is broadcast.
#[test]
fn a_level_triggered_eoi_is_broadcast() {
    for mut bench in [Bench::xapic(), Bench::x2apic()] {
        for (level, eoi) in [(true, Some(0x71)), (false, None)] {
            bench.apic.accept(Interrupt { vector: 0x71, level });
            assert_eq!(bench.read(TMR + 0x30, at(0)) & 1 << 17 != 0, level);
            bench.apic.acknowledge(0x71);
            assert_eq!(bench.write(EOI, 0, at(0)).eoi, eoi);
        }
        assert_eq!(bench.write(EOI, 0, at(0)), Effects::default(), "nothing in service");
    }
}

#[test]
fn what_was_not_requested_cannot_be_acknowledged() {
    let mut bench = Bench::xapic();
    let before = bench.apic.clone();
    bench.apic.acknowledge(0x51);
    bench.apic.acknowledge(3);
    assert_eq!(bench.apic, before);
}

/// SDM vol. 3, "Valid Interrupt Vectors".
/// SDM vol. 3, "Valid Interrupt Vectors": 16 is the first that is no error, wherever it comes from.
#[test]
fn sixteen_is_the_first_legal_vector() {
    for mut bench in [Bench::xapic(), Bench::x2apic()] {
        bench.fixed(16);
        assert_eq!(bench.interrupts(at(0)), 1, "a message");
        bench.write(ICR, 1 << 18 | 16, at(0));
        assert_eq!(bench.interrupts(at(0)), 1, "a message to itself");
        bench.write(LVT_ERROR, 16, at(0));
        assert_eq!(bench.apic.local(LocalSource::Error, true), Delivery::Accepted);
        assert_eq!((bench.interrupts(at(0)), bench.esr()), (1, 0), "the error entry");
    }
}

/// Paravirtual EOI ends an interrupt without a write. That may be done only where the write would change nothing but
/// ISR.
#[test]
fn an_end_is_silent_if_nothing_waits_for_it() {
    for mut bench in [Bench::xapic(), Bench::x2apic()] {
        assert_eq!(bench.apic.silent_end(), None, "nothing is in service");
        bench.fixed(0x51);
        assert_eq!(bench.apic.silent_end(), None, "requested only");
        bench.apic.acknowledge(0x51);
        assert_eq!(bench.apic.silent_end(), Some(0x51));
        bench.fixed(0x41);
        assert_eq!(bench.apic.silent_end(), None, "another is requested");
        bench.fixed(0x61);
        bench.apic.acknowledge(0x61);
        bench.write(EOI, 0, at(0));
        bench.write(EOI, 0, at(0));
        bench.apic.acknowledge(0x41);
        bench.fixed(0x61);
        bench.apic.acknowledge(0x61);
        assert_eq!(bench.apic.silent_end(), None, "another is in service");

        bench.apic.end_silently(0x41);
        assert_eq!(bench.read(ISR + 0x30, at(0)), 1 << 1, "not the highest in service: nothing happens");
        bench.apic.end_silently(0x61);
        assert_eq!((bench.read(ISR + 0x30, at(0)), bench.apic.silent_end()), (0, Some(0x41)));
        bench.apic.end_silently(0x41);
        assert_eq!(bench.read(ISR + 0x20, at(0)), 0);

        bench.apic.accept(Interrupt { vector: 0x71, level: true });
        bench.apic.acknowledge(0x71);
        assert_eq!(bench.apic.silent_end(), None, "level-triggered: its EOI is broadcast");
    }
}

#[test]
fn an_illegal_vector_is_a_receive_error() {
    let mut bench = Bench::xapic();
    bench.fixed(15);
    assert_eq!((bench.apic.pending(), bench.read(IRR, at(0)), bench.esr()), (None, 0, 1 << 6));
}

/// SDM vol. 3, "Error Handling": ESR shows what was logged when it was last written; the write clears the log and
/// rearms the interrupt.
#[test]
fn esr_is_latched_by_a_write() {
    for mut bench in [Bench::xapic(), Bench::x2apic()] {
        bench.write(LVT_ERROR, 0xfe, at(0));
        bench.fixed(15);
        assert_eq!((bench.read(ESR, at(0)), bench.interrupts(at(0))), (0, 1));
        bench.fixed(14);
        bench.write(ICR, 0x4_0001, at(0));
        assert_eq!(bench.interrupts(at(0)), 0, "one interrupt until ESR is written");
        bench.write(ESR, 0, at(0));
        assert_eq!((bench.read(ESR, at(0)), bench.read(ESR, at(0))), (0x60, 0x60));
        bench.fixed(14);
        assert_eq!(bench.interrupts(at(0)), 1);
        assert_eq!((bench.esr(), bench.esr()), (0x40, 0));
    }
}

#[test]
fn an_error_interrupt_with_an_illegal_vector_is_only_another_error() {
    let mut bench = Bench::xapic();
    bench.write(LVT_ERROR, 7, at(0));
    bench.write(0, 0, at(0));
    assert_eq!((bench.apic.pending(), bench.esr()), (None, 0xc0));
}

/// SDM vol. 3, "Local APIC State After It Has Been Software Disabled".
#[test]
fn software_disable() {
    for mut bench in [Bench::xapic(), Bench::x2apic()] {
        bench.write(LVTT, DEADLINE | VECTOR, at(0));
        bench.wrmsr(TSC_DEADLINE, 3000, at(0));
        bench.fixed(0x51);
        bench.write(SVR, 0xff, at(1));
        for lvt in [LVTT, LVT_LINT0, LVT_ERROR] {
            bench.write(lvt, bench.clone().read(lvt, at(1)) & !MASKED, at(1));
            assert_ne!(bench.read(lvt, at(1)) & MASKED, 0, "a mask bit cannot be cleared");
        }
        bench.fixed(0x61);
        bench.fixed(3);
        assert_eq!((bench.apic.pending(), bench.esr()), (Some(0x51), 0), "held, and nothing new accepted");
        assert_eq!(bench.interrupts(at(1000)), 1, "the held one can be handled; the timer is masked");
        let ipi = bench.write(ICR, 0xc_4500, at(1000)).ipi;
        assert_eq!(ipi.map(|ipi| ipi.mode), Some(DeliveryMode::Init), "it can still issue IPIs");
        bench.write(SVR, 0x1ff, at(1001));
        assert_ne!(bench.read(LVTT, at(1001)) & MASKED, 0, "enabling does not unmask");
    }
}

/// SDM vol. 3, "Local APIC State After It Has Been Software Disabled": the mask bits are set, and cannot be cleared.
#[test]
fn software_disable_leaves_every_entry_masked() {
    for mut bench in [Bench::xapic(), Bench::x2apic()] {
        bench.write(LVT_LINT0, 0x51, at(0));
        bench.write(LVT_LINT1, MASKED | 0x52, at(0));
        bench.write(SVR, 0xff, at(0));
        let entries = [LVT_LINT0, LVT_LINT1].map(|offset| bench.read(offset, at(0)));
        assert_eq!(entries, [MASKED | 0x51, MASKED | 0x52]);
        for mask in [0, MASKED] {
            bench.write(LVT_LINT0, mask | 0x53, at(0));
            assert_eq!(bench.read(LVT_LINT0, at(0)), MASKED | 0x53);
        }
    }
}

/// SDM vol. 3, "SELF IPI Register" and the ICR's self shorthand.
#[test]
fn a_self_ipi_is_delivered_here() {
    let mut bench = Bench::x2apic();
    bench.wrmsr(SELF_IPI, 0x51, at(0));
    assert_eq!(bench.interrupts(at(0)), 1);
    assert!(bench.apic.msr_write(SELF_IPI, 0x151, at(0)).is_err());
    // All ones in the destination: the shorthand makes it, and the level and trigger bits, meaningless.
    for icr in [0x4_0051, 0x4_8051, 0x4_0151, 0xffff_ffff_0004_4851] {
        let mut bench = Bench::reset(Config { id: 0x105, ..ALL });
        bench.enter_x2apic();
        bench.write(SVR, 0x1ff, at(0));
        assert_eq!(bench.apic.msr_write(msr(ICR), icr, at(0)).unwrap().ipi, None, "{icr:#x}");
        assert_eq!(bench.read(TMR + 0x20, at(0)), 0, "edge, whatever the trigger bit");
        assert_eq!(bench.interrupts(at(0)), 1, "{icr:#x}");
        assert_eq!(bench.rdmsr(msr(ICR), at(0)), icr);
    }
    let mut bench = Bench::reset(Config { id: 3, ..ALL });
    bench.write(SVR, 0x1ff, at(0));
    bench.write(ICR_HIGH, 3 << 24, at(0));
    assert_eq!(
        bench.write(ICR, 0x5051, at(0)).ipi.map(|ipi| ipi.destination),
        Some(Destination::Physical(3)),
        "another CPU may have given itself this ID"
    );
    assert_eq!((bench.read(ICR, at(0)), bench.read(ICR_HIGH, at(0))), (0x4051, 3 << 24), "delivery status is idle");
}

/// SDM vol. 3, "Error Handling": "send illegal vector" when the ICR is written; and the message arrives here, where it
/// is a "receive illegal vector".
#[test]
fn an_illegal_self_ipi_is_both_errors() {
    let mut bench = Bench::x2apic();
    bench.wrmsr(SELF_IPI, 0xf, at(0));
    assert_eq!((bench.apic.pending(), bench.esr()), (None, 0x60));
    bench.wrmsr(msr(ICR), 0xc_0001, at(0));
    assert_eq!(bench.esr(), 0x20);
    bench.wrmsr(msr(ICR), 0xc_4601, at(0));
    assert_eq!(bench.esr(), 0, "a start-up IPI has a page, not a vector");
}

/// SDM vol. 3, "Interrupt Command Register (ICR)" and "ICR Operation in x2APIC Mode".
#[test]
fn other_ipis_are_handed_out_decoded() {
    let fixed = |destination| {
        Some(Ipi { vector: 0x51, mode: DeliveryMode::Fixed, destination, assert: true, trigger: Trigger::Edge })
    };
    for (icr, destination) in [
        (0x0000_0007_0000_4051, Destination::Physical(7)),
        (0xffff_ffff_0000_4051, Destination::Everyone),
        (0xffff_ffff_0000_4851, Destination::Everyone),
        (0x0000_00ff_0000_4051, Destination::Physical(0xff)),
        (0x0001_0003_0000_4851, Destination::Logical(0x1_0003)),
        (0x0000_0000_0008_4051, Destination::Everyone),
        (0x0000_0000_000c_4051, Destination::Others),
    ] {
        let mut bench = Bench::x2apic();
        assert_eq!(bench.apic.msr_write(msr(ICR), icr, at(0)).unwrap().ipi, fixed(destination));
        assert_eq!(bench.apic.pending(), None);
    }
    for (high, low, destination) in [
        (0x0700_0000, 0x4051, Destination::Physical(7)),
        (0xff00_0000, 0x4051, Destination::Everyone),
        (0xff00_0000, 0x4851, Destination::Logical(0xff)),
        (0, 0xc_4051, Destination::Others),
    ] {
        let mut bench = Bench::xapic();
        assert_eq!(bench.write(ICR_HIGH, high, at(0)), Effects::default());
        assert_eq!(bench.write(ICR, low, at(0)).ipi, fixed(destination));
    }
    let modes = [0, 1, 2, 3, 4, 5, 6, 7].map(|mode| Bench::xapic().write(ICR, 0x8_8051 | mode << 8, at(0)).ipi);
    assert_eq!(
        modes.map(|ipi| ipi.map(|ipi| ipi.mode)),
        [
            Some(DeliveryMode::Fixed),
            Some(DeliveryMode::LowestPriority),
            Some(DeliveryMode::Smi),
            None,
            Some(DeliveryMode::Nmi),
            Some(DeliveryMode::Init),
            Some(DeliveryMode::StartUp),
            None
        ]
    );
    for ipi in modes.into_iter().flatten() {
        let deassert = ipi.mode == DeliveryMode::Init;
        assert_eq!((ipi.assert, ipi.trigger == Trigger::Level), (!deassert, deassert), "{ipi:?}");
    }
}
