//! Getting in and out of KVM_RUN.

use std::time::Duration;

use super::{
    Check, Context,
    answer::{Found, Verdict, conforms},
    rig::{CODE, DATA, PORT, Rig, guest_code},
};
use crate::kvm::{
    Error, Exit, Operation,
    probe::{UserSyscall, user_syscall},
};

pub(super) const CHECKS: &[Check] = &[
    Check {
        id: "run-immediate-exit",
        rule: "with immediate_exit, KVM_RUN returns EINTR before it enters the guest (api.rst, kvm_run)",
        kernel: "kvm_arch_vcpu_ioctl_run (x86.c)",
        run: immediate_exit,
    },
    Check {
        id: "run-completes-access",
        rule: "KVM_RUN with immediate_exit completes the last exit's access (api.rst, KVM_RUN)",
        kernel: "kvm_arch_vcpu_ioctl_run, complete_fast_pio_in (x86.c)",
        run: completes,
    },
    Check {
        id: "run-signal",
        rule: "a signal ends KVM_RUN (api.rst, KVM_RUN: EINTR)",
        kernel: "vcpu_run, xfer_to_guest_mode_handle_work (x86.c)",
        run: signal,
    },
    Check {
        id: "run-hlt",
        rule: "HLT exits with KVM_EXIT_HLT if KVM has no LAPIC (api.rst, KVM_EXIT_HLT)",
        kernel: "kvm_emulate_halt (x86.c)",
        run: halt,
    },
    Check {
        id: "sync-regs-read",
        rule: "after an exit the shared page has the registers of KVM_GET_REGS and KVM_GET_SREGS (api.rst, KVM_CAP_SYNC_REGS)",
        kernel: "store_regs (x86.c)",
        run: sync_read,
    },
    Check {
        id: "sync-regs-write",
        rule: "registers marked dirty in the shared page are the guest's at the next entry (api.rst, KVM_CAP_SYNC_REGS)",
        kernel: "sync_regs (x86.c)",
        run: sync_write,
    },
    Check {
        id: "user-syscall",
        rule: "SYSCALL goes to IA32_LSTAR with CPL 0 (SDM vol. 2, \"SYSCALL\")",
        kernel: "none where the CPU executes it; em_syscall (emulate.c) where KVM does",
        run: syscall,
    },
];

fn immediate_exit(cx: &Context) -> Result<Found, Error> {
    let asked = "KVM_RUN with immediate_exit";
    let mut rig = Rig::new(cx, guest_code!("inc dword ptr [0x2000]", "out 0x80, al", "hlt"))?;
    rig.vcpu.fd.get_kvm_run().immediate_exit = 1;
    let exit = rig.vcpu.run(&mut rig.seen)?;
    let ran = rig.read_u64(DATA)? != 0;
    let said = if exit == Exit::Interrupted { "EINTR".to_owned() } else { rig.describe(exit) };
    let measured = if ran { "the guest ran" } else { "the guest did not run" };
    Ok(Found::new(asked, said, measured, conforms(exit == Exit::Interrupted && !ran)))
}

fn completes(cx: &Context) -> Result<Found, Error> {
    const INPUT: u64 = 0x5a;
    let asked = "KVM_RUN with immediate_exit after an exit for IN";
    let mut rig = Rig::new(cx, guest_code!("in al, 0x80", "out 0x81, al", "hlt"))?;
    rig.seen.answer = INPUT;
    let exit = rig.run()?;
    if exit != Exit::Operation(Operation::Port) {
        return Ok(Found::new(asked, rig.describe(exit), "the guest did not get to IN", Verdict::Failed));
    }
    rig.vcpu.fd.get_kvm_run().immediate_exit = 1;
    let exit = rig.vcpu.run(&mut rig.seen)?;
    let said = if exit == Exit::Interrupted { "EINTR".to_owned() } else { rig.describe(exit) };
    let regs = rig.vcpu.fd.get_regs().map_err(Error::call("KVM_GET_REGS"))?;
    let (al, behind) = (regs.rax & 0xff, regs.rip.wrapping_sub(CODE));
    let measured = format!("AL {al:#x} of {INPUT:#x}, RIP +{behind}");
    Ok(Found::new(asked, said, measured, conforms(exit == Exit::Interrupted && al == INPUT && behind == 2)))
}

fn signal(cx: &Context) -> Result<Found, Error> {
    let asked = "a signal while the guest loops";
    // With interrupts enabled: a guest that loops with them disabled makes Bochs 3.0 hang. The loop ends after seconds,
    // should KVM ignore the signal.
    let code = guest_code!(
        "sti",
        "mov rcx, 0x100000000",
        "2: inc dword ptr [0x2000]",
        "dec rcx",
        "jnz 2b",
        "out 0x80, al",
        "hlt"
    );
    let mut rig = Rig::new(cx, code)?;
    let mut exit = rig.run_for(Duration::from_millis(20))?;
    // On a busy host the signal may come before the entry. KVM_RUN then returns without entering the guest.
    for _ in 0..10 {
        if exit != Exit::Interrupted || rig.read_u64(DATA)? != 0 {
            break;
        }
        exit = rig.run_for(Duration::from_millis(20))?;
    }
    let (said, ended, verdict) = match exit {
        Exit::Interrupted if rig.read_u64(DATA)? == 0 => ("EINTR".to_owned(), "the guest did not run", Verdict::Failed),
        Exit::Interrupted => ("EINTR".to_owned(), "KVM_RUN ended", Verdict::Conforms),
        _ => (rig.describe(exit), "the guest ran to its end", Verdict::Differs),
    };
    Ok(Found::new(asked, said, ended, verdict))
}

fn halt(cx: &Context) -> Result<Found, Error> {
    let mut rig = Rig::new(cx, guest_code!("hlt", "nop", "hlt"))?;
    let exit = rig.run()?;
    let at = rig.vcpu.registers().rip.wrapping_sub(CODE);
    Ok(Found::new("HLT", rig.describe(exit), format!("RIP +{at}"), conforms(exit == Exit::Halt && at == 1)))
}

/// Exits with a pattern in RAX, then stores RAX and exits again.
fn rax_code() -> &'static [u8] {
    guest_code!("mov rax, 0x1234567", "out 0x80, al", "mov qword ptr [0x2000], rax", "out 0x81, al", "hlt")
}

fn sync_read(cx: &Context) -> Result<Found, Error> {
    let asked = "the registers after an exit, both ways";
    let mut rig = Rig::new(cx, rax_code())?;
    let exit = rig.run()?;
    let said = rig.describe(exit);
    rig.complete()?;
    let (regs, sregs) = {
        let shared = rig.vcpu.fd.sync_regs_mut();
        (shared.regs, shared.sregs)
    };
    let same_regs = regs == rig.vcpu.fd.get_regs().map_err(Error::call("KVM_GET_REGS"))?;
    let same_sregs = sregs == rig.vcpu.fd.get_sregs().map_err(Error::call("KVM_GET_SREGS"))?;
    let measured = match (same_regs, same_sregs) {
        (true, true) => "the same",
        (false, _) => "general registers differ",
        (true, false) => "system registers differ",
    };
    Ok(Found::new(asked, said, measured, conforms(same_regs && same_sregs)))
}

fn sync_write(cx: &Context) -> Result<Found, Error> {
    const VALUE: u64 = 0x0123_4567_89ab_cdef;
    let asked = "another RAX in the shared page, marked dirty";
    let mut rig = Rig::new(cx, rax_code())?;
    let exit = rig.run()?;
    if !rig.is_out(exit, PORT) {
        return Ok(Found::unreached(asked, rig.describe(exit)));
    }
    rig.complete()?;
    rig.vcpu.fd.sync_regs_mut().regs.rax = VALUE;
    rig.vcpu.fd.set_sync_dirty_reg(kvm_ioctls::SyncReg::Register);
    let exit = rig.run()?;
    let (said, stored) = (rig.describe(exit), rig.read_u64(DATA)?);
    let measured =
        if stored == VALUE { "the guest stored it".to_owned() } else { format!("the guest stored {stored:#x}") };
    Ok(Found::new(asked, said, measured, conforms(stored == VALUE)))
}

fn syscall(cx: &Context) -> Result<Found, Error> {
    let (measured, verdict) = match user_syscall(cx.host, cx.supported)? {
        UserSyscall::Works => ("at IA32_LSTAR, CPL 0", Verdict::Conforms),
        UserSyscall::Faults => ("at IA32_LSTAR with CPL 3, which gets a page fault", Verdict::Differs),
        UserSyscall::Other => ("neither at IA32_LSTAR nor in the page-fault handler", Verdict::Differs),
    };
    Ok(Found::new("SYSCALL in user mode", "nothing", measured, verdict))
}
