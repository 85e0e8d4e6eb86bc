//! IA32_APIC_BASE through its MSR, reset and INIT.

use vlapic::{LocalSource, Mode, MsrFault, Route};

use super::*;

/// The destinations that the CPU accepts; its priority is no part of that.
fn address(apic: &LocalApic) -> Route {
    Route { priority: 0, ..apic.route() }
}

const DISABLED: u64 = 0xfee0_0000;
const XAPIC: u64 = 0xfee0_0800;
const X2APIC: u64 = 0xfee0_0c00;
const INVALID: u64 = 0xfee0_0400;

/// As kvm-unit-tests' `apic` walks through them, and every other pair.
#[test]
fn transitions_change_the_mode_or_fault() {
    let path = |to| match to {
        DISABLED => vec![DISABLED],
        X2APIC => vec![X2APIC],
        _ => vec![],
    };
    let mode = |value| match value {
        DISABLED => Mode::Disabled,
        X2APIC => Mode::X2Apic,
        _ => Mode::XApic,
    };
    for from in [DISABLED, XAPIC, X2APIC] {
        for to in [DISABLED, XAPIC, X2APIC, INVALID] {
            let mut bench = Bench::xapic();
            for step in path(from) {
                bench.wrmsr(APIC_BASE, step, at(0));
            }
            let before = bench.apic.clone();
            let legal = to != INVALID && (from, to) != (X2APIC, XAPIC) && (from, to) != (DISABLED, X2APIC);
            let result = bench.apic.msr_write(APIC_BASE, to, at(0));
            assert_eq!(result.is_ok(), legal, "{from:#x} -> {to:#x}");
            if legal {
                assert_eq!(bench.apic.route().mode, mode(to));
                assert_eq!(result.unwrap().route_changed, address(&before) != address(&bench.apic));
            } else {
                assert_eq!((result, &bench.apic), (Err(MsrFault), &before));
            }
        }
    }
    let mut bench = Bench::reset(Config { x2apic: false, ..ALL });
    assert_eq!(bench.apic.msr_write(APIC_BASE, X2APIC, at(0)), Err(MsrFault));
}

/// SDM vol. 3, "Relocating the Local APIC Registers".
#[test]
fn an_address_beyond_the_physical_width_faults() {
    let mut bench = Bench::xapic();
    assert!(bench.apic.msr_write(APIC_BASE, XAPIC | 1 << 51, at(0)).is_ok());
    assert!(bench.apic.msr_write(APIC_BASE, XAPIC | 1 << 52, at(0)).is_err());
    for bits in [36, 40, 46, 52, 60, 255] {
        let width = bits.min(52);
        bench.apic = LocalApic::new(Config { physical_bits: bits, ..ALL });
        bench.wrmsr(APIC_BASE, 0, at(0));
        bench.wrmsr(APIC_BASE, XAPIC, at(0));
        bench.apic.init();
        bench.apic.reset();
        assert!(bench.apic.msr_write(APIC_BASE, XAPIC | 1 << (width - 1), at(0)).is_ok(), "{bits}");
        assert!(bench.apic.msr_write(APIC_BASE, XAPIC | 1 << width, at(0)).is_err(), "{bits}");
    }
}

/// SDM vol. 3, "Local APIC ID" and "State Changes From xAPIC Mode to x2APIC Mode".
#[test]
fn the_xapic_id_is_writable_and_lost_with_the_mode() {
    let mut bench = Bench::reset(Config { id: 0x102, ..ALL });
    for id in [7, 0xff, 2] {
        let effects = bench.write(ID, id << 24 | 0x1234, at(0));
        assert!(effects.route_changed);
        assert_eq!((bench.read(ID, at(0)), bench.apic.route().id), (id << 24, id));
    }
    assert_eq!(bench.apic, LocalApic::new(Config { id: 0x102, ..ALL }), "as if it had not been written");
    for leave in [[DISABLED, XAPIC].as_slice(), &[X2APIC, DISABLED, XAPIC]] {
        bench.write(ID, 7 << 24, at(0));
        for base in leave {
            bench.wrmsr(APIC_BASE, *base, at(0));
            assert_ne!(bench.apic.route().id, 7);
        }
        assert_eq!(bench.read(ID, at(0)), 2 << 24);
    }
    bench.write(ID, 7 << 24, at(0));
    bench.apic.init();
    assert_eq!(bench.read(ID, at(0)), 7 << 24, "INIT keeps it");
    bench.apic.reset();
    assert_eq!(bench.read(ID, at(0)), 2 << 24, "reset does not");
    bench.enter_x2apic();
    assert_eq!(bench.read(ID, at(0)), 0x102);
    assert_eq!(bench.apic.msr_write(msr(ID), 7, at(0)), Err(MsrFault));
}

/// SDM vol. 3, "Local APIC State After It Receives an INIT Reset" and "x2APIC State Transitions".
#[test]
fn init_keeps_the_mode_the_address_and_the_id() {
    for mut bench in [Bench::xapic(), Bench::x2apic()] {
        let base = bench.apic.apic_base() ^ 0x1_1000;
        bench.wrmsr(APIC_BASE, base, at(0));
        let before = bench.apic.route();
        bench.write(LVTT, DEADLINE | VECTOR, at(0));
        bench.wrmsr(TSC_DEADLINE, 3000, at(0));
        bench.write(TPR, 0x35, at(0));
        bench.write(ICR, 0x4_4061, at(0));
        bench.fixed(3);
        bench.fixed(0x51);
        assert_eq!(bench.apic.local(LocalSource::Lint1, true), vlapic::Delivery::None);
        bench.apic.init();
        let state = bench.apic.state(at(0));
        let expected = vlapic::State { base, lint_high: [false, true], ..Default::default() };
        assert_eq!((state, bench.apic.next_deadline()), (expected, None));
        let after = bench.apic.route();
        assert_eq!((after.id, after.mode, after.enabled), (before.id, before.mode, false));
        assert_eq!(bench.apic.config(), &ALL);
    }
    let mut bench = Bench::xapic();
    bench.wrmsr(APIC_BASE, DISABLED, at(0));
    bench.apic.set_cr8(9);
    bench.apic.init();
    assert_eq!((bench.apic.apic_base(), bench.apic.cr8()), (DISABLED, 0));
}

#[test]
fn reset_is_a_new_apic() {
    for mut bench in [Bench::xapic(), Bench::x2apic()] {
        bench.fixed(0x51);
        bench.apic.reset();
        assert_eq!(bench.apic, LocalApic::new(ALL));
    }
}
