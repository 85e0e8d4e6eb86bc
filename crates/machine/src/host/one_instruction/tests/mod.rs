//! The CPU's own account of single instructions, and that nothing else is touched.

mod limits;

use std::arch::x86_64::*;

use iced_x86::{Decoder, DecoderOptions};

use super::*;

const FLAGS: u64 = 0x8d5;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        // SplitMix64.
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        std::array::from_fn(|_| self.next().to_be_bytes()[0])
    }
}

/// An area with random XMM and YMM registers and empty x87 registers.
fn area(random: &mut Random) -> Vec<u8> {
    let mut area = vec![0; 4096];
    area[..4].copy_from_slice(&[0x7f, 3, 0, 0]);
    area[24..28].copy_from_slice(&0x1f80_u32.to_le_bytes());
    area[160..416].copy_from_slice(&random.bytes::<256>());
    area[576..832].copy_from_slice(&random.bytes::<256>());
    area[XSTATE_BV] = 6;
    area
}

const XSTATE_BV: usize = 512;

fn form(code: &[u8]) -> Option<Form> {
    let instruction = Decoder::new(64, code, DecoderOptions::NONE).decode();
    assert_eq!(instruction.len(), code.len(), "{code:02x?}");
    Form::new(&instruction)
}

/// A machine of registers on which single instructions are executed.
struct Cpu {
    general: [u64; 16],
    flags: u64,
    area: Vec<u8>,
    operand: [u8; OPERAND_BYTES],
}

impl Cpu {
    fn new(random: &mut Random) -> Self {
        let general = std::array::from_fn(|_| random.next());
        Self { general, flags: random.next() & FLAGS, area: area(random), operand: random.bytes() }
    }

    fn run(&mut self, code: &[u8]) -> &mut Self {
        let form = form(code).unwrap_or_else(|| panic!("{code:02x?}"));
        self.execute(&form);
        self
    }

    fn execute(&mut self, form: &Form) {
        let Self { general, flags, area, operand } = self;
        let mut registers = Registers { general: *general, flags: *flags, area, operand: *operand };
        form.execute(&mut registers).unwrap();
        (self.general, self.flags, self.operand) = (registers.general, registers.flags, registers.operand);
    }

    fn xmm(&self, number: usize) -> [u8; 16] {
        self.area[160 + number * 16..][..16].try_into().unwrap()
    }

    fn ymm(&self, number: usize) -> [u8; 32] {
        let high: [u8; 16] = self.area[576 + number * 16..][..16].try_into().unwrap();
        [self.xmm(number), high].concat().try_into().unwrap()
    }

    /// MXCSR's flags.
    fn raised(&self) -> u8 {
        self.area[24] & 0x3f
    }
}

/// The result of a function of `core::arch`, for a feature that the test has asked for, or that every CPU has.
macro_rules! cpus {
    ($call:expr) => {{
        // SAFETY: the CPU has the function's feature; it works on values.
        unsafe { $call }
    }};
}

fn x(bytes: [u8; 16]) -> __m128i {
    // SAFETY: both are 16 bytes, of which every value is valid; so below.
    unsafe { std::mem::transmute(bytes) }
}

fn bytes(vector: __m128i) -> [u8; 16] {
    // SAFETY: as above.
    unsafe { std::mem::transmute(vector) }
}

fn y(bytes: [u8; 32]) -> __m256i {
    // SAFETY: as above.
    unsafe { std::mem::transmute(bytes) }
}

fn wide(vector: __m256i) -> [u8; 32] {
    // SAFETY: as above.
    unsafe { std::mem::transmute(vector) }
}

// Catches: registers exchanged, operands that are not read, results that are lost: by the compiler's own instructions.
#[test]
fn vector_results_are_the_cpus() {
    let mut random = Random(1);
    for _ in 0..200 {
        let mut cpu = Cpu::new(&mut random);
        let (a, b, m) = (cpu.xmm(1), cpu.xmm(2), x(cpu.operand[..16].try_into().unwrap()));
        // paddd xmm1, xmm2; pxor xmm9, [rax]; movq xmm3, rbx; movmskpd ecx, xmm2.
        cpu.run(&[0x66, 0x0f, 0xfe, 0xca]);
        assert_eq!(cpu.xmm(1), bytes(cpus!(_mm_add_epi32(x(a), x(b)))));
        let c = cpu.xmm(9);
        cpu.run(&[0x66, 0x44, 0x0f, 0xef, 0x08]);
        assert_eq!(cpu.xmm(9), bytes(cpus!(_mm_xor_si128(x(c), m))));
        cpu.run(&[0x66, 0x48, 0x0f, 0x6e, 0xdb]);
        assert_eq!(cpu.xmm(3), u128::from(cpu.general[3]).to_le_bytes());
        cpu.run(&[0x66, 0x0f, 0x50, 0xca]);
        assert_eq!(cpu.general[1], u64::from(b[15] >> 7) << 1 | u64::from(b[7] >> 7));
        if is_x86_feature_detected!("ssse3") {
            // pshufb xmm2, [rdx].
            cpu.run(&[0x66, 0x0f, 0x38, 0x00, 0x12]);
            assert_eq!(cpu.xmm(2), bytes(cpus!(_mm_shuffle_epi8(x(b), m))));
        }
        if is_x86_feature_detected!("aes") {
            // aesenc xmm3, [rsp].
            let c = cpu.xmm(3);
            cpu.run(&[0x66, 0x0f, 0x38, 0xdc, 0x1c, 0x24]);
            assert_eq!(cpu.xmm(3), bytes(cpus!(_mm_aesenc_si128(x(c), m))));
        }
        if is_x86_feature_detected!("avx2") {
            // vpaddq ymm4, ymm5, [rcx]; vpermq ymm6, ymm4, 0x1b; vpaddq xmm4, xmm4, xmm4: the upper half becomes 0.
            let (five, operand) = (cpu.ymm(5), cpu.operand);
            cpu.run(&[0xc5, 0xd5, 0xd4, 0x21]);
            let sum = cpus!(_mm256_add_epi64(y(five), y(operand[..32].try_into().unwrap())));
            assert_eq!(cpu.ymm(4), wide(sum));
            cpu.run(&[0xc4, 0xe3, 0xfd, 0x00, 0xf4, 0x1b]);
            assert_eq!(cpu.ymm(6), wide(cpus!(_mm256_permute4x64_epi64::<0x1b>(sum))));
            cpu.run(&[0xc5, 0xd9, 0xd4, 0xe4]);
            assert_eq!(cpu.ymm(4)[16..], [0; 16]);
        }
        if is_x86_feature_detected!("avx512vl") && is_x86_feature_detected!("avx512bw") {
            // vpermi2d ymm4, ymm5, ymm6; kmovq k1, rax; kmovq rcx, k1.
            let (index, five, six) = (cpu.ymm(4), cpu.ymm(5), cpu.ymm(6));
            cpu.run(&[0x62, 0xf2, 0x55, 0x28, 0x76, 0xe6]);
            let source = |lane: usize| if index[4 * lane] & 8 == 0 { five } else { six };
            let lanes = (0..8).flat_map(|lane| source(lane)[usize::from(index[4 * lane] & 7) * 4..][..4].to_vec());
            assert_eq!(cpu.ymm(4).to_vec(), lanes.collect::<Vec<_>>());
            cpu.run(&[0xc4, 0xe1, 0xfb, 0x92, 0xc8]).run(&[0xc4, 0xe1, 0xfb, 0x93, 0xc9]);
            assert_eq!(cpu.general[1], cpu.general[0]);
        }
    }
}

// Catches: a store that does not come back, or more bytes of it than the instruction stores.
#[test]
fn stores_come_back() {
    let mut random = Random(2);
    let mut cpu = Cpu::new(&mut random);
    let before = cpu.operand;
    // movq [rbp + 8], xmm7; movhps [rsi], xmm8.
    cpu.run(&[0x66, 0x0f, 0xd6, 0x7d, 8]);
    assert_eq!((&cpu.operand[..8], &cpu.operand[8..]), (&cpu.xmm(7)[..8], &before[8..]));
    cpu.run(&[0x44, 0x0f, 0x17, 0x06]);
    assert_eq!((&cpu.operand[..8], &cpu.operand[8..]), (&cpu.xmm(8)[8..], &before[8..]));
}

// Catches: an exception that ends the process, or whose flag is lost; the guest's rounding ignored.
#[test]
fn exceptions_are_flags() {
    let mut random = Random(3);
    let mut cpu = Cpu::new(&mut random);
    // All exceptions unmasked, rounding to plus infinity.
    cpu.area[24..28].copy_from_slice(&0x4000_u32.to_le_bytes());
    let double = |value: f64| u64::to_le_bytes(value.to_bits());
    cpu.area[160..168].copy_from_slice(&double(1.0));
    // divsd xmm0, [rax].
    let divide = |cpu: &mut Cpu, by: f64| {
        cpu.operand[..8].copy_from_slice(&double(by));
        cpu.run(&[0xf2, 0x0f, 0x5e, 0x00]);
        (f64::from_bits(u64::from_le_bytes(cpu.xmm(0)[..8].try_into().unwrap())), cpu.raised())
    };
    let third = 1.0_f64 / 3.0;
    cpu.area[24..28].copy_from_slice(&0x4000_u32.to_le_bytes());
    assert_eq!(divide(&mut cpu, 3.0), (f64::from_bits(third.to_bits() + 1), 0x20));
    assert_eq!(divide(&mut cpu, 0.0), (f64::INFINITY, 4));
    assert_eq!(divide(&mut cpu, 1.0), (f64::INFINITY, 0));
    assert_eq!(divide(&mut cpu, f64::INFINITY).1, 1);
}

// Catches: flags that do not come in or out, implicit operands, RSP as an operand, a register that stands for another
// and is not put back. By the compiler's own instructions.
#[test]
fn general_registers_are_the_cpus() {
    let mut random = Random(4);
    for _ in 0..200 {
        let mut cpu = Cpu::new(&mut random);
        let mut expected = cpu.general;
        let [rax, rcx, rdx, rbx, rsp, ..] = cpu.general;
        let memory = u64::from_le_bytes(cpu.operand[..8].try_into().unwrap());
        let mut is = |cpu: &mut Cpu, code: &[u8], register: usize, value: u64| {
            expected[register] = value;
            assert_eq!(cpu.run(code).general, expected, "{code:02x?}");
        };
        if is_x86_feature_detected!("popcnt") {
            // popcnt rsi, rsp; popcnt r8, [rax + rcx].
            is(&mut cpu, &[0xf3, 0x48, 0x0f, 0xb8, 0xf4], 6, rsp.count_ones().into());
            is(&mut cpu, &[0xf3, 0x4c, 0x0f, 0xb8, 0x04, 0x08], 8, memory.count_ones().into());
            assert_eq!(cpu.flags, if memory == 0 { 0x40 } else { 0 });
        }
        if is_x86_feature_detected!("bmi2") && is_x86_feature_detected!("bmi1") {
            // pext rsp, rbx, rcx; pdep rdi, rbx, [rsp]; andn r9, rax, rbx; bzhi r10, rbx, rcx.
            is(&mut cpu, &[0xc4, 0xe2, 0xe2, 0xf5, 0xe1], 4, cpus!(_pext_u64(rbx, rcx)));
            is(&mut cpu, &[0xc4, 0xe2, 0xe3, 0xf5, 0x3c, 0x24], 7, cpus!(_pdep_u64(rbx, memory)));
            is(&mut cpu, &[0xc4, 0x62, 0xf8, 0xf2, 0xcb], 9, cpus!(_andn_u64(rax, rbx)));
            is(&mut cpu, &[0xc4, 0x62, 0xf0, 0xf5, 0xd3], 10, cpus!(_bzhi_u64(rbx, rcx.to_le_bytes()[0].into())));
            // mulx r11, r11, [rax]: the high half of RDX times it.
            let high = u64::try_from((u128::from(rdx) * u128::from(memory)) >> 64).unwrap();
            is(&mut cpu, &[0xc4, 0x62, 0xa3, 0xf6, 0x18], 11, high);
        }
        if is_x86_feature_detected!("adx") {
            // adcx r12, [rax].
            let carry = cpu.flags & 1;
            let sum = u128::from(cpu.general[12]) + u128::from(memory) + u128::from(carry);
            let flags = cpu.flags & !1 | u64::from(sum >> 64 != 0);
            is(&mut cpu, &[0x66, 0x4c, 0x0f, 0x38, 0xf6, 0x20], 12, cpu_sum(sum));
            assert_eq!(cpu.flags, flags);
        }
        if is_x86_feature_detected!("movbe") {
            // movbe r13, [rbx]; movbe [rbx], rcx.
            is(&mut cpu, &[0x4c, 0x0f, 0x38, 0xf0, 0x2b], 13, memory.swap_bytes());
            cpu.run(&[0x48, 0x0f, 0x38, 0xf1, 0x0b]);
            assert_eq!(cpu.operand[..8], rcx.to_be_bytes());
            cpu.operand[..8].copy_from_slice(&memory.to_le_bytes());
        }
        if is_x86_feature_detected!("sse4.2") {
            // crc32 eax, byte [rdx]; pcmpestri xmm1, xmm2, 0: ECX from EAX, EDX and two registers.
            let crc = cpus!(_mm_crc32_u8(low(rax), memory.to_le_bytes()[0]));
            is(&mut cpu, &[0xf2, 0x0f, 0x38, 0xf0, 0x02], 0, crc.into());
            let index =
                cpus!(_mm_cmpestri::<0>(x(cpu.xmm(1)), crc.cast_signed(), x(cpu.xmm(2)), low(rdx).cast_signed()));
            is(&mut cpu, &[0x66, 0x0f, 0x3a, 0x61, 0xca, 0], 1, index.cast_unsigned().into());
        }
    }
}

/// The lower half.
fn low(value: u64) -> u32 {
    (value & 0xffff_ffff).try_into().unwrap()
}

fn cpu_sum(sum: u128) -> u64 {
    (sum & u128::from(u64::MAX)).try_into().unwrap()
}

// Catches: MMX registers that are not x87's, or are counted from the top of the stack; a host whose x87 stack is left
// full.
#[test]
fn mmx_registers_are_x87s() {
    let mut cpu = Cpu::new(&mut Random(5));
    // Control word, status with its top at 5, all unmasked.
    cpu.area[..4].copy_from_slice(&[0x40, 3, 0, 0x28]);
    // movd ecx, mm5: the register at the top.
    cpu.area[32..36].copy_from_slice(&[1, 2, 3, 4]);
    cpu.area[XSTATE_BV] = 7;
    cpu.run(&[0x0f, 0x7e, 0xe9]);
    assert_eq!(cpu.general[1], 0x0403_0201);
    // movq mm2, [rax]; paddb mm2, mm2; movd ecx, mm2.
    cpu.run(&[0x0f, 0x6f, 0x10]).run(&[0x0f, 0xfc, 0xd2]).run(&[0x0f, 0x7e, 0xd1]);
    let double: Vec<u8> = cpu.operand[..4].iter().map(|byte| byte.wrapping_mul(2)).collect();
    assert_eq!(cpu.general[1].to_le_bytes()[..4], double);
    assert_eq!((&cpu.area[..4], cpu.area[4], cpu.area[XSTATE_BV]), (&[0x40, 3, 0, 0][..], 0xff, 7));
    // emms.
    cpu.run(&[0x0f, 0x77]);
    assert_eq!(cpu.area[4], 0);
}
