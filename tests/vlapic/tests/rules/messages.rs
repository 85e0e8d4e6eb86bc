//! Messages between CPUs: their destinations, and their effect there.

use vlapic::{Delivery, DeliveryMode, Destination, Ipi, Mode, Route, Trigger, lowest_priority};

use super::*;

fn message(mode: DeliveryMode, vector: u8) -> Ipi {
    Ipi { vector, mode, destination: Destination::Everyone, assert: true, trigger: Trigger::Edge }
}

/// SDM vol. 3, "Determining IPI Destination".
#[test]
fn destinations() {
    let mut bench = Bench::reset(Config { id: 0x12, ..ALL });
    assert!(bench.write(LDR, 0x2400_0000, at(0)).route_changed);
    let logical = |bench: &Bench, to| bench.apic.addressed_by(Destination::Logical(to), false);
    assert_eq!([0x04, 0x20, 0xff, 0x42, 0].map(|to| logical(&bench, to)), [true, true, true, false, false]);
    assert_eq!([0x104, 0x1_0004, u32::MAX].map(|to| logical(&bench, to)), [false; 3], "8 bits");
    assert!(bench.write(DFR, 0, at(0)).route_changed);
    assert_eq!(
        [0x24, 0x2c, 0xff, 0xf4, 0x22, 0x34].map(|to| logical(&bench, to)),
        [true, true, true, false, false, false]
    );
    bench.write(DFR, 0x7000_0000, at(0));
    assert_eq!([0x24, 0xff].map(|to| logical(&bench, to)), [false, true], "a model that does not exist");
    bench.enter_x2apic();
    assert_eq!([0x1_0004, 0x1_ffff, 0x1_0008, 0x0004].map(|to| logical(&bench, to)), [true, true, false, false]);
    let apic = &bench.apic;
    assert!(
        apic.addressed_by(Destination::Physical(0x12), false) && !apic.addressed_by(Destination::Physical(2), true)
    );
    assert!(apic.addressed_by(Destination::Itself, true) && !apic.addressed_by(Destination::Itself, false));
    assert!(!apic.addressed_by(Destination::Others, true) && apic.addressed_by(Destination::Others, false));
    bench.wrmsr(APIC_BASE, 0, at(0));
    for destination in [Destination::Everyone, Destination::Itself, Destination::Physical(0x12)] {
        assert!(!bench.apic.addressed_by(destination, true), "disabled");
    }
}

/// An LDR that was never written is 0, and yet part of a broadcast.
#[test]
fn a_logical_broadcast_needs_no_logical_id() {
    for dfr in [u32::MAX, 0] {
        let mut bench = Bench::xapic();
        bench.write(DFR, dfr, at(0));
        assert!(bench.apic.addressed_by(Destination::Logical(0xff), true));
        assert!(!bench.apic.addressed_by(Destination::Logical(0xfe), true));
    }
}

/// kvm-unit-tests' `apic`: two CPUs with one xAPIC ID both get what is sent to it.
#[test]
fn an_aliased_id_addresses_both() {
    let mut routes = [0, 1].map(|id| {
        let mut bench = Bench::reset(Config { id, ..ALL });
        bench.write(ID, 0, at(0));
        bench.apic.route()
    });
    assert!(routes.iter().all(|route| route.addressed_by(Destination::Physical(0), false)));
    routes[1].id = 1;
    assert!(!routes[1].addressed_by(Destination::Physical(0), false));
}

#[test]
fn a_route_says_what_the_registers_say() {
    let mut bench = Bench::reset(Config { id: 0x1_0005, ..ALL });
    bench.write(LDR, 0x0800_0000, at(0));
    let route = Route { id: 5, mode: Mode::XApic, ldr: 0x0800_0000, dfr: u32::MAX, enabled: false, priority: 0 };
    assert_eq!(bench.apic.route(), route);
    assert!(bench.write(SVR, 0x1ff, at(0)).route_changed);
    assert_eq!(bench.apic.route(), Route { enabled: true, ..route });
    assert!(!bench.write(SVR, 0x1fe, at(0)).route_changed && !bench.write(TPR, 0x40, at(0)).route_changed);
    bench.enter_x2apic();
    let x2apic = Route { id: 0x1_0005, mode: Mode::X2Apic, ldr: 0x1000_0020, enabled: true, priority: 0x40, ..route };
    assert_eq!(bench.apic.route(), x2apic);
}

/// SDM vol. 3, "Lowest Priority Delivery Mode".
#[test]
fn arbitration_priority() {
    for (tpr, requested, in_service, priority) in [
        (0x35, None, None, 0x35),
        (0x35, Some(0x3f), None, 0x35),
        (0x35, Some(0x41), None, 0x40),
        (0x35, None, Some(0x3f), 0x30),
        (0x35, None, Some(0x2f), 0x35),
        (0x35, Some(0x41), Some(0x5a), 0x50),
        (0x35, Some(0x6f), Some(0x5a), 0x60),
        (0, None, None, 0),
    ] {
        let mut bench = Bench::xapic();
        if let Some(vector) = in_service {
            bench.fixed(vector);
            bench.apic.acknowledge(vector);
        }
        if let Some(vector) = requested {
            bench.fixed(vector);
        }
        bench.write(TPR, tpr, at(0));
        assert_eq!(bench.apic.route().priority, priority, "{tpr:#x} {requested:?} {in_service:?}");
    }
}

#[test]
fn the_lowest_priority_gets_it() {
    let route = |priority| Route { priority, enabled: true, ..Bench::xapic().apic.route() };
    let choose = |routes: &[Route]| lowest_priority(routes.iter().copied().enumerate());
    assert_eq!(choose(&[]), None);
    assert_eq!(choose(&[route(0x40), route(0x20), route(0x30)]), Some(1));
    assert_eq!(choose(&[route(0x40), route(0x20), route(0x20)]), Some(1), "the first of equals");
    assert_eq!(lowest_priority([(7, route(0x20)), (3, route(0x20))].into_iter()), Some(3), "by index, not by order");
    let off = Route { enabled: false, ..route(0) };
    let gone = Route { mode: Mode::Disabled, ..route(0) };
    assert_eq!(choose(&[off, gone, route(0xf0)]), Some(2));
    assert_eq!(choose(&[off, gone]), None);
}

/// SDM vol. 3, "Interrupt Command Register (ICR)", delivery mode, at the receiver.
#[test]
fn each_delivery_mode_arrives_as_what_it_is() {
    for mut bench in [Bench::xapic(), Bench::x2apic()] {
        for (mode, delivery) in [
            (DeliveryMode::Nmi, Delivery::Nmi),
            (DeliveryMode::Smi, Delivery::Smi),
            (DeliveryMode::Init, Delivery::Init),
            (DeliveryMode::StartUp, Delivery::StartUp { vector: 5 }),
        ] {
            let before = bench.apic.clone();
            assert_eq!(bench.apic.deliver(&message(mode, 5)), delivery);
            assert_eq!(bench.apic, before, "for the CPU alone, and 5 is no illegal vector");
        }
        for mode in [DeliveryMode::Fixed, DeliveryMode::LowestPriority] {
            assert_eq!(bench.apic.deliver(&message(mode, 0x51)), Delivery::Accepted);
            assert_eq!((bench.read(TMR + 0x20, at(0)), bench.interrupts(at(0))), (0, 1));
        }
        let level = Ipi { trigger: Trigger::Level, ..message(DeliveryMode::Fixed, 0x51) };
        assert_eq!(bench.apic.deliver(&level), Delivery::Accepted);
        assert_eq!((bench.read(TMR + 0x20, at(0)), bench.apic.pending()), (1 << 17, Some(0x51)));
    }
}

/// "Not supported in the Pentium 4 and Intel Xeon processors".
#[test]
fn init_level_deassert_does_nothing() {
    let mut bench = Bench::xapic();
    let ipi = bench.write(ICR, 0xc_8500, at(0)).ipi.unwrap();
    assert_eq!((ipi.assert, ipi.trigger, bench.apic.deliver(&ipi)), (false, Trigger::Level, Delivery::None));
    for icr in [0xc_c500, 0xc_4500, 0xc_0500] {
        let ipi = bench.write(ICR, icr, at(0)).ipi.unwrap();
        assert_eq!((ipi.assert, ipi.trigger, bench.apic.deliver(&ipi)), (true, Trigger::Edge, Delivery::Init));
    }
    let level = Ipi { trigger: Trigger::Level, assert: false, ..message(DeliveryMode::Fixed, 0x51) };
    assert_eq!((bench.apic.deliver(&level), bench.apic.pending()), (Delivery::None, None));
}

/// SDM vol. 3, "Error Handling", receive illegal vector; the error's own interrupt is something to look at.
#[test]
fn an_illegal_vector_is_not_accepted() {
    let mut bench = Bench::xapic();
    assert_eq!(bench.apic.deliver(&message(DeliveryMode::Fixed, 15)), Delivery::None);
    assert_eq!((bench.apic.pending(), bench.esr()), (None, 1 << 6));
    bench.write(LVT_ERROR, 0xfe, at(0));
    assert_eq!(bench.apic.deliver(&message(DeliveryMode::LowestPriority, 0)), Delivery::Accepted);
    assert_eq!((bench.apic.pending(), bench.esr()), (Some(0xfe), 1 << 6));
    assert_eq!(bench.apic.deliver(&message(DeliveryMode::Fixed, 16)), Delivery::Accepted);
}

/// SDM vol. 3, "Local APIC State After It Has Been Software Disabled" and "Enabling or Disabling the Local APIC".
#[test]
fn a_disabled_apic() {
    for mut bench in [Bench::xapic(), Bench::x2apic()] {
        bench.write(SVR, 0xff, at(0));
        assert_eq!(bench.apic.deliver(&message(DeliveryMode::Fixed, 0x51)), Delivery::None);
        assert_eq!(bench.apic.deliver(&message(DeliveryMode::Fixed, 3)), Delivery::None);
        assert_eq!((bench.apic.pending(), bench.esr()), (None, 0));
        let messages =
            [DeliveryMode::Nmi, DeliveryMode::Smi, DeliveryMode::Init, DeliveryMode::StartUp].map(|m| message(m, 8));
        let taken = [Delivery::Nmi, Delivery::Smi, Delivery::Init, Delivery::StartUp { vector: 8 }];
        assert_eq!(messages.map(|message| bench.apic.deliver(&message)), taken, "by software: \"responds normally\"");
        bench.wrmsr(APIC_BASE, 0, at(0));
        assert_eq!(messages.map(|message| bench.apic.deliver(&message)), [Delivery::None; 4], "globally: not there");
    }
}

/// What is reserved, remote read among it, is refused by sending nothing; the register keeps what was written.
#[test]
fn remote_read_and_ext_int_send_nothing() {
    for mut bench in [Bench::xapic(), Bench::x2apic()] {
        for mode in [3, 7] {
            let icr = 0xc_4002 | mode << 8;
            assert_eq!(bench.write(ICR, icr, at(0)), Effects::default());
            assert_eq!((bench.read(ICR, at(0)), bench.esr()), (icr, 0), "and no remote read status");
        }
    }
    assert!(Bench::x2apic().apic.msr_write(msr(ICR), 1 << 16, at(0)).is_err(), "remote read status is reserved");
}
