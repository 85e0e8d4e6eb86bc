//! Which of the guest's MSR accesses exit to the VMM.

use guest_abi::{
    lapic::{self, x2apic_msr},
    msr::{IA32_TSC, IA32_TSC_DEADLINE},
};

use super::{
    Check, Context,
    answer::{Found, Verdict, conforms, said},
    rig::{DATA, GP, PORT, Rig, guest_code},
};
use crate::kvm::{Error, Exit, Lapics, Operation};

pub(super) const CHECKS: &[Check] = &[
    Check {
        id: "msr-filter-read",
        rule: "RDMSR of an MSR that the filter denies exits with reason FILTER (api.rst, KVM_X86_SET_MSR_FILTER)",
        kernel: "kvm_msr_allowed, kvm_msr_user_space (x86.c)",
        run: |cx| access(cx, USER, IA32_TSC, false, &["FILTER"]),
    },
    Check {
        id: "msr-filter-write",
        rule: "WRMSR of an MSR that the filter denies exits with reason FILTER (api.rst, KVM_X86_SET_MSR_FILTER)",
        kernel: "kvm_msr_allowed, kvm_msr_user_space (x86.c)",
        run: |cx| access(cx, USER, IA32_TSC, true, &["FILTER"]),
    },
    Check {
        id: "msr-filter-fault",
        rule: "the VMM's `error` of 1 injects #GP into the guest (api.rst, KVM_EXIT_X86_RDMSR)",
        kernel: "complete_emulated_msr_access (x86.c)",
        run: fault,
    },
    Check {
        id: "msr-unknown",
        rule: "RDMSR of an MSR that KVM does not know exits with reason UNKNOWN (api.rst, KVM_CAP_X86_USER_SPACE_MSR)",
        kernel: "kvm_msr_reason, kvm_msr_user_space (x86.c)",
        // In no vendor's ranges.
        run: |cx| access(cx, USER, 0x4000_dead, false, &["UNKNOWN", "INVAL"]),
    },
    Check {
        id: "msr-deadline",
        rule: "WRMSR IA32_TSC_DEADLINE that the filter denies exits with reason FILTER (api.rst, KVM_X86_SET_MSR_FILTER)",
        kernel: "swallowed: handle_fastpath_wrmsr (x86.c, from 6.18), handle_fastpath_set_msr_irqoff (x86.c, before)",
        run: |cx| access(cx, USER, IA32_TSC_DEADLINE, true, &["FILTER", "INVAL"]),
    },
    Check {
        id: "msr-deadline-mwait",
        rule: "the same with MWAIT exits disabled, which keeps KVM from emulating the timer with the preemption timer",
        kernel: "kvm_can_post_timer_interrupt (lapic.c), handle_fastpath_set_msr_irqoff (x86.c)",
        run: |cx| access(cx, Lapics::UserSpace { mwait_in_guest: true }, IA32_TSC_DEADLINE, true, &["FILTER", "INVAL"]),
    },
    Check {
        id: "msr-x2apic-read",
        rule: "none: KVM does not support x2APIC that user space emulates (api.rst, KVM_GET_SUPPORTED_CPUID)",
        kernel: "kvm_x2apic_msr_read (lapic.c)",
        run: |cx| noted(access(cx, USER, x2apic_msr(lapic::ID), false, &["INVAL"])),
    },
    Check {
        id: "msr-x2apic-write",
        rule: "none: KVM does not support x2APIC that user space emulates (api.rst, KVM_GET_SUPPORTED_CPUID)",
        kernel: "kvm_x2apic_msr_write (lapic.c); self-IPI and ICR: handle_fastpath_wrmsr (x86.c)",
        run: |cx| noted(access(cx, USER, x2apic_msr(lapic::TPR), true, &["INVAL"])),
    },
];

const USER: Lapics = Lapics::UserSpace { mwait_in_guest: false };

/// RDMSR, exit; WRMSR of 1, exit.
fn read_code() -> &'static [u8] {
    guest_code!("mov ecx, dword ptr [0x2000]", "rdmsr", "out 0x80, al", "hlt")
}

fn write_code() -> &'static [u8] {
    guest_code!("mov ecx, dword ptr [0x2000]", "mov eax, 1", "xor edx, edx", "wrmsr", "out 0x80, al", "hlt",)
}

/// The guest accesses MSR `index`, which must exit with one of the `reasons`.
fn access(cx: &Context, lapics: Lapics, index: u32, write: bool, reasons: &[&str]) -> Result<Found, Error> {
    let (name, code) = if write { ("WRMSR", write_code()) } else { ("RDMSR", read_code()) };
    let without = if lapics == USER { "" } else { ", MWAIT exits disabled" };
    let asked = format!("{name} {index:#x}{without}");
    let mut rig = match Rig::with(cx, lapics, code) {
        // Disabling MWAIT exits is a capability of its own.
        refused @ Err(_) if lapics != USER => return Ok(Found::not_offered(asked, said(&refused))),
        made => made?,
    };
    rig.write(DATA, &index.to_le_bytes())?;
    let exit = rig.run()?;
    let seen = rig.describe(exit);
    if exit == Exit::Operation(Operation::Msr) && rig.seen.msr == Some(index) {
        let expected = reasons.contains(&rig.msr_reason());
        return Ok(Found::new(asked, seen, "an exit, before the access", conforms(expected)));
    }
    let measured = if rig.is_out(exit, PORT) {
        "no exit: KVM swallowed the access, and the guest runs on"
    } else if rig.is_out(exit, u16::from(GP)) {
        "no exit: KVM raised #GP in the guest"
    } else {
        "no exit for the access"
    };
    Ok(Found::new(asked, seen, measured, Verdict::Differs))
}

/// What the rules leave open is noted, whatever it is.
fn noted(found: Result<Found, Error>) -> Result<Found, Error> {
    found.map(|found| Found { verdict: Verdict::Noted, ..found })
}

fn fault(cx: &Context) -> Result<Found, Error> {
    let asked = "RDMSR of a denied MSR, answered with error = 1";
    let mut rig = Rig::new(cx, read_code())?;
    rig.write(DATA, &IA32_TSC.to_le_bytes())?;
    rig.seen.fault = true;
    let exit = rig.run()?;
    let said = rig.describe(exit);
    let exit = rig.run()?;
    let raised = rig.is_out(exit, u16::from(GP));
    let measured = if raised { "the guest's #GP handler runs".to_owned() } else { rig.describe(exit) };
    Ok(Found::new(asked, said, measured, conforms(raised)))
}
