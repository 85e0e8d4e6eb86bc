//! Accesses that each interface (page, MSRs, CR8) allows.

use vlapic::MsrFault;

use super::*;

#[test]
fn reset_values() {
    let mut bench = Bench::reset(Config { id: 0x105, ..ALL });
    for (offset, value) in [
        (ID, 0x0500_0000),
        (VERSION, 0x0005_0014),
        (TPR, 0),
        (PPR, 0),
        (LDR, 0),
        (DFR, u32::MAX),
        (SVR, 0xff),
        (ISR, 0),
        (TMR, 0),
        (IRR, 0),
        (ESR, 0),
        (ICR, 0),
        (ICR_HIGH, 0),
        (LVTT, MASKED),
        (LVT_LINT0, MASKED),
        (LVT_ERROR, MASKED),
        (TMICT, 0),
        (TMCCT, 0),
        (TDCR, 0),
    ] {
        assert_eq!(bench.read(offset, at(0)), value, "{offset:#x}");
    }
    assert_eq!(bench.apic.apic_base(), 0xfee0_0900);
    assert_eq!(bench.apic.mmio_base(), Some(0xfee0_0000));
    bench.enter_x2apic();
    assert_eq!(bench.read(ID, at(0)), 0x105);
    // "Deriving Logical x2APIC ID": cluster 0x10, bit 5.
    assert_eq!(bench.read(LDR, at(0)), 0x10_0020);
}

/// SDM vol. 3, "Local APIC Register Address Map": 32-bit accesses at 16-byte boundaries.
#[test]
fn the_page_answers_four_bytes_at_a_register() {
    let mut bench = Bench::xapic();
    for (offset, len) in [(SVR, 1), (SVR, 2), (SVR, 8), (SVR, 0), (SVR + 4, 4), (SVR + 1, 4), (0x1_0000_0000 + SVR, 4)]
    {
        let mut data = vec![0xa5; len];
        bench.apic.mmio_read(offset, &mut data, at(0));
        assert!(data.iter().all(|byte| *byte == 0), "{offset:#x} {len}");
        bench.apic.mmio_write(offset, &vec![0; len], at(0));
    }
    bench.apic.mmio_read(u64::MAX, &mut [0; 4], at(0));
    bench.apic.mmio_write(u64::MAX, &[0; 4], at(0));
    assert_eq!(bench.read(SVR, at(0)), 0x1ff);
    assert_eq!(bench.esr(), 0);
}

#[test]
fn what_lies_behind_the_page_is_no_register() {
    let mut bench = Bench::xapic();
    bench.apic.mmio_read(0x1000, &mut [0; 4], at(0));
    bench.apic.mmio_write(0x1000, &[0; 4], at(0));
    assert_eq!(bench.esr(), 0, "it is not even an illegal one");
    bench.apic.mmio_write(0xff0, &[0; 4], at(0));
    assert_eq!(bench.esr(), 1 << 7);
}

#[test]
fn the_base_msr_reads_in_every_mode() {
    let mut bench = Bench::reset(ALL);
    for value in [0xfee0_0900, 0xfee0_0d00, 0xfee0_0000] {
        bench.wrmsr(APIC_BASE, value, at(0));
        assert_eq!(bench.rdmsr(APIC_BASE, at(0)), value);
    }
}

/// SDM vol. 3, "x2APIC Register Address Space": the page is gone in x2APIC mode, the MSRs exist in no other.
#[test]
fn one_door_at_a_time() {
    let mut bench = Bench::xapic();
    for index in 0x800..=0x8ff {
        assert_eq!(bench.apic.msr_read(index, at(0)), Err(MsrFault));
        assert_eq!(bench.apic.msr_write(index, 0, at(0)), Err(MsrFault));
    }
    bench.enter_x2apic();
    assert_eq!(bench.read(SVR, at(0)), 0x1ff, "the registers stay");
    assert_eq!(bench.apic.mmio_base(), None);
    let mut data = [0xa5; 4];
    bench.apic.mmio_read(SVR, &mut data, at(0));
    bench.apic.mmio_write(SVR, &[0; 4], at(0));
    assert_eq!((data, bench.read(SVR, at(0))), ([0; 4], 0x1ff));
}

/// SDM vol. 3, "Reserved Bit Checking": #GP through the MSR; the page ignores them.
#[test]
fn reserved_bits() {
    for (offset, defined) in [
        (TPR, 0xff_u64),
        (EOI, 0),
        (SVR, 0x3ff),
        (ESR, 0),
        (LVTT, 0x7_10ff),
        (LVT_LINT0, 0x1_f7ff),
        (LVT_ERROR, 0x1_10ff),
        (TMICT, 0xffff_ffff),
        (TDCR, 0xb),
        (ICR, 0xffff_ffff_000c_dfff),
    ] {
        for bit in 0..64 {
            let mut bench = Bench::x2apic();
            let result = bench.apic.msr_write(msr(offset), 1 << bit, at(0));
            assert_eq!(result.is_ok(), defined & 1 << bit != 0, "{offset:#x} bit {bit}");
        }
    }
    let mut bench = Bench::xapic();
    for (offset, value) in [(TPR, 0xff), (TDCR, 0xb), (LDR, 0xff00_0000), (ICR_HIGH, 0xff00_0000)] {
        bench.write(offset, u32::MAX, at(0));
        assert_eq!(bench.read(offset, at(0)), value);
    }
    bench.write(LVT_LINT0, u32::MAX, at(0));
    assert_eq!(bench.read(LVT_LINT0, at(0)), 0x1_a7ff, "delivery status and remote IRR are read-only");
    bench.write(DFR, 0, at(0));
    assert_eq!(bench.read(DFR, at(0)), 0x0fff_ffff);
}

/// SDM vol. 3, "x2APIC Register Address Space".
#[test]
fn rights_behind_the_msr_door() {
    let mut bench = Bench::x2apic();
    for read_only in [ID, VERSION, PPR, LDR, ISR, TMR + 0x70, IRR, TMCCT] {
        assert!(bench.apic.msr_read(msr(read_only), at(0)).is_ok(), "{read_only:#x}");
        assert_eq!(bench.apic.msr_write(msr(read_only), 0, at(0)), Err(MsrFault), "{read_only:#x}");
    }
    for write_only in [msr(EOI), SELF_IPI] {
        assert_eq!(bench.apic.msr_read(write_only, at(0)), Err(MsrFault));
    }
    for absent in [msr(DFR), msr(ICR_HIGH), 0x800, 0x809, 0x80c, 0x82f, 0x840, 0x8ff] {
        assert_eq!(bench.apic.msr_read(absent, at(0)), Err(MsrFault), "{absent:#x}");
        assert_eq!(bench.apic.msr_write(absent, 0, at(0)), Err(MsrFault), "{absent:#x}");
    }
    assert_eq!(bench.esr(), 0, "a fault is not an error in ESR");
}

/// SDM vol. 3, "Error Handling": accessing a reserved register in xAPIC mode is "illegal register address". Writing a
/// read-only register or reading a write-only one is not.
#[test]
fn rights_behind_the_page_door() {
    let mut bench = Bench::xapic();
    bench.write(VERSION, 1, at(0));
    bench.write(ISR, 1, at(0));
    assert_eq!((bench.read(EOI, at(0)), bench.read(VERSION, at(0)), bench.esr()), (0, 0x0005_0014, 0));
    for reserved in [0, 0x90, 0xc0, 0x2f0, 0x3f0, 0x400, 0xff0] {
        bench.write(reserved, 1, at(0));
        assert_eq!(bench.esr(), 1 << 7, "{reserved:#x}");
        assert_eq!((bench.read(reserved, at(0)), bench.esr()), (0, 1 << 7), "{reserved:#x}");
    }
}

/// SDM vol. 3, "Interaction of Task Priorities between CR8 and APIC".
#[test]
fn cr8_is_the_class_of_tpr() {
    let mut bench = Bench::xapic();
    bench.write(TPR, 0x57, at(0));
    assert_eq!(bench.apic.cr8(), 5);
    bench.apic.set_cr8(9);
    assert_eq!(bench.read(TPR, at(0)), 0x90);
    bench.apic.set_cr8(0xff);
    assert_eq!((bench.apic.cr8(), bench.read(TPR, at(0))), (15, 0xf0));
}

/// SDM vol. 3, "Disabling the Local APIC" and "x2APIC Transitions From x2APIC Mode": only the ID survives.
#[test]
fn disabling_resets() {
    for mut bench in [Bench::xapic(), Bench::x2apic()] {
        bench.write(LVTT, DEADLINE | VECTOR, at(0));
        bench.wrmsr(TSC_DEADLINE, 3000, at(0));
        bench.fixed(0x50);
        let effects = bench.apic.msr_write(APIC_BASE, 0xfee0_0100, at(1)).unwrap();
        assert!(effects.base_changed);
        assert_eq!((bench.apic.mmio_base(), bench.apic.pending(), bench.apic.next_deadline()), (None, None, None));
        bench.fixed(0x60);
        bench.wrmsr(APIC_BASE, 0xfee0_0900, at(2));
        assert_eq!(bench.apic, LocalApic::new(ALL));
    }
}

/// SDM vol. 3, "State Changes From xAPIC Mode to x2APIC Mode": what software set stays, except the upper half of ICR.
#[test]
fn entering_x2apic_mode_keeps_the_registers() {
    let mut bench = Bench::xapic();
    bench.write(ICR_HIGH, 0x0700_0000, at(0));
    bench.write(ICR, 0x4051, at(0));
    bench.write(LVTT, DEADLINE | VECTOR, at(0));
    bench.wrmsr(TSC_DEADLINE, 3000, at(0));
    bench.fixed(0x50);
    bench.enter_x2apic();
    assert_eq!(bench.rdmsr(msr(ICR), at(0)), 0x4051);
    assert_eq!((bench.rdmsr(TSC_DEADLINE, at(0)), bench.interrupts(at(1000))), (3000, 2));
}

/// The page moves with the address in IA32_APIC_BASE.
#[test]
fn the_page_moves() {
    let mut bench = Bench::xapic();
    let effects = bench.apic.msr_write(APIC_BASE, 0x1_2345_6900, at(0)).unwrap();
    assert!(effects.base_changed);
    assert_eq!(bench.apic.mmio_base(), Some(0x1_2345_6000));
    assert!(!bench.apic.msr_write(APIC_BASE, 0x1_2345_6900, at(0)).unwrap().base_changed);
}

#[test]
fn owned_msrs() {
    let owned: Vec<u32> = (0..0x1000).filter(|index| LocalApic::owns_msr(*index)).collect();
    assert_eq!(owned.len(), 2 + 0x100);
    assert!([0x1b, 0x6e0, 0x800, 0x8ff].iter().all(|index| owned.contains(index)));
    assert!(LocalApic::owns_msr(NS_DEADLINE));
    assert!(!LocalApic::owns_msr(u32::MAX));
}
