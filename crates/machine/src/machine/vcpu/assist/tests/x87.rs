//! x87 instructions on the guest's registers and memory.

use super::*;

/// In 32-bit mode, with RAM at 0x1000 for an operand.
struct Guest {
    memory: GuestRam,
    fpu: Fpu,
    registers: GeneralRegisters,
    cr0: u64,
}

impl Guest {
    fn new() -> Self {
        let registers = GeneralRegisters { rbx: 0x1000, rflags: 2, ..Default::default() };
        Self { memory: memory(), fpu: Fpu::new(None, 0), registers, cr0: 0x21 }
    }

    fn run(&mut self, code: &[u8]) -> Result<(), Stop> {
        let system = SystemRegisters { cr0: self.cr0, ..protected_mode() };
        let mut state = state(&self.memory, &system, self.registers);
        let raised = perform(&mut state, &decode(code, 32), code, &self.fpu)?;
        assert_eq!(raised, None);
        self.registers = state.registers;
        Ok(())
    }

    fn word(&self) -> u16 {
        self.memory.read_obj(GuestAddress(0x1000)).unwrap()
    }
}

const FLD1: [u8; 2] = [0xd9, 0xe8];
const FNINIT: [u8; 2] = [0xdb, 0xe3];
const FNCLEX: [u8; 2] = [0xdb, 0xe2];
const FNSTSW_AX: [u8; 2] = [0xdf, 0xe0];
const FNSTCW: [u8; 2] = [0xd9, 0x3b];
const FLDCW: [u8; 2] = [0xd9, 0x2b];

// Catches: a number that is stored elsewhere or with another size, a stack that does not move, a value from another
// place.
#[test]
fn numbers_go_from_memory_to_memory() {
    let mut guest = Guest::new();
    put(&guest.memory, 0x1000, 2.5_f64.to_bits());
    // fld qword [ebx]; fadd st0; fstp qword [ebx + 8].
    for code in [&[0xdd, 0x03][..], &[0xd8, 0xc0], &[0xdd, 0x5b, 8]] {
        guest.run(code).unwrap();
    }
    assert_eq!(guest.memory.read_obj::<u64>(GuestAddress(0x1008)).unwrap(), 5.0_f64.to_bits());
    assert_eq!((guest.fpu.x87().tags, guest.fpu.x87().fsw & 0x3800), (0, 0));
    // fild word [ebx]; fistp dword [ebx + 8]: 7, and the bytes behind are left alone.
    put(&guest.memory, 0x1000, 7_u16);
    put(&guest.memory, 0x1008, u64::MAX);
    guest.run(&[0xdf, 0x03]).unwrap();
    guest.run(&[0xdb, 0x5b, 8]).unwrap();
    assert_eq!(guest.memory.read_obj::<u64>(GuestAddress(0x1008)).unwrap(), 0xffff_ffff_0000_0007);
}

// Catches: control and status words in one another's place; exceptions that FNCLEX keeps, or a summary that FLDCW
// forgets.
#[test]
fn control_and_status_words() {
    let mut guest = Guest::new();
    guest.run(&FLD1).unwrap();
    guest.run(&FNSTSW_AX).unwrap();
    assert_eq!(guest.registers.rax, 0x3800);
    guest.run(&FNSTCW).unwrap();
    assert_eq!(guest.word(), 0x37f);
    // fdiv st0, st1, which is empty: invalid operation.
    guest.run(&[0xd8, 0xf1]).unwrap();
    put(&guest.memory, 0x1000, 0x37e_u16);
    guest.run(&FLDCW).unwrap();
    let waiting = guest.fpu.x87();
    assert_eq!((waiting.fcw, waiting.fsw & 0x80c1), (0x37e, 0x80c1));
    assert_eq!(fault(guest.run(&FLD1)), Exception::X87);
    guest.cr0 = 1;
    not_covered(guest.run(&FLD1));
    guest.run(&FNCLEX).unwrap();
    assert_eq!(guest.fpu.x87().fsw & 0x80ff, 0);
    // An exception is not masked: not on this CPU.
    not_covered(guest.run(&FLD1));
    guest.run(&FNINIT).unwrap();
    let fresh = guest.fpu.x87();
    assert_eq!((fresh.fcw, fresh.fsw, fresh.tags), (0x37f, 0, 0));
    guest.run(&FLD1).unwrap();
}

// Catches: an FPU that is used although the kernel has switched it off.
#[test]
fn a_switched_off_fpu_is_not_available() {
    for cr0 in [0x25, 0x29] {
        let mut guest = Guest { cr0, ..Guest::new() };
        for code in [FLD1, FNINIT, FNSTSW_AX] {
            assert_eq!(fault(guest.run(&code)), Exception::DEVICE_NOT_AVAILABLE);
        }
    }
}

// Catches: an operand taken for an x87 opcode; instructions that would tell the VMM's own addresses.
#[test]
fn others_are_not_covered() {
    let mut guest = Guest::new();
    // fnstenv, fldenv, fnsave, frstor [ebx].
    for code in [[0xd9, 0x33], [0xd9, 0x23], [0xdd, 0x33], [0xdd, 0x23]] {
        not_covered(guest.run(&code));
    }
    // mov eax, 0xd8c0: bytes of an operand.
    not_covered(guest.run(&[0xb8, 0xc0, 0xd8, 0, 0]));
}
