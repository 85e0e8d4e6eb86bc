//! The list of instructions, and what an encoding tells about one.

use iced_x86::{
    Code, CpuidFeature, Decoder, DecoderOptions, EncodingKind, FlowControl, Instruction, Mnemonic, OpKind, Register,
};

use super::Uses;

/// Whether the host's CPU has a feature that is on the list. AVX's also need the operating system, which the macro
/// asks, too.
fn has(feature: CpuidFeature) -> bool {
    match feature {
        // Every x86-64 CPU has these.
        CpuidFeature::MMX | CpuidFeature::SSE | CpuidFeature::SSE2 => true,
        CpuidFeature::SSE3 => is_x86_feature_detected!("sse3"),
        CpuidFeature::SSSE3 => is_x86_feature_detected!("ssse3"),
        CpuidFeature::SSE4_1 => is_x86_feature_detected!("sse4.1"),
        CpuidFeature::SSE4_2 => is_x86_feature_detected!("sse4.2"),
        CpuidFeature::AES => is_x86_feature_detected!("aes"),
        CpuidFeature::PCLMULQDQ => is_x86_feature_detected!("pclmulqdq"),
        CpuidFeature::SHA => is_x86_feature_detected!("sha"),
        CpuidFeature::GFNI => is_x86_feature_detected!("gfni"),
        CpuidFeature::POPCNT => is_x86_feature_detected!("popcnt"),
        CpuidFeature::MOVBE => is_x86_feature_detected!("movbe"),
        CpuidFeature::BMI1 => is_x86_feature_detected!("bmi1"),
        CpuidFeature::BMI2 => is_x86_feature_detected!("bmi2"),
        CpuidFeature::ADX => is_x86_feature_detected!("adx"),
        CpuidFeature::AVX => is_x86_feature_detected!("avx"),
        CpuidFeature::AVX2 => is_x86_feature_detected!("avx2"),
        CpuidFeature::FMA => is_x86_feature_detected!("fma"),
        CpuidFeature::F16C => is_x86_feature_detected!("f16c"),
        CpuidFeature::VAES => is_x86_feature_detected!("vaes"),
        CpuidFeature::VPCLMULQDQ => is_x86_feature_detected!("vpclmulqdq"),
        CpuidFeature::AVX512F => is_x86_feature_detected!("avx512f"),
        CpuidFeature::AVX512VL => is_x86_feature_detected!("avx512vl"),
        CpuidFeature::AVX512BW => is_x86_feature_detected!("avx512bw"),
        CpuidFeature::AVX512DQ => is_x86_feature_detected!("avx512dq"),
        CpuidFeature::AVX512CD => is_x86_feature_detected!("avx512cd"),
        CpuidFeature::AVX512_IFMA => is_x86_feature_detected!("avx512ifma"),
        CpuidFeature::AVX512_VBMI => is_x86_feature_detected!("avx512vbmi"),
        CpuidFeature::AVX512_VBMI2 => is_x86_feature_detected!("avx512vbmi2"),
        CpuidFeature::AVX512_VNNI => is_x86_feature_detected!("avx512vnni"),
        CpuidFeature::AVX512_BITALG => is_x86_feature_detected!("avx512bitalg"),
        CpuidFeature::AVX512_VPOPCNTDQ => is_x86_feature_detected!("avx512vpopcntdq"),
        _ => false,
    }
}

/// Whether `instruction` is on the list, and the host's CPU has it.
pub(super) fn is_allowed(instruction: &Instruction) -> bool {
    instruction.code() != Code::INVALID
        && matches!(instruction.encoding(), EncodingKind::Legacy | EncodingKind::VEX | EncodingKind::EVEX)
        && instruction.cpuid_features().iter().all(|feature| has(*feature))
        && instruction.flow_control() == FlowControl::Next
        && !instruction.is_privileged()
        && !instruction.is_stack_instruction()
        && !instruction.has_lock_prefix()
        && !is_special(instruction.mnemonic())
        && (0..instruction.op_count()).all(|number| is_plain(instruction, number))
        // General and vector registers are saved by XSAVE, without which nothing of this is done.
        && is_x86_feature_detected!("xsave")
}

/// Instructions of the listed features that are more than a function of their operands: fences and hints, stores by
/// RDI, masked accesses, which may leave out memory that is not there, loads of MXCSR, and x87's.
fn is_special(mnemonic: Mnemonic) -> bool {
    matches!(
        mnemonic,
        Mnemonic::Lfence
            | Mnemonic::Mfence
            | Mnemonic::Sfence
            | Mnemonic::Pause
            | Mnemonic::Clflush
            | Mnemonic::Prefetchnta
            | Mnemonic::Prefetcht0
            | Mnemonic::Prefetcht1
            | Mnemonic::Prefetcht2
            | Mnemonic::Prefetchw
            | Mnemonic::Monitor
            | Mnemonic::Mwait
            | Mnemonic::Maskmovq
            | Mnemonic::Maskmovdqu
            | Mnemonic::Vmaskmovdqu
            | Mnemonic::Vmaskmovps
            | Mnemonic::Vmaskmovpd
            | Mnemonic::Vpmaskmovd
            | Mnemonic::Vpmaskmovq
            | Mnemonic::Ldmxcsr
            | Mnemonic::Stmxcsr
            | Mnemonic::Vldmxcsr
            | Mnemonic::Vstmxcsr
            | Mnemonic::Fisttp
    )
}

/// Whether an operand is a general, MMX, vector or mask register, a number, or memory.
fn is_plain(instruction: &Instruction, number: u32) -> bool {
    match instruction.op_kind(number) {
        OpKind::Register => {
            let register = instruction.op_register(number);
            register.is_gpr() || register.is_mm() || register.is_vector_register() || register.is_k()
        }
        OpKind::Immediate8 | OpKind::Immediate8_2nd | OpKind::Memory => true,
        _ => false,
    }
}

/// Which registers `instruction` has, of which these are `used`.
pub(super) fn uses(instruction: &Instruction, used: &[Register]) -> Uses {
    let mmx = instruction.mnemonic() == Mnemonic::Emms || used.iter().any(|register| register.is_mm());
    let all = matches!(instruction.mnemonic(), Mnemonic::Vzeroupper | Mnemonic::Vzeroall);
    let avx512 = instruction.encoding() == EncodingKind::EVEX || used.iter().any(|register| register.is_k());
    let vector = all || avx512 || used.iter().any(|register| register.is_vector_register());
    Uses { mmx, vector, avx: vector && instruction.encoding() != EncodingKind::Legacy, avx512 }
}

/// What the address of an operand of `bytes` must be a multiple of: with AVX only for moves that ask for it, else for
/// 16 bytes but for moves that do not (SDM vol. 2, "Exceptions", types 1 to 5).
pub(super) fn alignment(instruction: &Instruction, bytes: usize) -> u64 {
    let is_aligned = match instruction.encoding() {
        EncodingKind::VEX | EncodingKind::EVEX => matches!(
            instruction.mnemonic(),
            Mnemonic::Vmovaps
                | Mnemonic::Vmovapd
                | Mnemonic::Vmovdqa
                | Mnemonic::Vmovdqa32
                | Mnemonic::Vmovdqa64
                | Mnemonic::Vmovntps
                | Mnemonic::Vmovntpd
                | Mnemonic::Vmovntdq
                | Mnemonic::Vmovntdqa
        ),
        _ => {
            bytes == 16
                && !matches!(
                    instruction.mnemonic(),
                    Mnemonic::Movups
                        | Mnemonic::Movupd
                        | Mnemonic::Movdqu
                        | Mnemonic::Lddqu
                        | Mnemonic::Pcmpestri
                        | Mnemonic::Pcmpestrm
                        | Mnemonic::Pcmpistri
                        | Mnemonic::Pcmpistrm
                )
        }
    };
    if is_aligned { u64::try_from(bytes).unwrap_or(1) } else { 1 }
}

/// Whether `bytes` are exactly one instruction, `wanted`.
pub(super) fn decodes_to(bytes: &[u8], wanted: &Instruction) -> bool {
    let decoded = Decoder::new(64, bytes, DecoderOptions::NONE).decode();
    decoded.code() == wanted.code()
        && decoded.len() == bytes.len()
        && decoded.op_count() == wanted.op_count()
        && decoded.segment_prefix() == Register::None
        && decoded.op_mask() == wanted.op_mask()
        && decoded.zeroing_masking() == wanted.zeroing_masking()
        && decoded.is_broadcast() == wanted.is_broadcast()
        && decoded.rounding_control() == wanted.rounding_control()
        && decoded.suppress_all_exceptions() == wanted.suppress_all_exceptions()
        && (0..wanted.op_count()).all(|number| {
            decoded.op_kind(number) == wanted.op_kind(number)
                && match wanted.op_kind(number) {
                    OpKind::Register => decoded.op_register(number) == wanted.op_register(number),
                    OpKind::Memory => {
                        decoded.memory_base() == wanted.memory_base()
                            && decoded.memory_index() == Register::None
                            && decoded.memory_displacement64() == 0
                    }
                    _ => decoded.immediate(number) == wanted.immediate(number),
                }
        })
}
