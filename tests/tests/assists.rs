//! Instructions that some hosts' KVM cannot emulate in supervisor code: the guest checks their results. Where the CPU
//! executes them the test is passed by the CPU, and the summary counts none.

use vm_tests::{
    long_mode::{
        ABSENT, Body, INTERRUPT, READ_ONLY,
        Register::{Flags, Rax, Rbx, Rcx, Rdx, Rsi},
        WRITABLE,
    },
    performed::{self, CMPXCHG16B, MODES, cpu_has, vmm_performs},
    require_kvm, skip_part,
};

const CF: u64 = 1;
const ZF: u64 = 0x40;
const SF: u64 = 0x80;
const OF: u64 = 0x800;
/// CF, PF, AF, ZF, SF, OF.
const ARITHMETIC: u64 = 0x8d5;
/// Those that BMI instructions define.
const DEFINED: u64 = CF | ZF | SF | OF;

/// Page fault, general protection fault, invalid opcode, device not available: faults. Breakpoint: a trap.
const PF: (u8, u64) = (14, 0);
const GP: (u8, u64) = (13, 0);
const UD: (u8, u64) = (6, 0);
const NM: (u8, u64) = (7, 0);
const BP: (u8, u64) = (3, 1);

const POPCNT_MEMORY: [u8; 5] = [0xf3, 0x48, 0x0f, 0xb8, 0x06];

/// Runs the guest that `build` makes in every mode. It executes `count` instructions of `kind`, and no others.
#[track_caller]
fn passes(kind: &str, count: u64, build: impl Fn(&mut Body)) {
    require_kvm!();
    performed::passes(&MODES, &[kind], count, build);
}

/// `code` on RAX, RBX, RCX and RDX with all flags set or none: RAX is `value`, and `set` of the flags in `defined` are
/// set. The rest of the flags that are in `kept` stay as they were.
fn computes(body: &mut Body, code: &[u8], inputs: [u64; 4], value: u64, (defined, set): (u64, u64), kept: u64) {
    for flags in [0, 0x8d5] {
        let about = format!("{code:02x?} of {inputs:x?} with flags {flags:#x}");
        let [rax, rbx, rcx, rdx] = inputs;
        body.set(Rax, rax).set(Rbx, rbx).set(Rcx, rcx).set(Rdx, rdx).set_flags(flags | 2).code(code);
        body.keep_flags(defined | kept);
        let expected = set | u64::from(flags) & kept & !defined;
        body.expect(Rax, value, &about).expect(Flags, expected, &about);
    }
}

/// SF and ZF of `value`.
fn sign_zero(value: u64) -> u64 {
    if value == 0 { ZF } else { value >> 63 << 7 }
}

fn carry(carry: bool) -> u64 {
    u64::from(carry)
}

/// Numbers to compute with.
const PAIRS: [(u64, u64); 4] =
    [(0, 0), (0x8000_0000_0000_0000, 0x0804), (0x0123_4567_89ab_cdf0, 0x3f), (u64::MAX, 0x2bff_ff00_4d11)];

// Catches: a wrong count, a flag that stays, an operand in memory that is read at the wrong place or past a page that
// is not there without a fault.
#[test]
fn popcnt() {
    if !cpu_has("popcnt") {
        skip_part!("this CPU has no POPCNT");
        return;
    }
    passes("popcnt", 4 * 2 + 3, |body| {
        for (a, _) in PAIRS {
            let zero = if a == 0 { ZF } else { 0 };
            computes(
                body,
                &[0xf3, 0x48, 0x0f, 0xb8, 0xc3],
                [9, a, 0, 0],
                u64::from(a.count_ones()),
                (ARITHMETIC, zero),
                0,
            );
        }
        // mov [rsi], rbx.
        body.set(Rsi, WRITABLE + 0xff8).set(Rbx, 0xff00_ff01).code(&[0x48, 0x89, 0x1e]);
        body.code(&POPCNT_MEMORY).expect(Rax, 17, "popcnt of memory");
        body.set(Rsi, ABSENT + 8).raises(&POPCNT_MEMORY, PF, 0, ABSENT + 8);
        body.set(Rsi, WRITABLE + 0xffc).raises(&POPCNT_MEMORY, PF, 0, WRITABLE + 0x1000);
    });
}

// Catches: exchanged operands, wrong results or flags, by the CPU's account where there is one.
#[test]
fn bmi() {
    if !cpu_has("bmi1") || !cpu_has("bmi2") {
        skip_part!("this CPU has no BMI1 or no BMI2");
        return;
    }
    passes("bmi", 4 * 2 * 13, |body| {
        for (a, b) in PAIRS {
            let mut logic = |code: &[u8], value: u64, carried: bool| {
                computes(body, code, [9, a, b, 0], value, (DEFINED, sign_zero(value) | carry(carried)), 0);
            };
            // andn rax, rbx, rcx; blsi rax, rbx; blsmsk rax, rbx; blsr rax, rbx; bzhi rax, rbx, rcx.
            logic(&[0xc4, 0xe2, 0xe0, 0xf2, 0xc1], !a & b, false);
            logic(&[0xc4, 0xe2, 0xf8, 0xf3, 0xdb], a & a.wrapping_neg(), a != 0);
            logic(&[0xc4, 0xe2, 0xf8, 0xf3, 0xd3], a ^ a.wrapping_sub(1), a == 0);
            logic(&[0xc4, 0xe2, 0xf8, 0xf3, 0xcb], a & a.wrapping_sub(1), a == 0);
            let index = b & 0xff;
            logic(&[0xc4, 0xe2, 0xf0, 0xf5, 0xc3], if index > 63 { a } else { a & ((1 << index) - 1) }, index > 63);
            // bextr rax, rbx, rcx: SF is undefined.
            let (start, length) = (b & 0xff, b >> 8 & 0xff);
            let field = if start > 63 { 0 } else { a >> start };
            let field = if length > 63 { field } else { field & ((1 << length) - 1) };
            let zero = if field == 0 { ZF } else { 0 };
            computes(body, &[0xc4, 0xe2, 0xf0, 0xf7, 0xc3], [9, a, b, 0], field, (CF | OF | ZF, zero), 0);
            let mut unflagged = |code: &[u8], value: u64| {
                computes(body, code, [9, a, b, 0x1_0000_0001], value, (0, 0), ARITHMETIC);
            };
            // rorx rax, rbx, 13; sarx, shlx, shrx rax, rbx, rcx; mulx rax, rsi, rbx.
            unflagged(&[0xc4, 0xe3, 0xfb, 0xf0, 0xc3, 0x0d], a.rotate_right(13));
            unflagged(&[0xc4, 0xe2, 0xf2, 0xf7, 0xc3], (a.cast_signed() >> (b & 63)).cast_unsigned());
            unflagged(&[0xc4, 0xe2, 0xf1, 0xf7, 0xc3], a << (b & 63));
            unflagged(&[0xc4, 0xe2, 0xf3, 0xf7, 0xc3], a >> (b & 63));
            let high = (u128::from(a) * 0x1_0000_0001) >> 64;
            unflagged(&[0xc4, 0xe2, 0xcb, 0xf6, 0xc3], u64::try_from(high).unwrap());
            // pdep, pext rax, rbx, rcx.
            let places: Vec<u32> = (0..64).filter(|place| b >> place & 1 != 0).collect();
            let at = |bits: u64, from: u32, to: u32| (bits >> from & 1) << to;
            unflagged(&[0xc4, 0xe2, 0xe3, 0xf5, 0xc1], (0..).zip(&places).map(|(bit, place)| at(a, bit, *place)).sum());
            unflagged(&[0xc4, 0xe2, 0xe2, 0xf5, 0xc1], (0..).zip(&places).map(|(bit, place)| at(a, *place, bit)).sum());
        }
    });
}

// Catches: the two carries mixed up, another flag touched.
#[test]
fn adcx_and_adox() {
    if !cpu_has("adx") {
        skip_part!("this CPU has no ADX");
        return;
    }
    passes("adx", 4 * 2 * 2, |body| {
        for (a, b) in PAIRS {
            for (prefix, flag) in [(0x66, CF), (0xf3, OF)] {
                for set in [false, true] {
                    let sum = u128::from(a) + u128::from(b) + u128::from(set);
                    let flags = if set { 0x8d7 } else { 2 };
                    let carried = if sum >> 64 == 0 { 0 } else { flag };
                    let about = format!("{prefix:#x} {a:#x} {b:#x} {set}");
                    body.set(Rax, a).set(Rbx, b).set_flags(flags).code(&[prefix, 0x48, 0x0f, 0x38, 0xf6, 0xc3]);
                    body.keep_flags(ARITHMETIC);
                    body.expect(Rax, u64::try_from(sum & u128::from(u64::MAX)).unwrap(), &about);
                    body.expect(Flags, u64::from(flags) & ARITHMETIC & !flag | carried, &about);
                }
            }
        }
    });
}

// Catches: an exchange that does not happen or happens always, a store into a page that may not be written, a fault
// with the wrong error code or address, a misaligned operand.
#[test]
fn cmpxchg16b() {
    if !cpu_has("cx16") {
        skip_part!("this CPU has no CMPXCHG16B");
        return;
    }
    require_kvm!();
    let vmm_performs = vmm_performs();
    if !vmm_performs {
        skip_part!("this CPU executes CMPXCHG16B, and decides about its faults");
    }
    passes("cmpxchg16b", 6, |body| {
        let registers = |body: &mut Body| {
            body.set(Rax, 0).set(Rdx, 0).set(Rbx, 0x1111).set(Rcx, 0x2222).set_flags(0x8d7);
        };
        body.set(Rsi, WRITABLE + 0x10);
        registers(body);
        body.code(&[0xf0]).code(&CMPXCHG16B).keep_flags(ARITHMETIC).expect(Flags, ARITHMETIC, "equal");
        registers(body);
        body.code(&CMPXCHG16B).keep_flags(ARITHMETIC).expect(Flags, ARITHMETIC & !ZF, "not equal");
        body.expect(Rax, 0x1111, "low half").expect(Rdx, 0x2222, "high half");
        if vmm_performs {
            body.set(Rsi, READ_ONLY).raises(&CMPXCHG16B, PF, 3, READ_ONLY);
            body.set(Rsi, ABSENT + 0x20).raises(&CMPXCHG16B, PF, 2, ABSENT + 0x20);
        }
        body.set(Rsi, WRITABLE + 8).raises(&CMPXCHG16B, GP, 0, 0);
        body.set(Rsi, 1 << 50).raises(&CMPXCHG16B, GP, 0, 0);
    });
}

// Catches: a hint that faults, or that moves RIP by another length.
#[test]
fn hints() {
    passes("nop", 4, |body| {
        body.set(Rax, ABSENT);
        // rdsspq rax, which is a NOP without shadow stacks; nop [rax] in reserved forms.
        for nop in [&[0xf3, 0x48, 0x0f, 0x1e, 0xc8][..], &[0x0f, 0x19, 0xc0], &[0x0f, 0x1c, 0xc0], &[0x0f, 0x1e, 0xc0]]
        {
            body.code(nop).expect(Rax, ABSENT, &format!("{nop:02x?}"));
        }
    });
}

// Catches: a breakpoint that comes back to itself or skips the next instruction; a HLT behind it that is executed
// before the handler, by a VMM that steps.
#[test]
fn breakpoints() {
    passes("int3", 2, |body| {
        // int3; hlt: the handler returns behind the HLT.
        body.raises(&[0xcc, 0xf4], BP, 0, 0).raises(&[0xcc], BP, 0, 0);
    });
}

// Catches: an interrupt that is taken for an exception, has an error code, or returns to itself; vectors of both kinds.
#[test]
fn software_interrupts() {
    passes("int", 2, |body| {
        // int 0x10; int INTERRUPT; hlt: the handler returns behind the HLT.
        body.raises(&[0xcd, 0x10], (0x10, 2), 0, 0).raises(&[0xcd, INTERRUPT, 0xf4], (INTERRUPT, 2), 0, 0);
    });
}

// Catches: RFLAGS.AC not changed, or another flag.
#[test]
fn clac_and_stac() {
    if !cpu_has("smap") {
        skip_part!("this CPU has no SMAP");
        return;
    }
    passes("clac-stac", 4, |body| {
        for flags in [2, 0x8d7] {
            let arithmetic = u64::from(flags) & ARITHMETIC;
            let both = 1 << 18 | ARITHMETIC;
            body.set_flags(flags).code(&[0x0f, 0x01, 0xcb]).keep_flags(both);
            body.expect(Flags, 1 << 18 | arithmetic, "stac");
            body.set_flags(flags | 1 << 18)
                .code(&[0x0f, 0x01, 0xca])
                .keep_flags(both)
                .expect(Flags, arithmetic, "clac");
        }
    });
}

// Catches: XCR0 told to a guest that has not enabled XSAVE, or not told to one that has.
#[test]
fn xgetbv() {
    if !cpu_has("xsave") {
        skip_part!("this CPU has no XSAVE");
        return;
    }
    let xgetbv = [0x0f, 0x01, 0xd0];
    passes("xgetbv", 2, |body| {
        body.set(Rcx, 0).raises(&xgetbv, UD, 0, 0);
        // mov rax, cr4; or eax, 0x40000 (OSXSAVE); mov cr4, rax. After reset XCR0 has x87 state only.
        body.code(&[0x0f, 0x20, 0xe0, 0x0d, 0, 0, 4, 0, 0x0f, 0x22, 0xe0]).set(Rdx, 9);
        body.code(&xgetbv).expect(Rax, 1, "xgetbv").expect(Rdx, 0, "xgetbv");
    });
}

// Catches: registers that do not reach KVM's vCPU or come back from it; an XCR0 that KVM does not take; a fault missed.
#[test]
fn xsave() {
    if !cpu_has("xsave") {
        skip_part!("this CPU has no XSAVE");
        return;
    }
    let (xsetbv, xsave, xrstor) = ([0x0f, 0x01, 0xd1], [0x48, 0x0f, 0xae, 0x26], [0x48, 0x0f, 0xae, 0x2e]);
    passes("xsave", 6, |body| {
        // mov rax, cr4; or eax, 0x40200 (OSXSAVE, OSFXSR); mov cr4, rax. x87 and SSE state.
        body.code(&[0x0f, 0x20, 0xe0, 0x0d, 0, 2, 4, 0, 0x0f, 0x22, 0xe0]).set(Rcx, 0).set(Rdx, 0);
        body.set(Rax, 2).raises(&xsetbv, GP, 0, 0).set(Rax, 3).code(&xsetbv);
        // mov [rsi + 0xf00], rbx; movups xmm0, [rsi + 0xf00].
        body.set(Rsi, WRITABLE).set(Rbx, 0x0123_4567_89ab_cdef).code(&[0x48, 0x89, 0x9e, 0, 0x0f, 0, 0]);
        body.code(&[0x0f, 0x10, 0x86, 0, 0x0f, 0, 0]).code(&xsave);
        // mov rcx, [rsi + 160]; movzx edx, byte [rsi + 512]; and edx, 2.
        body.code(&[0x48, 0x8b, 0x8e, 0xa0, 0, 0, 0]).expect(Rcx, 0x0123_4567_89ab_cdef, "XMM0 saved");
        body.code(&[0x0f, 0xb6, 0x96, 0, 2, 0, 0, 0x83, 0xe2, 2]).expect(Rdx, 2, "SSE in use").set(Rdx, 0);
        // movups xmm0, [rsi + 0xf80]; xrstor; movups [rsi + 0xf80], xmm0; mov rcx, [rsi + 0xf80].
        body.code(&[0x0f, 0x10, 0x86, 0x80, 0x0f, 0, 0]).code(&xrstor).code(&[0x0f, 0x11, 0x86, 0x80, 0x0f, 0, 0]);
        body.code(&[0x48, 0x8b, 0x8e, 0x80, 0x0f, 0, 0]).expect(Rcx, 0x0123_4567_89ab_cdef, "XMM0 restored");
        body.set(Rsi, WRITABLE + 8).raises(&xrstor, GP, 0, 0).set(Rsi, ABSENT).raises(&xrstor, PF, 0, 0);
    });
}

// Catches: the host's TSC told to a guest whose CPUID has no RDTSCP, and whose TSC may be another one.
#[test]
fn rdtscp_is_not_there() {
    require_kvm!();
    if !vmm_performs() {
        skip_part!("this CPU executes supervisor code, and decides about RDTSCP");
        return;
    }
    passes("rdtscp", 1, |body| {
        body.raises(&[0x0f, 0x01, 0xf9], UD, 0, 0);
    });
}

// Catches: FWAIT that does not see a task switch that waits.
#[test]
fn fwait() {
    passes("fwait", 2, |body| {
        body.code(&[0x9b]);
        // mov rax, cr0; or eax, 10 (TS, MP); mov cr0, rax; fwait; clts.
        body.code(&[0x0f, 0x20, 0xc0, 0x83, 0xc8, 10, 0x0f, 0x22, 0xc0]);
        body.raises(&[0x9b], NM, 0, 0).code(&[0x0f, 0x06]);
    });
}

// Catches: x87 registers that do not reach KVM's vCPU or come back from it; a number or a flag that is not the CPU's.
#[test]
fn x87() {
    passes("x87", 16, |body| {
        body.set(Rsi, WRITABLE + 0x20).code(&[0xdb, 0xe3]);
        // fldpi; fld1; fadd st1; fmul st0; fist dword [rsi]; fistp qword [rsi + 8]: (pi + 1) squared.
        body.code(&[0xd9, 0xeb, 0xd9, 0xe8, 0xd8, 0xc1, 0xd8, 0xc8, 0xdb, 0x16, 0xdf, 0x7e, 8]);
        // mov eax, [rsi]; mov rcx, [rsi + 8].
        body.code(&[0x8b, 0x06, 0x48, 0x8b, 0x4e, 8]).expect(Rax, 17, "fist").expect(Rcx, 17, "fistp");
        // fld1; fcomi st1: below pi; fstp st0, twice.
        body.set_flags(2).code(&[0xd9, 0xe8, 0xdb, 0xf1]).keep_flags(CF | ZF).expect(Flags, CF, "fcomi");
        body.code(&[0xdd, 0xd8, 0xdd, 0xd8]);
        // fnstcw [rsi]; fnstsw ax: rounded, nothing waits.
        body.code(&[0xd9, 0x3e, 0x0f, 0xb7, 0x0e]).expect(Rcx, 0x37f, "fnstcw");
        body.set(Rax, 0).code(&[0xdf, 0xe0]).code(&[0x24, 0x5f]).expect(Rax, 0, "fnstsw");
        // fldz; fstp qword [rsi], where there is no page; ffree st0; fninit.
        body.code(&[0xd9, 0xee]).set(Rsi, ABSENT).raises(&[0xdd, 0x1e], PF, 2, ABSENT).code(&[0xdb, 0xe3]);
    });
}

// Catches: a #GP that a stepping VMM raises at a trap site and never lets in, because it performs the site again.
#[test]
fn an_exception_of_a_trap_site_enters() {
    passes("none", 0, |body| {
        // An MSR that is not there.
        body.set(Rcx, 0x1234_5678).wrmsr_site_raises_gp();
    });
}
