//! Executes one x87 instruction on the host's CPU, on registers that are passed to it.
//!
//! No code is made for that: the program has every instruction once, with a RET behind it. A memory operand is always
//! the buffer at RAX. Instructions that store or load pointers of the last instruction are not among them, nor are
//! those that change the control word.
//!
//! It cannot fault: all exceptions are masked and none waits, the buffer is large enough for every operand, and
//! encodings that are no instruction are refused.

use std::arch::{asm, global_asm};

/// The x87 registers as FXSAVE stores them, as far as instructions here change them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct X87 {
    /// Control word. All exceptions must be masked.
    pub fcw: u16,
    /// Status word.
    pub fsw: u16,
    /// FXSAVE's tags: a bit for each register that is not empty.
    pub tags: u8,
    /// ST0 to ST7, of 10 bytes each; the rest is reserved.
    pub st: [[u8; 16]; 8],
}

/// The exceptions that the control word can mask, and the status word report.
pub const EXCEPTIONS: u16 = 0x3f;
/// The status word's summary: an unmasked exception waits.
pub const SUMMARY: u16 = 1 << 7;

/// The largest operand: an 80-bit number.
pub const OPERAND_BYTES: usize = 10;

/// CF, PF, AF, ZF, SF, OF.
const ARITHMETIC: u64 = 0x8d5;

// For each of the eight opcodes: the eight instructions with an operand at RAX, then the 64 without one. Each takes
// four bytes.
global_asm!(
    ".pushsection .text.vmm_x87,\"ax\",@progbits",
    ".balign 4",
    "vmm_x87_instructions:",
    ".set vmm_x87_opcode, 0xd8",
    ".rept 8",
    ".set vmm_x87_modrm, 0",
    ".rept 8",
    ".byte vmm_x87_opcode, vmm_x87_modrm, 0xc3, 0xcc",
    ".set vmm_x87_modrm, vmm_x87_modrm + 8",
    ".endr",
    ".set vmm_x87_modrm, 0xc0",
    ".rept 64",
    ".byte vmm_x87_opcode, vmm_x87_modrm, 0xc3, 0xcc",
    ".set vmm_x87_modrm, vmm_x87_modrm + 1",
    ".endr",
    ".set vmm_x87_opcode, vmm_x87_opcode + 1",
    ".endr",
    ".popsection",
);

/// An FXSAVE image.
#[repr(C, align(16))]
struct Image([u8; 512]);

/// Whether [`execute`] has this instruction, by its opcode and ModRM bytes (SDM vol. 2, "x87 Opcode Tables").
#[must_use]
pub fn has(opcode: u8, modrm: u8) -> bool {
    if modrm < 0xc0 {
        let operation = modrm >> 3 & 7;
        return match opcode {
            0xd8 | 0xda | 0xdc | 0xde | 0xdf => true,
            0xd9 => matches!(operation, 0 | 2 | 3),
            0xdb => matches!(operation, 0..=3 | 5 | 7),
            0xdd => matches!(operation, 0..=3),
            _ => false,
        };
    }
    match opcode {
        0xd8 => true,
        0xd9 => matches!(modrm, 0xc0..=0xd0 | 0xe0 | 0xe1 | 0xe4 | 0xe5 | 0xe8..=0xee | 0xf0..=0xff),
        0xda => matches!(modrm, 0xc0..=0xdf | 0xe9),
        0xdb => matches!(modrm, 0xc0..=0xdf | 0xe8..=0xf7),
        0xdc => matches!(modrm, 0xc0..=0xcf | 0xe0..=0xff),
        0xdd => matches!(modrm, 0xc0..=0xc7 | 0xd0..=0xef),
        0xde => matches!(modrm, 0xc0..=0xcf | 0xd9 | 0xe0..=0xff),
        0xdf => matches!(modrm, 0xe8..=0xf7),
        _ => false,
    }
}

/// Executes the instruction with these opcode and ModRM bytes on `registers`, `operand` and the arithmetic flags in
/// `flags`. Returns the arithmetic flags after it; none if [`has`] is false, an exception is not masked or one waits.
pub fn execute(
    registers: &mut X87,
    opcode: u8,
    modrm: u8,
    operand: &mut [u8; OPERAND_BYTES],
    flags: u64,
) -> Option<u64> {
    if !has(opcode, modrm) || registers.fcw & EXCEPTIONS != EXCEPTIONS || registers.fsw & SUMMARY != 0 {
        return None;
    }
    let number = if modrm < 0xc0 { usize::from(modrm >> 3 & 7) } else { 8 + usize::from(modrm & 0x3f) };
    let offset = (usize::from(opcode & 7) * 72 + number) * 4;
    let mut guest = to_image(registers);
    let mut host = Image([0; 512]);
    let mut flags = flags & ARITHMETIC | 2;
    // SAFETY: the address is that of an instruction in the table above, which ends with RET. It changes x87 registers,
    // RFLAGS and up to ten bytes at RAX, which are `operand`. It cannot fault, as this function has checked. FXSAVE and
    // FXRSTOR get aligned images of 512 bytes; that of the guest has a valid MXCSR. The last restores every register
    // that the first has saved, so that the compiler finds all x87, MMX and XMM registers unchanged. The stack is used.
    unsafe {
        asm!(
            "lea {at}, [rip + vmm_x87_instructions]",
            "add {at}, {offset}",
            "fxsave64 [{host}]",
            "fxrstor64 [{guest}]",
            "push {flags}",
            "popfq",
            "call {at}",
            "pushfq",
            "pop {flags}",
            "fxsave64 [{guest}]",
            "fxrstor64 [{host}]",
            at = out(reg) _,
            offset = in(reg) offset,
            host = in(reg) &raw mut host.0,
            guest = in(reg) &raw mut guest.0,
            flags = inout(reg) flags,
            inout("rax") operand.as_mut_ptr() => _,
        );
    }
    *registers = from_image(&guest);
    Some(flags & ARITHMETIC)
}

fn to_image(registers: &X87) -> Image {
    let X87 { fcw, fsw, tags, st } = registers;
    let mut image = Image([0; 512]);
    let mut put = |at: usize, bytes: &[u8]| {
        for (to, from) in image.0.iter_mut().skip(at).zip(bytes) {
            *to = *from;
        }
    };
    put(0, &fcw.to_le_bytes());
    put(2, &fsw.to_le_bytes());
    put(4, &[*tags]);
    // MXCSR: all exceptions masked.
    put(24, &0x1f80_u32.to_le_bytes());
    put(32, st.as_flattened());
    image
}

fn from_image(image: &Image) -> X87 {
    let Image(bytes) = image;
    let [fcw_low, fcw_high, fsw_low, fsw_high, tags, ..] = *bytes;
    let mut st = [[0; 16]; 8];
    for (to, from) in st.as_flattened_mut().iter_mut().zip(bytes.iter().skip(32)) {
        *to = *from;
    }
    X87 { fcw: u16::from_le_bytes([fcw_low, fcw_high]), fsw: u16::from_le_bytes([fsw_low, fsw_high]), tags, st }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EMPTY: X87 = X87 { fcw: 0x37f, fsw: 0, tags: 0, st: [[0; 16]; 8] };

    fn run(registers: &mut X87, code: [u8; 2], operand: &mut [u8; 10]) -> u64 {
        execute(registers, code[0], code[1], operand, 0).unwrap()
    }

    fn double(value: f64) -> [u8; 10] {
        let mut operand = [0; 10];
        operand[..8].copy_from_slice(&value.to_le_bytes());
        operand
    }

    // Catches: an instruction beside the right one in the table, an operand that is not read or written, registers that
    // are not kept. The CPU's own arithmetic is the account: of 64-bit numbers whose results are exact.
    #[test]
    fn arithmetic_is_the_cpus() {
        for (a, b) in [(1.5, 2.0), (-7.25, 0.5), (1e10, 3.0)] {
            // FADD, FMUL, FSUB, FSUBR, FDIV, FDIVR of a number in memory.
            let results = [a + b, a * b, a - b, b - a, a / b, b / a];
            for (modrm, expected) in [0, 1, 4, 5, 6, 7].into_iter().map(|number: u8| number << 3).zip(results) {
                let (mut registers, mut operand) = (EMPTY, double(a));
                run(&mut registers, [0xdd, 0], &mut operand);
                assert_eq!(registers.tags, 0x80);
                let mut operand = double(b);
                run(&mut registers, [0xdc, modrm], &mut operand);
                assert_eq!(operand, double(b));
                // FSTP.
                run(&mut registers, [0xdd, 3 << 3], &mut operand);
                assert_eq!((operand, registers.tags), (double(expected), 0), "{modrm:#x} {a} {b}");
            }
        }
    }

    // Catches: flags that do not come in (FCMOVE) or out (FCOMI).
    #[test]
    fn flags_go_in_and_out() {
        let mut registers = EMPTY;
        // FLDZ; FLD1; FCOMI ST1; FCMOVE ST1 without and with ZF.
        for code in [[0xd9, 0xee], [0xd9, 0xe8]] {
            run(&mut registers, code, &mut [0; 10]);
        }
        let one = registers.st[0];
        assert_eq!(execute(&mut registers, 0xdb, 0xf1, &mut [0; 10], 0x8d5), Some(0));
        execute(&mut registers, 0xda, 0xc9, &mut [0; 10], 0).unwrap();
        assert_eq!(registers.st[0], one);
        execute(&mut registers, 0xda, 0xc9, &mut [0; 10], 0x40).unwrap();
        assert_eq!(registers.st[0], [0; 16]);
    }

    // Catches: a masked exception that is lost, or one that ends the process.
    #[test]
    fn exceptions_are_reported_and_do_not_trap() {
        let (mut registers, mut operand) = (EMPTY, [0; 10]);
        // FLD1; FDIV by zero in memory: zero divide. FSTP twice: the stack is empty, invalid operation.
        run(&mut registers, [0xd9, 0xe8], &mut operand);
        run(&mut registers, [0xdc, 6 << 3], &mut operand);
        assert_eq!(registers.fsw & 0x7f, 4);
        run(&mut registers, [0xdd, 3 << 3], &mut operand);
        run(&mut registers, [0xdd, 3 << 3], &mut operand);
        assert_eq!(registers.fsw & 0x7f, 0x45);
        for refused in [X87 { fcw: 0x37b, ..EMPTY }, X87 { fsw: SUMMARY, ..EMPTY }] {
            assert_eq!(execute(&mut { refused }, 0xd9, 0xe8, &mut operand, 0), None);
        }
    }

    // Catches: an instruction that faults or writes elsewhere: each is executed, on random registers, beside guards.
    // The host's own registers must survive it.
    #[test]
    fn every_instruction_leaves_the_program_as_it_was() {
        let mut random = 0x9e37_79b9_7f4a_7c15_u64;
        let mut byte = || {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            random.to_be_bytes()[0]
        };
        let mut executed = 0;
        for _ in 0..20 {
            for (opcode, modrm) in (0xd8..=0xdf).flat_map(|opcode| (0..=0xff).map(move |modrm| (opcode, modrm))) {
                let mut registers = X87 { fsw: u16::from(byte()) << 8 & 0x7f00, tags: byte(), ..EMPTY };
                for byte_of in registers.st.iter_mut().flat_map(|st| st.iter_mut().take(10)) {
                    *byte_of = byte();
                }
                let mut guarded = [[0x5a; 10], [byte(); 10], [0x5a; 10]];
                let sum = std::hint::black_box(0.1_f64) + f64::from(opcode);
                let done = execute(&mut registers, opcode, modrm, &mut guarded[1], byte().into()).is_some();
                assert_eq!((done, registers.fcw), (has(opcode, modrm), 0x37f), "{opcode:#x} {modrm:#x}");
                assert_eq!((guarded[0], guarded[2]), ([0x5a; 10], [0x5a; 10]), "{opcode:#x} {modrm:#x}");
                assert_eq!(sum, std::hint::black_box(0.1_f64) + f64::from(opcode));
                executed += u32::from(done);
            }
        }
        assert!(executed > 20 * 500);
    }
}
