//! Instructions that the host's CPU executes: what the guest sees of their operands, and of what forbids them.

use super::*;
use crate::kvm::state::{AVX_BIT, SSE_BIT};

const PAGE: u64 = 0x40_0000;
const RAM: [u64; 2] = [0x4000, 0x8000];

/// In 64-bit mode with SSE and AVX enabled, and two pages at [`PAGE`] that may be written.
struct Guest {
    memory: GuestRam,
    fpu: Fpu,
    system: SystemRegisters,
    registers: GeneralRegisters,
}

impl Guest {
    fn new() -> Self {
        let memory = memory();
        map(&memory, PAGE, RAM[0] | 3);
        map(&memory, PAGE + 0x1000, RAM[1] | 3);
        let system = SystemRegisters { cr4: 0x4_0620, ..long_mode() };
        let guest = Self { memory, fpu: Fpu::new(Some(7), 0), system, registers: Default::default() };
        guest.set_xmm(0, 0x1111_2222_3333_4444);
        guest.set_xmm(1, 5);
        guest
    }

    /// Performs `code` with RSI = `rsi`.
    fn run(&mut self, code: &[u8], rsi: u64) -> Result<(), Stop> {
        self.registers.rsi = rsi;
        let mut state = state(&self.memory, &self.system, self.registers);
        perform(&mut state, &decode(code, bits(&self.system)), code, &self.fpu)?;
        self.registers = state.registers;
        Ok(())
    }

    fn set_xmm(&self, number: usize, value: u128) {
        let mut area = self.fpu.area.borrow_mut();
        area.put(160 + 16 * number, &value.to_le_bytes());
        let in_use = area.in_use();
        area.set_in_use(in_use | SSE_BIT);
    }

    fn xmm(&self, number: usize) -> u128 {
        let at = 160 + 16 * number;
        u128::from_le_bytes(self.fpu.area.borrow().get(at..at + 16).unwrap().try_into().unwrap())
    }

    fn set_mxcsr(&self, mxcsr: u32) {
        self.fpu.area.borrow_mut().set_mxcsr(mxcsr);
    }

    fn mxcsr(&self) -> u32 {
        self.fpu.area.borrow().mxcsr()
    }
}

/// Of XMM0 and [RSI], but where it is said otherwise.
const PADDQ: [u8; 4] = [0x66, 0x0f, 0xd4, 0x06];
const MOVQ_STORE: [u8; 4] = [0x66, 0x0f, 0xd6, 0x06];
const LDMXCSR: [u8; 3] = [0x0f, 0xae, 0x16];
const STMXCSR: [u8; 3] = [0x0f, 0xae, 0x1e];
/// XMM0 divided by XMM1.
const DIVSD: [u8; 4] = [0xf2, 0x0f, 0x5e, 0xc1];
/// MOVQ RSP, XMM0, and the other way.
const MOVQ_FROM: [u8; 5] = [0x66, 0x48, 0x0f, 0x7e, 0xc4];
const MOVQ_TO: [u8; 5] = [0x66, 0x48, 0x0f, 0x6e, 0xc4];
/// Of MM0, MM0.
const PADDB: [u8; 3] = [0x0f, 0xfc, 0xc0];
/// Of XMM0, XMM0, [RSI].
const VPADDQ: [u8; 4] = [0xc5, 0xf9, 0xd4, 0x06];

// Catches: an operand across a page border of which one part is taken from elsewhere; a part that is stored although
// the other faults; a fault with another code or address.
#[test]
fn operands_may_be_in_two_pages() {
    let mut guest = Guest::new();
    guest.run(&MOVQ_STORE, PAGE + 0xffb).unwrap();
    let first: [u8; 5] = guest.memory.read_obj(GuestAddress(RAM[0] + 0xffb)).unwrap();
    let second: [u8; 3] = guest.memory.read_obj(GuestAddress(RAM[1])).unwrap();
    assert_eq!([&first[..], &second].concat(), 0x1111_2222_3333_4444_u64.to_le_bytes());
    // movlps xmm1, [rsi].
    guest.run(&[0x0f, 0x12, 0x0e], PAGE + 0xffb).unwrap();
    assert_eq!(guest.xmm(1), 0x1111_2222_3333_4444);
    guest.set_xmm(0, 0);
    map(&guest.memory, PAGE + 0x1000, RAM[1] | 1);
    assert_eq!(fault(guest.run(&MOVQ_STORE, PAGE + 0xffb)), Exception::page_fault(3, PAGE + 0x1000));
    map(&guest.memory, PAGE + 0x1000, 0);
    assert_eq!(fault(guest.run(&MOVQ_STORE, PAGE + 0xffb)), Exception::page_fault(2, PAGE + 0x1000));
    assert_eq!(guest.memory.read_obj::<[u8; 5]>(GuestAddress(RAM[0] + 0xffb)).unwrap(), first);
    assert_eq!(fault(guest.run(&[0x0f, 0x12, 0x0e], PAGE + 0xffb)), Exception::page_fault(0, PAGE + 0x1000));
    assert_eq!(fault(guest.run(&PADDQ, 1 << 60)), Exception::GENERAL_PROTECTION);
}

// Catches: 16 bytes that need not be aligned, or need it although they do not.
#[test]
fn sse_is_aligned_and_avx_is_not() {
    let mut guest = Guest::new();
    put(&guest.memory, RAM[0] + 8, 6_u64);
    assert_eq!(fault(guest.run(&PADDQ, PAGE + 8)), Exception::GENERAL_PROTECTION);
    guest.run(&PADDQ, PAGE).unwrap();
    assert_eq!(guest.xmm(0) >> 64, 6);
    // cvtsd2si eax, [rsi]: 8 bytes.
    guest.run(&[0xf2, 0x0f, 0x2d, 0x06], PAGE + 3).unwrap();
    guest.set_mxcsr(0x2_1f80);
    not_covered(guest.run(&PADDQ, PAGE + 8));
    if is_x86_feature_detected!("avx") {
        guest.run(&VPADDQ, PAGE + 8).unwrap();
        assert_eq!(guest.xmm(0) & 0xff, 0x4a);
        // vmovaps xmm0, [rsi].
        guest.set_mxcsr(0x1f80);
        assert_eq!(fault(guest.run(&[0xc5, 0xf8, 0x28, 0x06], PAGE + 8)), Exception::GENERAL_PROTECTION);
    }
}

// Catches: registers that the kernel has not enabled, or has switched off, used nevertheless.
#[test]
fn what_is_not_enabled() {
    let (cr0, cr4) = (long_mode().cr0, 0x4_0620);
    let with = |cr0, cr4, xcr0, code: &[u8]| {
        let mut guest = Guest { fpu: Fpu::new(Some(xcr0), 0), ..Guest::new() };
        guest.system = SystemRegisters { cr0, cr4, ..guest.system };
        guest.run(code, PAGE)
    };
    let (ud, nm) = (Exception::INVALID_OPCODE, Exception::DEVICE_NOT_AVAILABLE);
    for code in [&PADDQ[..], &LDMXCSR, &STMXCSR, &MOVQ_STORE] {
        assert_eq!(fault(with(cr0, cr4 & !0x200, 7, code)), ud, "{code:02x?}: OSFXSR");
        assert_eq!(fault(with(cr0 | 0xc, cr4, 7, code)), ud, "{code:02x?}: EM");
        assert_eq!(fault(with(cr0 | 8, cr4, 7, code)), nm, "{code:02x?}: TS");
        with(cr0, cr4 & !0x4_0000, 1, code).unwrap();
    }
    assert_eq!(fault(with(cr0 | 4, cr4, 7, &PADDB)), ud);
    assert_eq!(fault(with(cr0 | 8, cr4, 7, &PADDB)), nm);
    with(cr0, cr4 & !0x200, 7, &PADDB).unwrap();
    if is_x86_feature_detected!("avx") {
        assert_eq!(fault(with(cr0, cr4 & !0x4_0000, 7, &VPADDQ)), ud);
        assert_eq!(fault(with(cr0, cr4, 3, &VPADDQ)), ud);
        assert_eq!(fault(with(cr0 | 8, cr4, 7, &VPADDQ)), nm);
        with(cr0 | 4, cr4 & !0x200, 7, &VPADDQ).unwrap();
    }
    if is_x86_feature_detected!("popcnt") {
        // General registers only.
        with(cr0 | 0xc, 0x20, 1, &[0xf3, 0x0f, 0xb8, 0xc3]).unwrap();
    }
    // An x87 exception that waits.
    let mut guest = Guest { fpu: Fpu::new(Some(7), 0x80), ..Guest::new() };
    not_covered(guest.run(&PADDB, PAGE));
    guest.system.cr0 |= 0x20;
    assert_eq!(fault(guest.run(&PADDB, PAGE)), Exception::X87);
    guest.run(&PADDQ, PAGE).unwrap();
}

// Catches: MXCSR that is not stored or loaded, a reserved bit accepted.
#[test]
fn mxcsr_is_loaded_and_stored() {
    let mut guest = Guest::new();
    put(&guest.memory, RAM[0], 0x5fa1_u32);
    guest.run(&LDMXCSR, PAGE).unwrap();
    assert_eq!(guest.mxcsr(), 0x5fa1);
    guest.run(&STMXCSR, PAGE + 0xffe).unwrap();
    assert_eq!(guest.memory.read_obj::<u16>(GuestAddress(RAM[0] + 0xffe)).unwrap(), 0x5fa1);
    put(&guest.memory, RAM[0], 0x8000_1f80_u32);
    assert_eq!(fault(guest.run(&LDMXCSR, PAGE)), Exception::GENERAL_PROTECTION);
    assert_eq!((guest.mxcsr(), fault(guest.run(&STMXCSR, 0))), (0x5fa1, Exception::page_fault(2, 0)));
}

// Catches: an exception that the guest does not mask and does not get; a result or a flag in spite of it; flags of
// masked ones that are lost or forgotten.
#[test]
fn exceptions_that_are_not_masked() {
    let mut guest = Guest::new();
    let one = u128::from(1.0_f64.to_bits());
    let divide = |guest: &mut Guest, by: f64, mxcsr| {
        guest.set_xmm(0, one);
        guest.set_xmm(1, by.to_bits().into());
        guest.set_mxcsr(mxcsr);
        let raised = guest.run(&DIVSD, 0).is_err().then(|| fault(guest.run(&DIVSD, 0)));
        (raised, guest.xmm(0) != one, guest.mxcsr())
    };
    // Masked: precision after invalid, which stays.
    assert_eq!(divide(&mut guest, 3.0, 0x1f81), (None, true, 0x1fa1));
    assert_eq!(divide(&mut guest, 0.0, 0x1f80), (None, true, 0x1f84));
    // Zero divide, and precision, not masked.
    assert_eq!(divide(&mut guest, 0.0, 0x1d80), (Some(Exception::SIMD), false, 0x1d84));
    assert_eq!(divide(&mut guest, 3.0, 0x1d80), (None, true, 0x1da0));
    assert_eq!(divide(&mut guest, 3.0, 0x0f80), (Some(Exception::SIMD), false, 0x0fa0));
    // A flag that was set before raises nothing.
    assert_eq!(divide(&mut guest, 1.0, 0x0fa0), (None, false, 0x0fa0));
    guest.system.cr4 &= !0x400;
    assert_eq!(divide(&mut guest, 0.0, 0x1d80).0, Some(Exception::INVALID_OPCODE));
    // Without the masks of overflow or underflow.
    for mxcsr in [0x1b80, 0x1780] {
        guest.set_mxcsr(mxcsr);
        not_covered(guest.run(&DIVSD, 0));
    }
}

// Catches: RSP of the VMM in place of the guest's; a register of the guest's overwritten by one that stands for it.
#[test]
fn rsp_is_the_guests() {
    let mut guest = Guest::new();
    let before = GeneralRegisters { rsp: 0x7777, r8: 8, r9: 9, rbx: 3, rflags: 0x246, ..Default::default() };
    guest.registers = before;
    guest.run(&MOVQ_FROM, 0).unwrap();
    assert_eq!(guest.registers, GeneralRegisters { rsp: 0x1111_2222_3333_4444, ..before });
    guest.registers.rsp = PAGE + 0x10;
    guest.run(&MOVQ_TO, 0).unwrap();
    assert_eq!(guest.xmm(0), u128::from(PAGE + 0x10));
    put(&guest.memory, RAM[0] + 0x18, 5_u64);
    // paddq xmm0, [rsp]; movq rax, xmm1.
    guest.run(&[0x66, 0x0f, 0xd4, 0x04, 0x24], 0).unwrap();
    assert_eq!(guest.xmm(0), 5 << 64 | u128::from(PAGE + 0x10));
    guest.run(&[0x66, 0x48, 0x0f, 0x7e, 0xc8], 0).unwrap();
    assert_eq!(guest.registers, GeneralRegisters { rsp: PAGE + 0x10, rax: 5, ..before });
}

// Catches: upper halves that SSE clears, or that AVX leaves; AVX registers marked as unused, which KVM would clear.
#[test]
fn upper_halves() {
    if !is_x86_feature_detected!("avx") {
        return;
    }
    let mut guest = Guest::new();
    let upper = |guest: &Guest| {
        let area = guest.fpu.area.borrow();
        (area.get(576..592).unwrap().to_vec(), area.in_use() & AVX_BIT != 0)
    };
    {
        let mut area = guest.fpu.area.borrow_mut();
        area.put(576, &[9; 32]);
        area.set_in_use(7);
    }
    guest.run(&PADDQ, PAGE).unwrap();
    assert_eq!(upper(&guest), (vec![9; 16], true));
    guest.run(&VPADDQ, PAGE).unwrap();
    assert_eq!(upper(&guest), (vec![0; 16], true));
    assert_eq!(guest.xmm(0), 0x1111_2222_3333_4444);
}

// Catches: addresses of 32-bit code, its segments, and its registers.
#[test]
fn code_of_32_bits() {
    let mut guest = Guest::new();
    let mut system = SystemRegisters { cr4: 0x600, ..protected_mode() };
    system.fs.base = 0x4000;
    guest.system = system;
    put(&guest.memory, 0x4010, 7_u64);
    // paddq xmm0, fs:[esi]; movd eax, xmm0.
    guest.run(&[0x64, 0x66, 0x0f, 0xd4, 0x06], 0x10).unwrap();
    guest.run(&[0x66, 0x0f, 0x7e, 0xc0], 0).unwrap();
    assert_eq!(guest.registers.rax, 0x3333_444b);
    system.ds.limit = 0xfff;
    guest.system = system;
    assert_eq!(fault(guest.run(&PADDQ, 0x1000)), Exception::GENERAL_PROTECTION);
}
