//! Single steps (KVM_GUESTDBG_SINGLESTEP): after which instruction each one stops.

use super::{
    Check, Context,
    answer::{Found, Verdict, conforms},
    rig::{CODE, PORT, Rig, guest_code},
};
use crate::kvm::{Error, Exit, Operation};

/// What a step is (api.rst, KVM_SET_GUEST_DEBUG).
const EACH: &str = "KVM_EXIT_DEBUG after each instruction (api.rst, KVM_SET_GUEST_DEBUG)";

pub(super) const CHECKS: &[Check] = &[
    Check {
        id: "step-nop",
        rule: EACH,
        kernel: "kvm_arch_vcpu_ioctl_set_guest_debug (x86.c)",
        run: |cx| steps(cx, "NOP, NOP, NOP", guest_code!("nop", "nop", "nop", "hlt"), &[[1, 2, 3]]),
    },
    Check {
        id: "step-sti",
        rule: "KVM_EXIT_DEBUG after each instruction: STI holds back interrupts, not traps (SDM vol. 2, \"STI\")",
        kernel: "vmx_vcpu_run clears the shadow while stepping (vmx/vmx.c); svm_interrupt_allowed (svm/svm.c)",
        run: |cx| steps(cx, "STI, NOP, NOP", guest_code!("sti", "nop", "nop", "hlt"), &[[1, 2, 3]]),
    },
    Check {
        id: "step-sti-shadow",
        rule: "after STI, interrupts are held back for one instruction (SDM vol. 2, \"STI\")",
        kernel: "vmx_vcpu_run (vmx/vmx.c); kvm_vcpu_ioctl_x86_get_vcpu_events (x86.c)",
        run: sti_shadow,
    },
    Check {
        id: "step-mov-ss",
        rule: "after MOV SS or POP SS, a step may end after the next instruction (SDM vol. 3, \"Masking Exceptions and Interrupts \
               When Switching Stacks\")",
        kernel: "vmx_set_interrupt_shadow (vmx/vmx.c)",
        run: |cx| {
            let code = guest_code!("mov ss, eax", "nop", "nop", "nop", "nop", "hlt");
            steps(cx, "MOV SS, NOP, NOP", code, &[[2, 3, 4], [3, 4, 5]])
        },
    },
    Check { id: "step-iret", rule: EACH, kernel: "kvm_arch_vcpu_ioctl_set_guest_debug (x86.c)", run: iret },
    Check {
        id: "step-out",
        rule: "none: whether a step over OUT also ends with KVM_EXIT_DEBUG",
        kernel: "kvm_fast_pio, kvm_skip_emulated_instruction, kvm_vcpu_do_singlestep (x86.c)",
        run: out,
    },
    Check {
        id: "step-hlt",
        rule: "HLT exits with KVM_EXIT_HLT if KVM has no LAPIC (api.rst, KVM_EXIT_HLT)",
        kernel: "kvm_emulate_halt (x86.c)",
        run: halt,
    },
    Check {
        id: "step-pushf",
        rule: "none: whether a guest that is stepped sees RFLAGS.TF in what PUSHF stores",
        kernel: "kvm_set_rflags, kvm_get_rflags (x86.c)",
        run: pushf,
    },
];

/// Where each of three steps ended, as distances from the first instruction; the exit of one that did not end with
/// KVM_EXIT_DEBUG.
fn stops(rig: &mut Rig) -> Result<Result<[u64; 3], String>, Error> {
    let mut stops = [0; 3];
    for stop in &mut stops {
        let exit = rig.step()?;
        if exit != Exit::Debug {
            return Ok(Err(rig.describe(exit)));
        }
        *stop = rig.vcpu.registers().rip.wrapping_sub(CODE);
    }
    Ok(Ok(stops))
}

/// Three steps from the first instruction on, which must end at one of the `expected` places.
fn steps(cx: &Context, name: &str, code: &[u8], expected: &[[u64; 3]]) -> Result<Found, Error> {
    let asked = format!("three steps over {name}");
    let mut rig = Rig::new(cx, code)?;
    // For MOV SS.
    rig.set_rax(u64::from(super::rig::DATA_SELECTOR))?;
    Ok(match stops(&mut rig)? {
        Ok(ended) => Found::new(
            asked,
            "KVM_EXIT_DEBUG three times",
            format!("at +{}, +{}, +{}", ended[0], ended[1], ended[2]),
            conforms(expected.contains(&ended)),
        ),
        Err(exit) => Found::new(asked, exit, "no KVM_EXIT_DEBUG", Verdict::Differs),
    })
}

fn sti_shadow(cx: &Context) -> Result<Found, Error> {
    let asked = "a step over STI";
    let mut rig = Rig::new(cx, guest_code!("sti", "nop", "nop", "hlt"))?;
    let exit = rig.step()?;
    let ended = rig.describe(exit);
    rig.complete()?;
    let at = rig.vcpu.registers().rip.wrapping_sub(CODE);
    if exit != Exit::Debug || at == 0 {
        return Ok(Found::new(asked, ended, format!("no step: at +{at}"), Verdict::Differs));
    }
    let at_nop = at == 1;
    let (ready, shadow) = (rig.vcpu.ready_for_injection(), rig.vcpu.interrupt_shadow());
    let measured = format!(
        "{}, interrupt shadow {shadow}, {}",
        if at_nop { "before the next instruction" } else { "after more than STI" },
        if ready { "ready for injection" } else { "not ready for injection" },
    );
    Ok(Found::new(asked, ended, measured, conforms(!at_nop || !ready)))
}

/// IRETQ to a NOP that is not the next instruction.
fn iret(cx: &Context) -> Result<Found, Error> {
    let asked = "a step over IRETQ";
    let code = guest_code!(
        "push 0x10",
        "push 0x9000",
        "push 2",
        "push 8",
        "lea rax, [rip + 2f]",
        "push rax",
        "out 0x80, al",
        "iretq",
        "nop",
        "nop",
        "2: nop",
        "nop",
        "nop",
        "hlt",
    );
    let mut rig = Rig::new(cx, code)?;
    let exit = rig.run()?;
    if !rig.is_out(exit, PORT) {
        return Ok(Found::unreached(asked, rig.describe(exit)));
    }
    rig.complete()?;
    let target = rig.vcpu.registers().rax;
    let exit = rig.step()?;
    let ended = rig.describe(exit);
    let past = rig.vcpu.registers().rip.wrapping_sub(target);
    let measured = match past {
        0 => "at the instruction returned to".to_owned(),
        1 => "one instruction late".to_owned(),
        _ => format!("at {past:#x} from the instruction returned to"),
    };
    Ok(Found::new(asked, ended, measured, conforms(exit == Exit::Debug && past == 0)))
}

const ACCESS: Exit = Exit::Operation(Operation::Port);

fn out(cx: &Context) -> Result<Found, Error> {
    let asked = "two steps, the first over OUT";
    let mut rig = Rig::new(cx, guest_code!("out 0x80, al", "nop", "nop", "hlt"))?;
    let first = rig.step()?;
    let said = rig.describe(first);
    let second = rig.step()?;
    let at = rig.vcpu.registers().rip.wrapping_sub(CODE);
    let (measured, verdict) = match (first, second, at) {
        (ACCESS, Exit::Debug, 2) => ("the access exits, then KVM_EXIT_DEBUG behind OUT".to_owned(), Verdict::Noted),
        (ACCESS, Exit::Debug, 3) => ("the access exits; no KVM_EXIT_DEBUG for OUT".to_owned(), Verdict::Noted),
        _ => (format!("then {} at +{at}", rig.describe(second)), Verdict::Differs),
    };
    Ok(Found::new(asked, said, measured, verdict))
}

fn halt(cx: &Context) -> Result<Found, Error> {
    let asked = "a step over HLT";
    let mut rig = Rig::new(cx, guest_code!("hlt", "nop", "nop", "hlt"))?;
    let exit = rig.step()?;
    let said = rig.describe(exit);
    let at = rig.vcpu.registers().rip.wrapping_sub(CODE);
    let measured = match exit {
        Exit::Halt => format!("at +{at}"),
        _ => format!("at +{at}: the guest's halt is lost"),
    };
    Ok(Found::new(asked, said, measured, conforms(exit == Exit::Halt && at == 1)))
}

fn pushf(cx: &Context) -> Result<Found, Error> {
    const TF: u64 = 1 << 8;
    let asked = "two steps over PUSHFQ and POP RAX";
    let mut rig = Rig::new(cx, guest_code!("pushfq", "pop rax", "nop", "hlt"))?;
    rig.step()?;
    let exit = rig.step()?;
    let said = rig.describe(exit);
    let seen = rig.vcpu.registers().rax & TF != 0;
    Ok(Found::new(asked, said, if seen { "TF is set" } else { "TF is clear" }, Verdict::Noted))
}
