//! XGETBV, XSETBV, and saving and restoring registers.

use proptest::prelude::*;

use super::*;
use crate::host::xstate::{
    components,
    native::{self, Aligned, Kind},
};

const PAGE: u64 = 0x40_0000;
/// The physical pages of [`PAGE`] and the next.
const RAM: [u64; 2] = [0x4000, 0x8000];

/// In 64-bit mode with two pages at [`PAGE`] that may be written.
struct Guest {
    memory: GuestRam,
    fpu: Fpu,
    system: SystemRegisters,
}

impl Guest {
    fn new() -> Self {
        let guest = Self {
            memory: memory(),
            fpu: Fpu::new(Some(7), 0),
            system: SystemRegisters { cr4: 0x4_0020, ..long_mode() },
        };
        map(&guest.memory, PAGE, RAM[0] | 3);
        map(&guest.memory, PAGE + 0x1000, RAM[1] | 3);
        guest
    }

    /// Performs `code` with RSI = `address`, and EDX:EAX = `mask`.
    fn run(&self, code: &[u8], address: u64, mask: u64) -> Result<GeneralRegisters, Stop> {
        self.with(code, GeneralRegisters { rsi: address, rax: mask, rdx: mask >> 32, ..Default::default() })
    }

    fn with(&self, code: &[u8], registers: GeneralRegisters) -> Result<GeneralRegisters, Stop> {
        let mut state = state(&self.memory, &self.system, registers);
        perform(&mut state, &decode(code, 64), code, &self.fpu)?;
        Ok(state.registers)
    }

    /// Writes at [`PAGE`] plus `offset`, in whatever page that is.
    fn put(&self, offset: u64, bytes: &[u8]) {
        for (at, byte) in (offset..).zip(bytes) {
            self.memory.write_obj(*byte, GuestAddress(RAM[(at >> 12) as usize] + (at & 0xfff))).unwrap();
        }
    }

    fn read(&self, offset: u64, length: u64) -> Vec<u8> {
        let at = |at: u64| GuestAddress(RAM[(at >> 12) as usize] + (at & 0xfff));
        (offset..offset + length).map(|offset| self.memory.read_obj(at(offset)).unwrap()).collect()
    }
}

const XGETBV: [u8; 3] = [0x0f, 0x01, 0xd0];
const XSETBV: [u8; 3] = [0x0f, 0x01, 0xd1];
/// Of [RSI], with REX.W.
const XSAVE: [u8; 4] = [0x48, 0x0f, 0xae, 0x26];
const XSAVEOPT: [u8; 4] = [0x48, 0x0f, 0xae, 0x36];
const XSAVEC: [u8; 4] = [0x48, 0x0f, 0xc7, 0x26];
const XSAVES: [u8; 4] = [0x48, 0x0f, 0xc7, 0x2e];
const XRSTOR: [u8; 4] = [0x48, 0x0f, 0xae, 0x2e];
const XRSTORS: [u8; 4] = [0x48, 0x0f, 0xc7, 0x1e];

// Catches: XCR0 told or set although the guest has not enabled XSAVE; a register made up; a value that the CPU refuses;
// components that are told to be in use.
#[test]
fn xcr0_is_read_and_set() {
    let mut guest = Guest::new();
    let before = GeneralRegisters { rax: !0, rdx: !0, rflags: 0x246, ..Default::default() };
    let numbered = |rcx| GeneralRegisters { rcx, ..before };
    assert_eq!(guest.with(&XGETBV, before).unwrap(), GeneralRegisters { rax: 7, rdx: 0, ..before });
    assert_eq!(guest.with(&XGETBV, numbered(1 << 32 | 1)).unwrap().rax, 0);
    guest.fpu.area.borrow_mut().set_mxcsr(0x1f81);
    assert_eq!(guest.with(&XGETBV, numbered(1)).unwrap().rax, 2);
    assert_eq!(fault(guest.with(&XGETBV, numbered(2))), Exception::GENERAL_PROTECTION);
    let set = |rcx, rax, rdx| guest.with(&XSETBV, GeneralRegisters { rcx, rax, rdx, ..before });
    set(0, 3, 1 << 32).unwrap();
    assert_eq!(guest.fpu.xcr0.get(), Some(3));
    for (rcx, rax, rdx) in [(1, 3, 0), (0, 2, 0), (0, 3, 1), (0, 15, 0)] {
        assert_eq!(fault(set(rcx, rax, rdx)), Exception::GENERAL_PROTECTION);
    }
    guest.system.cr4 = 0x20;
    for code in [&XGETBV[..], &XSETBV, &XSAVE, &XRSTORS] {
        assert_eq!(fault(guest.run(code, PAGE, 7)), Exception::INVALID_OPCODE);
    }
    assert_eq!(guest.fpu.xcr0.get(), Some(3));
}

// Catches: an area that is not aligned, a page that may not be written, a task switch, each unnoticed; a part that is
// written although another faults, or registers that are half restored.
#[test]
fn what_faults_changes_nothing() {
    let mut guest = Guest::new();
    guest.fpu.area.borrow_mut().set_mxcsr(0x1f81);
    let saves = [XSAVE, XSAVEOPT, XSAVEC, XSAVES];
    for code in saves.into_iter().chain([XRSTOR, XRSTORS]) {
        assert_eq!(fault(guest.run(&code, PAGE + 16, 7)), Exception::GENERAL_PROTECTION);
        assert_eq!(fault(guest.run(&code, 1 << 60, 7)), Exception::GENERAL_PROTECTION);
    }
    // The second page, where the header is or the AVX registers are, is absent.
    map(&guest.memory, PAGE + 0x1000, 0);
    for (code, at) in saves.into_iter().flat_map(|code| [0xe00, 0xdc0].map(|at| (code, PAGE + at))) {
        if at == PAGE + 0xe00 || code == XSAVE {
            assert_eq!(fault(guest.run(&code, at, 7)), Exception::page_fault(2, PAGE + 0x1000), "{code:02x?}");
        }
    }
    assert!(guest.read(0, 0x1000).iter().all(|byte| *byte == 0));
    guest.put(0xdc0 + 512, &[4]);
    let before = guest.fpu.area.borrow().clone();
    assert_eq!(fault(guest.run(&XRSTOR, PAGE + 0xdc0, 7)), Exception::page_fault(0, PAGE + 0x1000));
    assert_eq!(*guest.fpu.area.borrow(), before);
    guest.system.cr0 |= 8;
    assert_eq!(fault(guest.run(&XSAVE, PAGE, 7)), Exception::DEVICE_NOT_AVAILABLE);
    guest.system.cr0 &= !8;
    // A page that is not RAM, and supervisor components.
    map(&guest.memory, PAGE, 0x20_0003);
    not_covered(guest.run(&XSAVE, PAGE, 7));
    guest.fpu.xss = 1 << 11;
    not_covered(guest.run(&XSAVES, PAGE, 1 << 11));
}

// Catches: a header that XRSTOR must not take.
#[test]
fn what_the_header_must_not_have() {
    let guest = Guest::new();
    let header = |words: [u64; 8]| {
        guest.put(512, &words.map(u64::to_le_bytes).concat());
        (guest.run(&XRSTOR, PAGE, 7), guest.run(&XRSTORS, PAGE, 7))
    };
    let good = [[1, 1 << 63 | 7, 0, 0, 0, 0, 0, 0], [0, 1 << 63, 0, 0, 0, 0, 0, 0]];
    for words in good {
        let (xrstor, xrstors) = header(words);
        assert!(xrstor.is_ok() && xrstors.is_ok(), "{words:x?}");
    }
    // The standard form is XRSTOR's only, and it ignores what is behind the first three words.
    for words in [[0; 8], [7, 0, 0, 1, 0, 0, 0, 1]] {
        let (xrstor, xrstors) = header(words);
        assert!(xrstor.is_ok(), "{words:x?}");
        assert_eq!(fault(xrstors), Exception::GENERAL_PROTECTION);
    }
    let bad = [
        [8, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 0, 1, 0, 0, 0, 0, 0],
        [2, 1 << 63 | 1, 0, 0, 0, 0, 0, 0],
        [0, 1 << 63 | 8, 0, 0, 0, 0, 0, 0],
        [0, 1 << 63, 1, 0, 0, 0, 0, 0],
        [0, 1 << 63, 0, 0, 0, 0, 0, 1],
    ];
    for words in bad {
        let (xrstor, xrstors) = header(words);
        assert_eq!((fault(xrstor), fault(xrstors)), (Exception::GENERAL_PROTECTION, Exception::GENERAL_PROTECTION));
    }
    // MXCSR's reserved bits.
    guest.put(24, &[0, 0, 0, 0x80]);
    let (xrstor, _) = header([0; 8]);
    assert_eq!(fault(xrstor), Exception::GENERAL_PROTECTION);
}

// Catches: pointers of 64 bits where the instruction has 32.
#[test]
fn pointers_have_the_instructions_size() {
    let guest = Guest::new();
    guest.fpu.area.borrow_mut().put(8, &[0x11; 16]);
    guest.fpu.area.borrow_mut().set_in_use(1);
    guest.run(&XSAVE, PAGE, 1).unwrap();
    assert_eq!(guest.read(8, 16), [0x11; 16]);
    let narrow = [[0x11; 4], [0; 4], [0x11; 4], [0; 4]].concat();
    guest.run(&XSAVE[1..], PAGE, 1).unwrap();
    assert_eq!(guest.read(8, 16), narrow);
    guest.put(8, &[0x22; 16]);
    guest.run(&XRSTOR[1..], PAGE, 1).unwrap();
    assert_eq!(guest.fpu.area.borrow().get(8..24).unwrap(), narrow.iter().map(|byte| byte * 2).collect::<Vec<_>>());
}

/// Registers that need not be masked: of x87 the tags are set, and no pointer is, which CPUs do not always save.
fn random_state(random: &[u8; 832], in_use: u8) -> XsaveArea {
    let mut area = XsaveArea::initial();
    area.put(32, &random[32..416]);
    for register in 0..8 {
        // The reserved bytes of an x87 register.
        area.put(32 + register * 16 + 10, &[0; 6]);
    }
    area.put(576, &random[576..]);
    area.put(4, &[0xff]);
    area.set_in_use(in_use.into());
    if in_use & 2 != 0 {
        area.set_mxcsr(0x1f80 | u32::from(random[0]) & 0x3f);
    }
    area
}

/// What the CPU would have: initial values for what is not in use.
fn as_on_the_cpu(mut area: XsaveArea) -> Aligned {
    // A CPU that restores the area itself has MXCSR in it whatever is in use.
    area.put(28, &[0; 4]);
    let mut bytes = [0; 4096];
    bytes.copy_from_slice(area.bytes());
    Aligned(bytes)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    // Catches: anything that the CPU writes to memory or to registers otherwise, in any form, with any components asked
    // for, in use and present. The CPU's own instruction is the account.
    #[test]
    fn it_is_what_the_cpu_does(
        random in proptest::array::uniform32(any::<[u8; 26]>()), other: u8, in_use in 0..8u8, mask in 0..8u32,
        bv in 0..8u64, xcomp in proptest::option::of(0..8u64), kind in 0..4usize, at in 0..4u64,
    ) {
        let kind = [Kind::Xsave, Kind::Xsaveopt, Kind::Xsavec, Kind::Xrstor][kind];
        if !native::has(kind) || !native::has(Kind::Xsavec) {
            return Ok(());
        }
        let mut flat = [0; 832];
        flat.copy_from_slice(random.as_flattened());
        let guest = Guest::new();
        let state = random_state(&flat, in_use);
        // The area in memory: other registers, and a header.
        flat.iter_mut().for_each(|byte| *byte = byte.wrapping_mul(3).wrapping_add(other));
        let mut operand = Aligned([other; 4096]);
        operand.0[..832].copy_from_slice(random_state(&flat, 7).bytes().get(..832).unwrap());
        let (bv, xcomp) = xcomp.map_or((bv, 0), |xcomp| (bv & xcomp, xcomp | 1 << 63));
        operand.0[512..520].copy_from_slice(&bv.to_le_bytes());
        operand.0[520..528].copy_from_slice(&xcomp.to_le_bytes());

        let mut cpu = as_on_the_cpu(state.clone());
        // Both have the registers as the CPU has them then.
        native::execute(Kind::Xrstor, &mut cpu, &mut as_on_the_cpu(state), 0);
        *guest.fpu.area.borrow_mut() = XsaveArea::from_bytes(cpu.0.to_vec());
        let address = 0xd00 + 0x40 * at;
        guest.put(address, &operand.0[..0x1000]);
        native::execute(kind, &mut cpu, &mut operand, mask);
        let code = [XSAVE, XSAVEOPT, XSAVEC, XRSTOR][kind as usize];
        guest.run(&code, PAGE + address, mask.into()).unwrap();

        prop_assert_eq!(guest.read(address, 0x1000), &operand.0[..]);
        let of = |bytes: &[u8]| {
            let area = XsaveArea::from_bytes(bytes.to_vec());
            (area.in_use(), area.get(0..28).unwrap().to_vec(), area.get(32..416).unwrap().to_vec(),
                area.get(576..832).unwrap().to_vec())
        };
        prop_assert_eq!(of(guest.fpu.area.borrow().bytes()), of(&cpu.0));
    }
}

// Catches: components behind one another in standard form's places in an area of compacted form; alignment forgotten.
#[test]
fn the_compacted_form_has_no_gaps() {
    let guest = Guest::new();
    let Some(last) = components().iter().rfind(|one| one.number > 2 && one.offset + one.size <= 4096) else { return };
    guest.fpu.xcr0.set(Some(7 | 1 << last.number));
    let value = vec![0x5a; last.size];
    guest.fpu.area.borrow_mut().put(last.offset, &value);
    guest.fpu.area.borrow_mut().set_in_use(1 << last.number);
    guest.run(&XSAVES, PAGE, 1 << last.number).unwrap();
    assert_eq!(guest.read(576, last.size as u64), value);
    assert_eq!(guest.read(512, 16), [1u64 << last.number, 1 << 63 | 1 << last.number].map(u64::to_le_bytes).concat());
    *guest.fpu.area.borrow_mut() = XsaveArea::initial();
    guest.run(&XRSTORS, PAGE, u64::MAX).unwrap();
    assert_eq!(guest.fpu.area.borrow().get(last.offset..last.offset + last.size).unwrap(), value);
}
