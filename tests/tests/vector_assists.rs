//! SSE and AVX instructions that some hosts' KVM cannot emulate in supervisor code. User code runs on the CPU
//! everywhere: the guest compares its results with the supervisor's.

use vm_tests::{
    long_mode::{
        ABSENT, Body,
        Register::{Rax, Rbx, Rcx, Rdx, Rsi},
        USER_CODE, WRITABLE,
    },
    performed::{MODES, cpu_has, passes, vmm_performs},
    require_kvm, skip_part,
};

/// Where user code and the kernel have an operand: on the user's stack, not at a multiple of 32.
const OPERAND: u64 = USER_CODE + 0x1010;
/// Numbers to compute with.
const NUMBERS: [u64; 3] = [0x0123_4567_89ab_cdef, 0x8000_0000_0000_0001, 0x4059_0000_0000_0000];

/// Enables SSE, and AVX if that is wanted.
fn enable(body: &mut Body, avx: bool) {
    let [a, b, c, d] = if avx { 0x4_0600_u32 } else { 0x600 }.to_le_bytes();
    // mov rax, cr4; or eax, OSFXSR | OSXMMEXCPT; mov cr4, rax.
    body.code(&[0x0f, 0x20, 0xe0, 0x0d, a, b, c, d, 0x0f, 0x22, 0xe0]);
    if avx {
        // xsetbv.
        body.set(Rax, 7).set(Rcx, 0).set(Rdx, 0).code(&[0x0f, 0x01, 0xd1]);
    }
}

/// The guest's user code computes RAX by `code` of RBX and the 32 bytes at RSI, then the kernel does, and compares.
fn both_compute(body: &mut Body, number: u64, code: &[u8]) {
    let user = [
        &[0x48, 0xbb][..],
        &number.to_le_bytes(),
        &[0x48, 0xbe],
        &OPERAND.to_le_bytes(),
        code,
        // syscall; jmp to itself.
        &[0x0f, 0x05, 0xeb, 0xfe],
    ];
    body.enter_user(0, &user.concat());
    // mov rdi, rax: the user's. xor rax, rdi.
    body.code(&[0x48, 0x89, 0xc7]).set(Rbx, number).set(Rsi, OPERAND).code(code);
    body.code(&[0x48, 0x31, 0xf8]).expect(Rax, 0, &format!("difference of {number:#x}"));
}

/// mov [rsi], rbx; mov [rsi + 8], rsi; mov [rsi + 16], rbx; mov [rsi + 24], rbx.
const FILL: [u8; 15] = [0x48, 0x89, 0x1e, 0x48, 0x89, 0x76, 8, 0x48, 0x89, 0x5e, 16, 0x48, 0x89, 0x5e, 24];

// Catches: registers that do not reach the CPU or come back, MXCSR's rounding or flags lost, an operand in memory read
// or written at the wrong place.
#[test]
fn sse() {
    require_kvm!();
    let mut code = FILL.to_vec();
    let parts: [&[u8]; 18] = [
        // mov dword [rsi + 16], 0x3f80; ldmxcsr [rsi + 16]: rounding down.
        &[0xc7, 0x46, 16, 0x80, 0x3f, 0, 0, 0x0f, 0xae, 0x56, 16],
        // movq xmm0, rbx; pshufd xmm1, xmm0, 0x4e; paddq xmm1, [rsi]; pmuludq xmm0, xmm1; pxor xmm1, xmm0.
        &[0x66, 0x48, 0x0f, 0x6e, 0xc3],
        &[0x66, 0x0f, 0x70, 0xc8, 0x4e],
        &[0x66, 0x0f, 0xd4, 0x0e],
        &[0x66, 0x0f, 0xf4, 0xc1],
        &[0x66, 0x0f, 0xef, 0xc8],
        // cvtsi2sd xmm2, rbx; sqrtsd xmm2, xmm2; divsd xmm2, [rsi + 8]; paddq xmm0, xmm2.
        &[0xf2, 0x48, 0x0f, 0x2a, 0xd3],
        &[0xf2, 0x0f, 0x51, 0xd2],
        &[0xf2, 0x0f, 0x5e, 0x56, 8],
        &[0x66, 0x0f, 0xd4, 0xc2],
        // movq [rsi + 3], xmm0; psadbw xmm1, [rsi]; paddq xmm0, xmm1; pmovmskb ecx, xmm0.
        &[0x66, 0x0f, 0xd6, 0x46, 3],
        &[0x66, 0x0f, 0xf6, 0x0e],
        &[0x66, 0x0f, 0xd4, 0xc1],
        &[0x66, 0x0f, 0xd7, 0xc8],
        // movq rax, xmm0; psrldq xmm0, 8; movq r8, xmm0; xor rax, r8; add rax, rcx.
        &[0x66, 0x48, 0x0f, 0x7e, 0xc0, 0x66, 0x0f, 0x73, 0xd8, 8],
        &[0x66, 0x49, 0x0f, 0x7e, 0xc0, 0x4c, 0x31, 0xc0, 0x48, 0x01, 0xc8],
        // stmxcsr [rsi]; mov ecx, [rsi]; shl rcx, 32; xor rax, rcx.
        &[0x0f, 0xae, 0x1e, 0x8b, 0x0e, 0x48, 0xc1, 0xe1, 32],
        &[0x48, 0x31, 0xc8],
    ];
    code.extend(parts.concat());
    for number in NUMBERS {
        passes(&MODES[..3], &["sse", "syscall"], 18, |body| {
            enable(body, false);
            both_compute(body, number, &code);
        });
    }
}

// Catches: as for SSE, and upper halves that are lost between two instructions.
#[test]
fn avx() {
    require_kvm!();
    if !cpu_has("avx2") {
        skip_part!("this CPU has no AVX2");
        return;
    }
    let mut code = FILL.to_vec();
    let parts: [&[u8]; 9] = [
        // vmovq xmm0, rbx; vpbroadcastq ymm1, xmm0; vpaddq ymm1, ymm1, [rsi]; vpmuludq ymm2, ymm1, ymm0.
        &[0xc4, 0xe1, 0xf9, 0x6e, 0xc3],
        &[0xc4, 0xe2, 0x7d, 0x59, 0xc8],
        &[0xc5, 0xf5, 0xd4, 0x0e],
        &[0xc5, 0xf5, 0xf4, 0xd0],
        // vpxor ymm0, ymm1, ymm2; vextracti128 xmm3, ymm0, 1; vpaddq xmm0, xmm0, xmm3; vmovq rax, xmm0; vzeroupper.
        &[0xc5, 0xf5, 0xef, 0xc2],
        &[0xc4, 0xe3, 0x7d, 0x39, 0xc3, 1],
        &[0xc5, 0xf9, 0xd4, 0xc3],
        &[0xc4, 0xe1, 0xf9, 0x7e, 0xc0],
        &[0xc5, 0xf8, 0x77],
    ];
    code.extend(parts.concat());
    for number in NUMBERS {
        passes(&MODES[..3], &["avx", "xsave", "syscall"], 9, |body| {
            enable(body, true);
            both_compute(body, number, &code);
        });
    }
}

// Catches: a fault that is missed, or has another address; an exception that is not masked and not raised.
#[test]
fn faults() {
    require_kvm!();
    if !vmm_performs() {
        skip_part!("this CPU executes supervisor code, and decides about faults");
        return;
    }
    passes(&MODES, &["sse"], 8, |body| {
        // movq [rsi], xmm0 without OSFXSR.
        let store = [0x66, 0x0f, 0xd6, 0x06];
        body.set(Rsi, WRITABLE).raises(&store, (6, 0), 0, 0);
        enable(body, false);
        body.set(Rsi, ABSENT).raises(&store, (14, 0), 2, ABSENT);
        body.set(Rsi, WRITABLE + 0xffc).raises(&store, (14, 0), 2, WRITABLE + 0x1000);
        // paddq xmm0, [rsi].
        body.set(Rsi, WRITABLE + 8).raises(&[0x66, 0x0f, 0xd4, 0x06], (13, 0), 0, 0);
        // mov dword [rsi], 0x1d80; ldmxcsr [rsi]: zero divide is not masked. pxor xmm1, xmm1; movq xmm0, rsi.
        body.code(&[0xc7, 0x06, 0x80, 0x1d, 0, 0, 0x0f, 0xae, 0x16, 0x66, 0x0f, 0xef, 0xc9]);
        body.code(&[0x66, 0x48, 0x0f, 0x6e, 0xc6]);
        // divsd xmm0, xmm1: a denormal by zero, which is a zero divide after a denormal that is masked.
        body.raises(&[0xf2, 0x0f, 0x5e, 0xc1], (19, 0), 0, 0);
    });
}
