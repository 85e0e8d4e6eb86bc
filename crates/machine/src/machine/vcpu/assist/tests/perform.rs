//! Whole instructions.

use iced_x86::{Decoder, DecoderOptions};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::{Fpu, decode, fault, long_mode, map, memory, not_covered, protected_mode, run, state};
use crate::{
    kvm::{
        Exception,
        state::{GeneralRegisters, SystemRegisters},
    },
    machine::vcpu::assist::instruction::{kind, perform},
};

const PAGE: u64 = 0x40_0000;
/// CMPXCHG16B [RSI], with LOCK.
const LOCK_CMPXCHG16B: [u8; 5] = [0xf0, 0x48, 0x0f, 0xc7, 0x0e];

fn compare(rsi: u64) -> GeneralRegisters {
    GeneralRegisters { rsi, rax: 1, rdx: 2, rbx: 3, rcx: 4, rflags: 0x8d7, ..Default::default() }
}

// Catches: halves exchanged, flags other than ZF touched, registers that are loaded although the comparison held.
#[test]
fn cmpxchg16b_exchanges_or_loads() {
    let (memory, system) = (memory(), long_mode());
    map(&memory, PAGE, 0x4003);
    memory.write_obj([1u64, 2], GuestAddress(0x4010)).unwrap();
    for (held, zf) in [([3u64, 4], 0x40), ([3, 4], 0)] {
        let (after, raised) = run(&memory, &system, compare(PAGE + 0x10), &LOCK_CMPXCHG16B).unwrap();
        assert_eq!((memory.read_obj::<[u64; 2]>(GuestAddress(0x4010)).unwrap(), raised), (held, None));
        let loaded = if zf == 0 { (3, 4) } else { (1, 2) };
        assert_eq!((after.rax, after.rdx, after.rflags), (loaded.0, loaded.1, 0x897 | zf));
    }
}

// Catches: an unaligned operand accepted, a page that may not be written read, the order of the two faults.
#[test]
fn cmpxchg16b_faults_as_a_store_does() {
    let (memory, system) = (memory(), long_mode());
    let at = |rsi| fault(run(&memory, &system, compare(rsi), &LOCK_CMPXCHG16B));
    map(&memory, PAGE, 0x4001);
    assert_eq!(at(PAGE), Exception::page_fault(3, PAGE));
    assert_eq!(at(PAGE + 8), Exception::GENERAL_PROTECTION);
    assert_eq!(at(PAGE + 0x1000), Exception::page_fault(2, PAGE + 0x1000));
    assert_eq!(at(1 << 60), Exception::GENERAL_PROTECTION);
    map(&memory, PAGE, 0x20_0003);
    not_covered(run(&memory, &system, compare(PAGE), &LOCK_CMPXCHG16B));
}

// Catches: a NOP that reads its operand, CLWB that does not, RDSSP that is taken for a NOP where it is none, INT3 that
// stops before itself.
#[test]
fn nops_and_breakpoints() {
    let (memory, system) = (memory(), long_mode());
    let before = GeneralRegisters { rax: 1 << 60, rflags: 0x246, ..Default::default() };
    // nop eax, [rax] in its reserved form; endbr64; rdsspq rax.
    for nop in [&[0x0f, 0x19, 0x00][..], &[0xf3, 0x0f, 0x1e, 0xfa], &[0xf3, 0x48, 0x0f, 0x1e, 0xc8]] {
        assert_eq!(run(&memory, &system, before, nop).unwrap(), (before, None), "{nop:02x?}");
    }
    let cet = SystemRegisters { cr4: 0x80_0020, ..system };
    not_covered(run(&memory, &cet, before, &[0xf3, 0x48, 0x0f, 0x1e, 0xc8]));
    assert_eq!(run(&memory, &system, before, &[0xcc]).unwrap(), (before, Some(Exception::BREAKPOINT)));
    // int 0x80; int 2; clwb [rax], which is not canonical; clwb [0x500000], which is not mapped.
    let interrupt = Exception { vector: 0x80, error_code: None, cr2: None };
    assert_eq!(run(&memory, &system, before, &[0xcd, 0x80]).unwrap(), (before, Some(interrupt)));
    not_covered(run(&memory, &system, before, &[0xcd, 2]));
    let clwb = run(&memory, &system, before, &[0x66, 0x0f, 0xae, 0x30]);
    assert_eq!(fault(clwb), Exception::GENERAL_PROTECTION);
    let clwb = run(&memory, &system, before, &[0x66, 0x0f, 0xae, 0x34, 0x25, 0, 0, 0x50, 0]);
    assert_eq!(fault(clwb), Exception::page_fault(0, 0x50_0000));
}

// Catches: the two exchanged, another flag touched; RDTSCP that tells the host's TSC.
#[test]
fn system_registers() {
    let (memory, system) = (memory(), long_mode());
    let before = GeneralRegisters { rax: !0, rdx: !0, rflags: 0x246, ..Default::default() };
    let stac = run(&memory, &system, before, &[0x0f, 0x01, 0xcb]).unwrap().0;
    assert_eq!(stac, GeneralRegisters { rflags: 0x4_0246, ..before });
    assert_eq!(run(&memory, &system, stac, &[0x0f, 0x01, 0xca]).unwrap().0, before);
    assert_eq!(fault(run(&memory, &system, before, &[0x0f, 0x01, 0xf9])), Exception::INVALID_OPCODE);
}

// Catches: an x87 exception that waits and is not taken, a task switch that is not noticed.
#[test]
fn fwait_takes_what_waits() {
    let memory = memory();
    let with = |cr0: u64, status: u16| {
        let system = SystemRegisters { cr0, ..protected_mode() };
        let mut state = state(&memory, &system, GeneralRegisters::default());
        perform(&mut state, &decode(&[0x9b], 32), &[0x9b], &Fpu::new(None, status))
    };
    assert_eq!(with(0x21, 0x3800).unwrap(), None);
    assert_eq!(fault(with(0x21, 0x80)), Exception::X87);
    not_covered(with(0x01, 0x80));
    assert_eq!(fault(with(0x2b, 0x80)), Exception::DEVICE_NOT_AVAILABLE);
    assert_eq!(with(0x29, 0).unwrap(), None, "CR0.MP is clear");
}

// Catches: operands in another order than the CPU's, halves of a register that are kept or lost.
#[test]
fn operands_stand_where_the_cpu_has_them() {
    let has_all = is_x86_feature_detected!("popcnt")
        && is_x86_feature_detected!("bmi1")
        && is_x86_feature_detected!("bmi2")
        && is_x86_feature_detected!("adx");
    if !has_all {
        return;
    }
    let (memory, system) = (memory(), long_mode());
    let before = GeneralRegisters {
        rax: 0xf0f0,
        rbx: 0x8000_0000_0000_ff0f,
        rcx: 0x0804,
        rdx: 1 << 63,
        rflags: 0x8d7,
        ..Default::default()
    };
    let after = |code: &[u8]| run(&memory, &system, before, code).unwrap().0;
    // popcnt bx, ax; popcnt ebx, ebx.
    assert_eq!(after(&[0x66, 0xf3, 0x0f, 0xb8, 0xd8]).rbx, 0x8000_0000_0000_0008);
    assert_eq!(after(&[0xf3, 0x0f, 0xb8, 0xdb]).rbx, 12);
    // andn rcx, rbx, rax; bextr rax, rbx, rcx; bzhi rax, rbx, rcx; pdep rax, rbx, rcx; shlx rax, rbx, rcx.
    assert_eq!(after(&[0xc4, 0xe2, 0xe0, 0xf2, 0xc8]).rcx, 0xf0);
    assert_eq!(after(&[0xc4, 0xe2, 0xf0, 0xf7, 0xc3]).rax, 0xf0);
    assert_eq!(after(&[0xc4, 0xe2, 0xf0, 0xf5, 0xc3]).rax, 0xf);
    assert_eq!(after(&[0xc4, 0xe2, 0xe3, 0xf5, 0xc1]).rax, 0x0804);
    assert_eq!(after(&[0xc4, 0xe2, 0xf1, 0xf7, 0xc3]).rax, 0xf_f0f0);
    // mulx rax, rcx, rbx; mulx rax, rax, rbx: one destination gets the high half.
    let product = after(&[0xc4, 0xe2, 0xf3, 0xf6, 0xc3]);
    assert_eq!((product.rax, product.rcx, product.rflags), (0x4000_0000_0000_7f87, 1 << 63, 0x8d7));
    assert_eq!(after(&[0xc4, 0xe2, 0xfb, 0xf6, 0xc3]).rax, 0x4000_0000_0000_7f87);
    // adcx rax, rbx; adox eax, ebx.
    assert_eq!(after(&[0x66, 0x48, 0x0f, 0x38, 0xf6, 0xc3]).rflags, 0x8d6);
    let adox = after(&[0xf3, 0x0f, 0x38, 0xf6, 0xc3]);
    assert_eq!((adox.rax, adox.rflags), (0x1_f000, 0x0d7));
    // blsr rcx, rbx; rorx eax, ebx, 4.
    assert_eq!(after(&[0xc4, 0xe2, 0xf0, 0xf3, 0xcb]).rcx, 0x8000_0000_0000_ff0e);
    assert_eq!(after(&[0xc4, 0xe3, 0x7b, 0xf0, 0xc3, 0x04]).rax, 0xf000_0ff0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]

    // Catches: a panic, or an access outside RAM, whatever a guest executes and holds in its registers and tables.
    #[test]
    fn whatever_a_guest_executes(code: [u8; 15], prefix in 0..19usize, registers: [u64; 8], cr: [u64; 3], long: bool) {
        let prefixes: [&[u8]; 19] = [
            &[], &[0xf3, 0x0f, 0xb8], &[0xf3, 0x48, 0x0f, 0xb8], &[0x66, 0x0f, 0x38, 0xf6], &[0xf3, 0x0f, 0x38, 0xf6],
            &[0xc4, 0xe2], &[0xc4, 0xe3], &[0xc4, 0xc2], &[0x48, 0x0f, 0xc7], &[0x0f, 0x01], &[0x0f, 0x1e], &[0x65, 0x67], &[0xdf],
            &[0x0f], &[0x66, 0x0f], &[0x66, 0x0f, 0x38], &[0xf2, 0x48, 0x0f], &[0xc5], &[0x0f, 0xae],
        ];
        let code = [prefixes[prefix], &code].concat();
        let memory = memory();
        let [rax, rbx, rcx, rdx, rsi, rdi, rsp, rflags] = registers;
        let registers = GeneralRegisters { rax, rbx, rcx, rdx, rsi, rdi, rsp, rflags, ..Default::default() };
        let base = if long { long_mode() } else { protected_mode() };
        let system = SystemRegisters { cr0: base.cr0 | cr[0] & 1 << 31, cr3: cr[1], cr4: base.cr4 ^ cr[2], ..base };
        let instruction = Decoder::new(if long { 64 } else { 32 }, &code, DecoderOptions::NONE).decode();
        if kind(&instruction, &code).is_some() {
            let fpu = Fpu::new(Some(7), 0);
            let _ = perform(&mut state(&memory, &system, registers), &instruction, &code, &fpu);
        }
    }
}
