//! Which page faults are SYSCALLs.

use super::super::syscall::{Frame, performed};
use crate::kvm::{SyscallMsrs, state::GeneralRegisters};

const MSRS: SyscallMsrs = SyscallMsrs { star: 0x10_0008 << 32, lstar: 0xffff_8000, fmask: 0x4_7700 };
const FRAME: Frame = Frame { error_code: 0x15, rip: 0xffff_8000, cs: 0x33, rflags: 0x1_0092, rsp: 0x7000 };
const BEFORE: GeneralRegisters = GeneralRegisters {
    rax: 39,
    rcx: 0x40_1002,
    r11: 0x692,
    rsp: 0x9000,
    rip: 0xffff_9000,
    rflags: 2,
    rbx: 0,
    rdx: 0,
    rsi: 0,
    rdi: 0,
    rbp: 0,
    r8: 0,
    r9: 0,
    r10: 0,
    r12: 0,
    r13: 0,
    r14: 0,
    r15: 0,
};

// Catches: a register of the exception's that stays; RF, or the stepping VMM's TF, in the flags that the guest
// restores.
#[test]
fn a_syscall_leaves_the_stack_and_the_flags_of_user_code() {
    let after = GeneralRegisters { rip: FRAME.rip, rsp: FRAME.rsp, rflags: 0x92, ..BEFORE };
    assert_eq!(performed(BEFORE, FRAME, MSRS, false), Some(after));
    let stepped = GeneralRegisters { r11: BEFORE.r11 | 0x100, ..BEFORE };
    assert_eq!(performed(stepped, FRAME, MSRS, true), Some(after));
    // The guest's own, which the mask clears, stays in R11.
    assert_eq!(performed(stepped, FRAME, MSRS, false), Some(GeneralRegisters { r11: stepped.r11, ..after }));
}

// Catches: a jump to the kernel's entry that becomes a system call.
#[test]
fn other_faults_are_none() {
    for (frame, before) in [
        (Frame { rip: FRAME.rip + 1, ..FRAME }, BEFORE),
        (Frame { rflags: FRAME.rflags | 1, ..FRAME }, BEFORE),
        (FRAME, GeneralRegisters { r11: BEFORE.r11 | 1, ..BEFORE }),
    ] {
        assert_eq!(performed(before, frame, MSRS, false), None, "{frame:x?} {before:x?}");
    }
}

// Catches: a load, a store, or a fault of the kernel's that is taken for a fetch of user code.
#[test]
fn only_a_fetch_by_user_code_is_looked_at() {
    let looked_at = |frame: Frame, cr2| frame.is_of_fetch_by_user(cr2);
    for error_code in 0..0x80 {
        let expected = [4, 5, 0x14, 0x15].contains(&error_code);
        assert_eq!(looked_at(Frame { error_code, ..FRAME }, FRAME.rip), expected, "{error_code:#x}");
    }
    assert!(!looked_at(FRAME, FRAME.rip + 1));
    assert!((0..3).all(|level| !looked_at(Frame { cs: 0x30 | level, ..FRAME }, FRAME.rip)));
}
