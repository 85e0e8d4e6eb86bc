//! The local vector table's sources: LINT pins, thermal sensor, performance counters, errors.

use vlapic::{Delivery, LocalSource};

use super::*;

const LEVEL: u32 = 1 << 15;
const REMOTE_IRR: u32 = 1 << 14;
const ACTIVE_LOW: u32 = 1 << 13;
const SMI: u32 = 0x200;
const NMI: u32 = 0x400;
const INIT: u32 = 0x500;
const EXT_INT: u32 = 0x700;

/// Drives a pin high and low again; returns what each change delivers.
fn pulse(bench: &mut Bench, source: LocalSource) -> [Delivery; 2] {
    [true, false].map(|high| bench.apic.local(source, high))
}

/// SDM vol. 3, "Local Vector Table", delivery mode. Reserved ones deliver nothing; the two that make sense on pins only
/// do so elsewhere too.
#[test]
fn delivery_modes() {
    for (offset, source, on_pin) in [
        (LVT_LINT0, LocalSource::Lint0, true),
        (LVT_LINT1, LocalSource::Lint1, true),
        (LVT_THERMAL, LocalSource::Thermal, false),
        (LVT_PERFORMANCE, LocalSource::Performance, false),
    ] {
        for (mode, delivery) in [
            (0, Delivery::Accepted),
            (0x100, Delivery::None),
            (SMI, Delivery::Smi),
            (0x300, Delivery::None),
            (NMI, Delivery::Nmi),
            (INIT, if on_pin { Delivery::Init } else { Delivery::None }),
            (0x600, Delivery::None),
            (EXT_INT, if on_pin { Delivery::ExtInt } else { Delivery::None }),
        ] {
            for mut bench in [Bench::xapic(), Bench::x2apic()] {
                bench.write(offset, 0x51 | mode, at(0));
                assert_eq!(pulse(&mut bench, source), [delivery, Delivery::None], "{source:?} {mode:#x}");
                assert_eq!(bench.apic.pending(), (mode == 0).then_some(0x51));
                let masked = source == LocalSource::Performance && delivery != Delivery::None;
                assert_eq!(bench.read(offset, at(0)) & MASKED != 0, masked, "{source:?} {mode:#x}");
                bench.write(offset, 0x61 | mode | MASKED, at(0));
                assert_eq!(pulse(&mut bench, source), [Delivery::None; 2], "masked");
                assert!(bench.interrupts(at(0)) <= 1);
            }
        }
    }
}

#[test]
fn an_illegal_vector_is_an_error() {
    for (offset, source) in [
        (LVT_LINT0, LocalSource::Lint0),
        (LVT_LINT1, LocalSource::Lint1),
        (LVT_THERMAL, LocalSource::Thermal),
        (LVT_PERFORMANCE, LocalSource::Performance),
        (LVT_ERROR, LocalSource::Error),
    ] {
        let mut bench = Bench::xapic();
        bench.write(offset, 15, at(0));
        assert_eq!(bench.apic.local(source, true), Delivery::None);
        assert_eq!((bench.apic.pending(), bench.esr()), (None, 1 << 6), "{source:?}");
    }
    let mut bench = Bench::xapic();
    bench.write(LVT_LINT0, LEVEL | 15, at(0));
    assert_eq!(bench.apic.local(LocalSource::Lint0, true), Delivery::None);
    assert_eq!((bench.read(LVT_LINT0, at(0)), bench.esr()), (LEVEL | 15, 1 << 6), "not accepted: no remote IRR");
}

#[test]
fn the_error_entry() {
    let mut bench = Bench::xapic();
    assert_eq!(bench.apic.local(LocalSource::Error, true), Delivery::None, "masked");
    bench.write(LVT_ERROR, 0xfe, at(0));
    assert_eq!(bench.apic.local(LocalSource::Error, false), Delivery::None);
    assert_eq!(bench.apic.local(LocalSource::Error, true), Delivery::Accepted);
    assert_eq!((bench.interrupts(at(0)), bench.esr()), (1, 0));
}

/// SDM vol. 3, "Interrupt Input Pin Polarity"; an edge is a change from the inactive to the active level.
#[test]
fn edges_and_polarity() {
    for (offset, source) in [(LVT_LINT0, LocalSource::Lint0), (LVT_LINT1, LocalSource::Lint1)] {
        let mut bench = Bench::xapic();
        let levels =
            |bench: &mut Bench, levels: [bool; 5]| levels.map(|high| bench.apic.local(source, high) == Delivery::Nmi);
        bench.write(offset, NMI, at(0));
        let edges = levels(&mut bench, [true, true, false, false, true]);
        assert_eq!(edges, [true, false, false, false, true]);
        bench.write(offset, NMI | ACTIVE_LOW, at(0));
        let edges = levels(&mut bench, [true, false, false, true, false]);
        assert_eq!(edges, [false, true, false, false, true]);
        bench.write(offset, ACTIVE_LOW | 0x51, at(0));
        assert_eq!(pulse(&mut bench, source), [Delivery::None, Delivery::Accepted]);
    }
}

/// SDM vol. 3, "Remote IRR Flag": set on acceptance, reset by the EOI; and as long as the pin is active, again.
#[test]
fn a_level_interrupts_until_it_ends() {
    for mut bench in [Bench::xapic(), Bench::x2apic()] {
        bench.write(LVT_LINT0, LEVEL | 0x51, at(0));
        assert_eq!(bench.apic.local(LocalSource::Lint0, true), Delivery::Accepted);
        assert_eq!(bench.apic.local(LocalSource::Lint0, true), Delivery::None, "an EOI is awaited");
        assert_eq!(bench.read(LVT_LINT0, at(0)), LEVEL | REMOTE_IRR | 0x51);
        assert_eq!(bench.read(TMR + 0x20, at(0)), 1 << 17);
        bench.apic.acknowledge(0x51);
        bench.fixed(0x61);
        bench.apic.acknowledge(0x61);
        bench.write(EOI, 0, at(0));
        assert_eq!(bench.read(LVT_LINT0, at(0)), LEVEL | REMOTE_IRR | 0x51, "not its EOI");
        assert_eq!(bench.apic.pending(), None);
        assert_eq!(bench.write(EOI, 0, at(0)).eoi, Some(0x51));
        assert_eq!(bench.apic.pending(), Some(0x51), "still active");
        assert_eq!(bench.apic.local(LocalSource::Lint0, false), Delivery::None);
        assert_eq!(bench.interrupts(at(0)), 1, "what was accepted stays");
        assert_eq!(bench.read(LVT_LINT0, at(0)), LEVEL | 0x51);
        assert_eq!(bench.interrupts(at(0)), 0);
    }
}

/// The EOI of another vector is not LINT0's, level-triggered or not.
#[test]
fn another_level_triggered_eoi_leaves_remote_irr() {
    for mut bench in [Bench::xapic(), Bench::x2apic()] {
        bench.write(LVT_LINT0, LEVEL | 0x51, at(0));
        assert_eq!(bench.apic.local(LocalSource::Lint0, true), Delivery::Accepted);
        bench.apic.acknowledge(0x51);
        for high in [true, false] {
            assert_eq!(bench.apic.local(LocalSource::Lint0, high), Delivery::None);
            bench.apic.accept(Interrupt { vector: 0x61, level: true });
            bench.apic.acknowledge(0x61);
            assert_eq!(bench.write(EOI, 0, at(0)).eoi, Some(0x61));
            assert_eq!(bench.read(LVT_LINT0, at(0)), LEVEL | REMOTE_IRR | 0x51);
            assert_eq!(bench.read(IRR + 0x20, at(0)), 0, "an EOI is still awaited");
        }
    }
}

/// Who drives LINT0 asks for its level, and whether it can do anything: a device that nothing can hear need not be run.
#[test]
fn lint0_is_heeded_unless_its_entry_is_masked() {
    for mut bench in [Bench::xapic(), Bench::x2apic()] {
        assert!(!bench.apic.heeds_lint0() && !bench.apic.lint0(), "masked after reset");
        bench.write(LVT_LINT0, EXT_INT, at(0));
        assert!(bench.apic.heeds_lint0());
        assert_eq!(bench.apic.local(LocalSource::Lint0, true), Delivery::ExtInt);
        assert!(bench.apic.lint0());
        bench.write(LVT_LINT0, EXT_INT | MASKED, at(0));
        assert!(!bench.apic.heeds_lint0() && bench.apic.lint0(), "the pin is what it was");
        bench.wrmsr(APIC_BASE, 0, at(0));
        assert!(bench.apic.heeds_lint0(), "INTR, while the APIC is disabled");
    }
}

/// Intel, "MultiProcessor Specification", "Virtual Wire Mode": what PC firmware leaves.
#[test]
fn virtual_wire_mode_passes_the_8259_on() {
    let mut bench = Bench { apic: LocalApic::new(ALL).in_virtual_wire_mode(), x2apic: false };
    let entries = [SVR, LVT_LINT0, LVT_LINT1].map(|offset| bench.read(offset, at(0)));
    assert_eq!(entries, [0x1ff, EXT_INT, NMI]);
    assert_eq!(bench.apic.local(LocalSource::Lint0, true), Delivery::ExtInt);
    assert_eq!(bench.apic.local(LocalSource::Lint1, true), Delivery::Nmi);
}

/// A level that is active already interrupts when the entry is unmasked.
#[test]
fn unmasking_finds_an_active_level() {
    let mut bench = Bench::xapic();
    bench.write(LVT_LINT0, MASKED | LEVEL | 0x51, at(0));
    assert_eq!(bench.apic.local(LocalSource::Lint0, true), Delivery::None);
    bench.write(LVT_ERROR, 0xfe, at(0));
    assert_eq!(bench.apic.pending(), None);
    bench.write(LVT_LINT0, LEVEL | 0x51, at(0));
    assert_eq!(bench.apic.pending(), Some(0x51));
    bench.write(LVT_LINT0, MASKED | LEVEL | 0x51, at(0));
    assert_eq!(bench.read(LVT_LINT0, at(0)), MASKED | LEVEL | REMOTE_IRR | 0x51, "read-only");
    bench.write(LVT_LINT0, MASKED | 0x51, at(0));
    assert_eq!(bench.read(LVT_LINT0, at(0)), MASKED | 0x51, "undefined for edges: 0");
    bench.interrupts(at(0));
    bench.write(LVT_LINT0, 0x51, at(0));
    assert_eq!(bench.apic.pending(), None, "an edge that has been is lost");
    bench.write(LVT_LINT0, LEVEL | ACTIVE_LOW | 0x51, at(0));
    assert_eq!(bench.apic.pending(), None);
    assert_eq!(bench.apic.local(LocalSource::Lint0, false), Delivery::Accepted);
}

/// "Level-sensitive interrupts are not supported for LINT1."
#[test]
fn lint1_knows_edges_only() {
    let mut bench = Bench::xapic();
    bench.write(LVT_LINT1, LEVEL | 0x51, at(0));
    assert_eq!(bench.apic.local(LocalSource::Lint1, true), Delivery::Accepted);
    assert_eq!((bench.read(TMR + 0x20, at(0)), bench.read(LVT_LINT1, at(0))), (0, LEVEL | 0x51));
    assert_eq!((bench.interrupts(at(0)), bench.interrupts(at(0))), (1, 0));
}

/// ExtINT "is always level sensitive".
#[test]
fn ext_int_is_there_as_long_as_the_pin() {
    let mut bench = Bench::xapic();
    assert_eq!(bench.apic.local(LocalSource::Lint0, true), Delivery::None);
    assert!(!bench.apic.external_interrupt(), "masked");
    bench.write(LVT_LINT0, EXT_INT, at(0));
    assert!(bench.apic.external_interrupt());
    assert_eq!(bench.apic.local(LocalSource::Lint0, true), Delivery::ExtInt, "no edge needed");
    bench.write(LVT_LINT0, EXT_INT | ACTIVE_LOW, at(0));
    assert!(!bench.apic.external_interrupt());
    bench.write(LVT_LINT0, NMI, at(0));
    assert!(!bench.apic.external_interrupt());
    bench.write(LVT_LINT1, EXT_INT, at(0));
    assert_eq!(bench.apic.local(LocalSource::Lint1, true), Delivery::ExtInt);
    assert!(bench.apic.external_interrupt());
    bench.write(SVR, 0xff, at(0));
    assert!(!bench.apic.external_interrupt(), "software disable masks");
}

/// SDM vol. 3, "Enabling or Disabling the Local APIC": without an APIC, the pins are INTR and NMI.
#[test]
fn a_globally_disabled_apic_lets_the_pins_through() {
    let mut bench = Bench::xapic();
    bench.wrmsr(APIC_BASE, 0, at(0));
    assert_eq!(pulse(&mut bench, LocalSource::Lint0), [Delivery::ExtInt, Delivery::None]);
    assert_eq!(pulse(&mut bench, LocalSource::Lint1), [Delivery::Nmi, Delivery::None]);
    assert!(!bench.apic.external_interrupt());
    assert_eq!(bench.apic.local(LocalSource::Lint0, true), Delivery::ExtInt);
    assert_eq!(bench.apic.local(LocalSource::Lint1, true), Delivery::Nmi);
    assert_eq!(bench.apic.local(LocalSource::Lint1, true), Delivery::None, "an edge");
    assert!(bench.apic.external_interrupt());
    for source in [LocalSource::Thermal, LocalSource::Performance, LocalSource::Error] {
        assert_eq!(bench.apic.local(source, true), Delivery::None);
    }
    bench.wrmsr(APIC_BASE, 0xfee0_0800, at(0));
    assert!(!bench.apic.external_interrupt(), "enabled, and masked");
}
