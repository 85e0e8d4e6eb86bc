//! What the CPU keeps by XSAVE: the components' places, and which bits of MXCSR there are.

use std::{
    arch::{asm, x86_64::__cpuid_count},
    sync::OnceLock,
};

/// A component from bit 2 on (SDM vol. 1, "Enumeration of CPU Support for XSAVE Instructions and XSAVE-Supported
/// Features").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Component {
    /// Its number, from 2 on: XCR0's bit.
    pub number: u32,
    /// Its size in bytes.
    pub size: usize,
    /// Its offset in an area of standard form.
    pub offset: usize,
    /// In an area of compacted form it begins at a multiple of 64.
    pub is_aligned: bool,
}

/// The components that user code may use, by their numbers. A guest's CPUID has the same sizes and offsets.
#[must_use]
pub fn components() -> &'static [Component] {
    static COMPONENTS: OnceLock<Vec<Component>> = OnceLock::new();
    COMPONENTS.get_or_init(|| if std::arch::is_x86_feature_detected!("xsave") { enumerate() } else { Vec::new() })
}

fn enumerate() -> Vec<Component> {
    const LEAF: u32 = 0xd;
    /// ECX: managed by IA32_XSS; aligned.
    const SUPERVISOR: u32 = 1;
    const ALIGNED: u32 = 2;
    let component = |number| {
        let leaf = __cpuid_count(LEAF, number);
        let [size, offset] = [leaf.eax, leaf.ebx].map(|value| usize::try_from(value).unwrap_or(usize::MAX));
        let is_there = size != 0 && leaf.ecx & SUPERVISOR == 0;
        is_there.then_some(Component { number, size, offset, is_aligned: leaf.ecx & ALIGNED != 0 })
    };
    (2..63).filter_map(component).collect()
}

/// An FXSAVE image.
#[repr(C, align(16))]
struct Image([u8; 512]);

/// The host's XCR0: what its operating system lets user code use; 0 without XSAVE.
#[must_use]
pub fn xcr0() -> u64 {
    if !std::arch::is_x86_feature_detected!("xsave") {
        return 0;
    }
    let (low, high): (u32, u32);
    // SAFETY: XSAVE is there, and enabled, as the macro checks. XGETBV of XCR0 only reads.
    unsafe { asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high, options(nomem, nostack, preserves_flags)) };
    u64::from(high) << 32 | u64::from(low)
}

/// The bits of MXCSR that may be set (SDM vol. 1, "Guidelines for Writing to the MXCSR Register").
#[must_use]
pub fn mxcsr_mask() -> u32 {
    /// Where the mask is in an FXSAVE image, and its value on CPUs that store 0.
    const AT: usize = 28;
    const IF_ZERO: u32 = 0xffbf;
    static MASK: OnceLock<u32> = OnceLock::new();
    *MASK.get_or_init(|| {
        let mut image = Image([0; 512]);
        // SAFETY: FXSAVE, which every x86-64 CPU has, writes 512 bytes, to an aligned image of that size.
        unsafe { asm!("fxsave64 [{image}]", image = in(reg) &raw mut image.0, options(nostack, preserves_flags)) };
        let mut mask = [0; 4];
        for (to, from) in mask.iter_mut().zip(image.0.iter().skip(AT)) {
            *to = *from;
        }
        let mask = u32::from_le_bytes(mask);
        if mask == 0 { IF_ZERO } else { mask }
    })
}

/// The CPU's own account, for tests.
#[cfg(test)]
pub mod native {
    use std::arch::global_asm;

    /// An XSAVE area of at most 4,096 bytes.
    #[repr(C, align(64))]
    pub struct Aligned(pub [u8; 4096]);

    /// An instruction.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum Kind {
        /// XSAVE64.
        Xsave = 0,
        /// XSAVEOPT64.
        Xsaveopt = 1,
        /// XSAVEC64.
        Xsavec = 2,
        /// XRSTOR64.
        Xrstor = 3,
    }

    // System V's calling convention: RDI the state, RSI the operand, EDX the instruction's mask, ECX the kind, R8D the
    // state's mask.
    global_asm!(
        ".pushsection .text.vmm_xstate_native,\"ax\",@progbits",
        "vmm_xstate_native:",
        "sub rsp, 8",
        "stmxcsr [rsp]",
        "fnstcw [rsp + 4]",
        "mov r9d, edx",
        "mov eax, r8d",
        "xor edx, edx",
        "xrstor64 [rdi]",
        "mov eax, r9d",
        "cmp ecx, 1",
        "jb 2f",
        "je 3f",
        "cmp ecx, 2",
        "je 4f",
        "xrstor64 [rsi]",
        "jmp 5f",
        "2: xsave64 [rsi]",
        "jmp 5f",
        "3: xsaveopt64 [rsi]",
        "jmp 5f",
        "4: xsavec64 [rsi]",
        "5: mov eax, r8d",
        "xsave64 [rdi]",
        "fninit",
        "fldcw [rsp + 4]",
        "ldmxcsr [rsp]",
        "add rsp, 8",
        "ret",
        ".popsection",
    );

    unsafe extern "sysv64" {
        fn vmm_xstate_native(state: *mut u8, operand: *mut u8, mask: u32, kind: u32, state_mask: u32);
    }

    /// Whether the CPU has `kind`, and AVX.
    pub fn has(kind: Kind) -> bool {
        let avx = std::arch::is_x86_feature_detected!("avx");
        avx && match kind {
            Kind::Xsave | Kind::Xrstor => std::arch::is_x86_feature_detected!("xsave"),
            Kind::Xsaveopt => std::arch::is_x86_feature_detected!("xsaveopt"),
            Kind::Xsavec => std::arch::is_x86_feature_detected!("xsavec"),
        }
    }

    /// Executes `kind` with `mask` on `operand`, with the x87, SSE and AVX registers of `state`, which get their values
    /// after it. The caller must have prepared areas that do not fault: this is for tests.
    pub fn execute(kind: Kind, state: &mut Aligned, operand: &mut Aligned, mask: u32) {
        assert!(has(kind));
        // SAFETY: the CPU has the instruction and AVX. Areas are aligned and larger than AVX state. A fault ends the
        // test's process. Vector registers are the callee's to change; MXCSR and x87 control word are put back.
        unsafe { vmm_xstate_native(state.0.as_mut_ptr(), operand.0.as_mut_ptr(), mask & 7, kind as u32, 7) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Catches: offsets of compacted form taken for those of standard form, sizes in the wrong register.
    #[test]
    fn components_do_not_overlap() {
        let mut end = 576;
        let mut components = components().to_vec();
        components.sort_by_key(|component| component.offset);
        for Component { number, size, offset, .. } in components {
            assert!(offset >= end && size != 0, "{number}");
            assert!(number != 2 || (offset, size) == (576, 256));
            end = offset + size;
        }
        assert_eq!(mxcsr_mask() & 0xffbf, 0xffbf);
    }
}
