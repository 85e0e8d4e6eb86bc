//! Interrupts that the VMM injects, for a VM without KVM's LAPIC.

use super::{
    Check, Context,
    answer::{Found, Verdict, conforms, said},
    rig::{CODE, DATA, INTERRUPT, NMI, PORT, Rig, guest_code},
};
use crate::kvm::{Error, Exit};

pub(super) const CHECKS: &[Check] = &[
    Check {
        id: "inject-ready",
        rule: "ready_for_interrupt_injection says whether the guest would take an interrupt (api.rst, kvm_run)",
        kernel: "post_kvm_run_save, kvm_vcpu_ready_for_interrupt_injection (x86.c)",
        run: ready,
    },
    Check {
        id: "inject",
        rule: "the handler runs before the guest's next instruction (api.rst, KVM_INTERRUPT)",
        kernel: "kvm_vcpu_ioctl_interrupt, kvm_check_and_inject_events (x86.c)",
        run: |cx| inject(cx, true),
    },
    Check {
        id: "inject-if-0",
        rule: "none: KVM_INTERRUPT with RFLAGS.IF = 0 is not documented; on hardware the entry fails (SDM vol. 3, \"Checks on Guest RIP, \
               RFLAGS, and SSP\")",
        kernel: "kvm_vcpu_ioctl_interrupt, kvm_check_and_inject_events (x86.c)",
        run: |cx| inject(cx, false),
    },
    Check {
        id: "window",
        rule: "with request_interrupt_window, KVM_RUN returns when the guest can take an interrupt (api.rst, kvm_run)",
        kernel: "dm_request_for_irq_injection, vcpu_enter_guest (x86.c)",
        run: |cx| window(cx, "STI, then open", long_window()),
    },
    Check {
        id: "window-short",
        rule: "the same, for a window of one instruction",
        kernel: "vmx_enable_irq_window (vmx/vmx.c), svm_enable_irq_window (svm/svm.c)",
        run: |cx| window(cx, "STI, NOP, CLI, a thousand times", short_windows()),
    },
    Check {
        id: "nmi",
        rule: "of three KVM_NMI one is handled, one waits until IRET, one is lost (SDM vol. 3, \"Handling Multiple NMIs\")",
        kernel: "process_nmi, kvm_inject_nmi (x86.c)",
        run: nmi,
    },
];

/// Exits once with interrupts enabled, and once with interrupts disabled.
fn both() -> &'static [u8] {
    guest_code!("sti", "nop", "out 0x80, al", "cli", "out 0x81, al", "hlt")
}

fn ready(cx: &Context) -> Result<Found, Error> {
    let asked = "ready_for_interrupt_injection with IF = 1, then with IF = 0";
    let mut rig = Rig::new(cx, both())?;
    let mut flags = Vec::new();
    for port in [PORT, PORT + 1] {
        let exit = rig.run()?;
        if !rig.is_out(exit, port) {
            return Ok(Found::unreached(asked, rig.describe(exit)));
        }
        rig.complete()?;
        flags.push(rig.vcpu.ready_for_injection());
    }
    let measured = flags.iter().map(|flag| u8::from(*flag).to_string()).collect::<Vec<_>>().join(", ");
    Ok(Found::new(asked, "KVM_EXIT_IO", measured, conforms(flags == [true, false])))
}

/// KVM_INTERRUPT at an exit with RFLAGS.IF as given.
fn inject(cx: &Context, enabled: bool) -> Result<Found, Error> {
    let asked = format!("KVM_INTERRUPT of vector {INTERRUPT:#x} with IF = {}", u8::from(enabled));
    let code = match enabled {
        true => guest_code!("sti", "nop", "out 0x80, al", "nop", "out 0x81, al", "hlt"),
        false => guest_code!("cli", "nop", "out 0x80, al", "nop", "out 0x81, al", "hlt"),
    };
    let mut rig = Rig::new(cx, code)?;
    let exit = rig.run()?;
    if !rig.is_out(exit, PORT) {
        return Ok(Found::unreached(asked, rig.describe(exit)));
    }
    rig.complete()?;
    let next = rig.vcpu.registers().rip;
    let answer = rig.interrupt(INTERRUPT);
    let exit = rig.run()?;
    let (measured, as_documented) = if rig.is_out(exit, u16::from(INTERRUPT)) {
        // The handler's first instruction: RIP is on top of its stack.
        let rsp = rig.vcpu.registers().rsp;
        let first = rig.read_u64(rsp)? == next;
        (if first { "the handler runs first" } else { "the handler runs, but not first" }.to_owned(), first)
    } else if rig.is_out(exit, PORT + 1) {
        ("the handler does not run".to_owned(), false)
    } else {
        (rig.describe(exit), false)
    };
    let verdict = if enabled { conforms(as_documented) } else { Verdict::Noted };
    Ok(Found::new(asked, said(&answer), measured, verdict))
}

/// Counts windows in memory while each is open for one instruction.
fn short_windows() -> &'static [u8] {
    guest_code!(
        "2: sti",
        "nop",
        "cli",
        "inc dword ptr [0x2000]",
        "cmp dword ptr [0x2000], 1000",
        "jne 2b",
        "out 0x80, al",
        "hlt",
    )
}

/// Counts loops in memory while the window is open.
fn long_window() -> &'static [u8] {
    guest_code!(
        "sti",
        "2: nop",
        "inc dword ptr [0x2000]",
        "cmp dword ptr [0x2000], 10000",
        "jne 2b",
        "out 0x80, al",
        "hlt",
    )
}

fn window(cx: &Context, name: &str, code: &[u8]) -> Result<Found, Error> {
    let asked = format!("request_interrupt_window; the guest: {name}");
    let mut rig = Rig::new(cx, code)?;
    rig.vcpu.request_window(true);
    let exit = rig.run()?;
    let said = rig.describe(exit);
    let passed = rig.read_u64(DATA)?;
    rig.complete()?;
    // The first chance is behind STI and the one instruction that its shadow covers.
    let (at, enabled) = (rig.vcpu.registers().rip.wrapping_sub(CODE), rig.vcpu.interrupts_enabled());
    let (measured, verdict) = match exit {
        Exit::WindowOpen if at < 2 || !enabled || !rig.vcpu.ready_for_injection() => {
            (format!("too soon: at +{at}, IF {}", u8::from(enabled)), Verdict::Differs)
        }
        Exit::WindowOpen if passed == 0 => ("at the first chance".to_owned(), Verdict::Conforms),
        Exit::WindowOpen => (format!("{passed} rounds late"), Verdict::Differs),
        _ => (format!("never, in {passed} rounds"), Verdict::Differs),
    };
    Ok(Found::new(asked, said, measured, verdict))
}

fn nmi(cx: &Context) -> Result<Found, Error> {
    let asked = "KVM_NMI three times";
    let mut rig = Rig::new(cx, guest_code!("out 0x80, al", "nop", "nop", "out 0x81, al", "hlt"))?;
    let exit = rig.run()?;
    if !rig.is_out(exit, PORT) {
        return Ok(Found::unreached(asked, rig.describe(exit)));
    }
    rig.complete()?;
    for _ in 0..3 {
        rig.vcpu.nmi()?;
    }
    let mut handled = 0;
    let end = loop {
        let exit = rig.run()?;
        if !rig.is_out(exit, u16::from(NMI)) || handled > 3 {
            break exit;
        }
        handled += 1;
    };
    let through = rig.is_out(end, PORT + 1);
    let measured = match through {
        true => format!("{handled} handled"),
        false => format!("{handled} handled, then {}", rig.describe(end)),
    };
    Ok(Found::new(asked, "ok", measured, conforms(through && handled == 2)))
}
