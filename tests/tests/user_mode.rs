//! User code: SYSCALL and SYSRET, and page faults beside them. Where KVM stays in user mode at SYSCALL the VMM performs
//! it; the guest must not see a difference.

use std::fs;

use vm_tests::{
    Lab, doctor,
    long_mode::{
        ABSENT, Body,
        Register::{Cr2, ErrorCode, Flags, FrameRip, Rcx, Rdi, Rdx, Rsi, SavedFlags, UserRsp, Vector},
        USER_CODE,
    },
    raw, require_kvm, skip_part,
};

/// CF, PF, AF, ZF, SF, OF.
const ARITHMETIC: u32 = 0x8d5;
/// The flags that the guest's SYSCALL clears: CF, PF, ZF; IF; DF.
const MASK: u32 = 0x645;
/// How many SYSCALLs the loop makes.
const LOOPS: u32 = 50;
/// What the last SYSCALL and two others are for, in EBX.
const LOAD_FAULTED: u8 = 1;
const JUMP_FAULTED: u8 = 2;
const END: u8 = 3;

/// How the guests are run, and whether an interrupt waits all the time, which makes the VMM single-step.
const MODES: [(&str, bool); 5] = [
    ("", false),
    ("--time virtual", false),
    ("--x2apic on", true),
    ("--time virtual --x2apic on", true),
    ("--lapic kvm", false),
];

/// Sends this CPU a vector through its x2APIC, whose priority is below the task's.
fn interrupt_waits(body: &mut Body) {
    let wrmsr = |index: u16, value: u16| {
        let [a, b, c, d] = [index.to_le_bytes(), value.to_le_bytes()].concat().try_into().unwrap();
        // xor edx, edx; mov ecx, index; mov eax, value; wrmsr.
        vec![0x31, 0xd2, 0xb9, a, b, 0, 0, 0xb8, c, d, 0, 0, 0x0f, 0x30]
    };
    // mov ecx, 0x1b; rdmsr; or eax, 0xc00; wrmsr: x2APIC mode.
    body.code(&[0xb9, 0x1b, 0, 0, 0, 0x0f, 0x32, 0x0d, 0, 0x0c, 0, 0, 0x0f, 0x30]);
    // Enabled; task priority; self IPI.
    body.code(&[wrmsr(0x80f, 0x1ff), wrmsr(0x808, 0x50), wrmsr(0x83f, 0x40)].concat());
}

/// A guest whose user code makes SYSCALLs in a loop, then a load that faults, then a jump to where SYSCALLs come in.
/// If the CPU performs SYSCALL (not `by_vmm`), only the flags that are to be clear are looked at: QEMU's emulated CPUs
/// clear all arithmetic flags.
fn guest(body: &mut Body, by_vmm: bool) -> u64 {
    let mut user = Vec::new();
    // mov edi, LOOPS; xor ebx, ebx; again: push flags; popfq; syscall; dec edi; jnz again.
    user.extend([&[0xbf][..], &LOOPS.to_le_bytes(), &[0x31, 0xdb]].concat());
    let body_of_loop = [&[0x68][..], &(ARITHMETIC | 2).to_le_bytes(), &[0x9d, 0x0f, 0x05, 0xff, 0xcf]].concat();
    let back = u8::try_from(256 - body_of_loop.len() - 2).unwrap();
    let behind_syscall = USER_CODE + user.len() as u64 + 8;
    user.extend([&body_of_loop[..], &[0x75, back]].concat());
    // xor r15d, r15d; lea r11, [rip + 8]; the handler goes on there. mov eax, [ABSENT]; nop.
    user.extend([0x45, 0x31, 0xff, 0x4c, 0x8d, 0x1d, 8, 0, 0, 0]);
    let load = USER_CODE + user.len() as u64;
    user.extend([&[0x8b, 0x04, 0x25][..], &u32::try_from(ABSENT).unwrap().to_le_bytes(), &[0x90]].concat());
    // mov ebx, LOAD_FAULTED; syscall.
    user.extend([0xbb, LOAD_FAULTED, 0, 0, 0, 0x0f, 0x05]);
    // The kernel has left its entry in RDX. xor r15d, r15d; lea r11, [rip + 2]; jmp rdx.
    // RCX is still the last SYSCALL's.
    user.extend([0x45, 0x31, 0xff, 0x4c, 0x8d, 0x1d, 2, 0, 0, 0, 0xff, 0xe2]);
    user.extend([0xbb, JUMP_FAULTED, 0, 0, 0, 0x0f, 0x05, 0xbb, END, 0, 0, 0, 0x0f, 0x05, 0xeb, 0xfe]);

    body.set(Rsi, 0).set(Rdi, 0).enter_user(MASK, &user);
    let entry = u64::from(body.entry());
    // inc rsi.
    let looked_at = if by_vmm { ARITHMETIC | MASK } else { MASK };
    body.keep_flags(u64::from(looked_at)).code(&[0x48, 0xff, 0xc6]).expect_kernel("segments after SYSCALL");
    // in al, 0x80: an operation.
    body.expect(UserRsp, 0x60_6000, "stack after SYSCALL").code(&[0xe4, 0x80]);
    body.when(0, |body| {
        body.expect(Flags, u64::from(ARITHMETIC & looked_at & !MASK), "flags after SYSCALL");
        body.expect(Rcx, behind_syscall, "return address");
        // mov rdx, r11; and r11d, ARITHMETIC and TF.
        body.code(&[0x4c, 0x89, 0xda, 0x41, 0x81, 0xe3]).code(&(ARITHMETIC | 0x100).to_le_bytes());
        body.expect(SavedFlags, u64::from(ARITHMETIC), "saved flags");
        // mov r11, rdx.
        body.code(&[0x49, 0x89, 0xd3]);
    });
    body.when(LOAD_FAULTED, |body| {
        body.expect(Vector, 14, "load").expect(ErrorCode, 4, "load").expect(Cr2, ABSENT, "load");
        body.expect(FrameRip, load, "load").set(Rdx, entry);
    });
    body.when(JUMP_FAULTED, |body| {
        // Without NX and SMEP no fetch is marked as one.
        body.expect(Vector, 14, "jump").expect(ErrorCode, 5, "jump").expect(Cr2, entry, "jump");
        body.expect(FrameRip, entry, "jump");
    });
    body.when(END, |body| {
        body.expect(Rsi, u64::from(LOOPS) + 3, "number of SYSCALLs").code(&raw::SUCCESS);
    });
    body.return_to_user();
    u64::from(LOOPS) + 3
}

/// Runs `vmm` with these flags; none if the host has no such mode. Returns what the summary counted.
fn run(lab: &Lab, flags: &str, body: &Body) -> Option<u64> {
    let ended = lab.run(&format!("{flags} --timeout 120s --summary summary"));
    if ended.code() == 3 {
        skip_part!("{flags:?} is not to be had here");
        return None;
    }
    let failed = ended.stderr.split("failed with code ").nth(1).and_then(|rest| rest.lines().next());
    let failed = failed.and_then(|number| number.trim().parse().ok());
    assert!(ended.code() == 0, "{flags:?}: {}\n{ended:#?}", failed.map_or("?", |number| body.about(number)));
    let summary: serde_json::Value = serde_json::from_str(&fs::read_to_string(lab.path("summary")).unwrap()).unwrap();
    let assists = summary["assists"].as_object().expect("counts by kind");
    assert!(assists.keys().all(|name| name == "syscall"), "{flags:?}: {assists:?}");
    Some(assists.get("syscall").map_or(0, |count| count.as_u64().unwrap()))
}

/// Where the guest is in this lab, its code, and how many SYSCALLs the VMM is to perform.
fn made(lab: &Lab, waits: bool) -> (Body, u64) {
    let mut body = Body::default();
    if waits {
        interrupt_waits(&mut body);
    }
    let by_vmm = doctor()["user_syscall"] == "faults";
    let calls = guest(&mut body, by_vmm);
    fs::write(lab.path("image"), body.image()).unwrap();
    // All of them, or none where KVM performs them.
    (body, if by_vmm { calls } else { 0 })
}

// Catches: user mode in the kernel's entry; segments, flags, stack pointer or return address that are not SYSCALL's; a
// page fault of user code taken for a SYSCALL, also at the kernel's entry; a handler that never gets past the VMM's
// breakpoint; a trap flag of the VMM's in R11.
#[test]
fn user_code_makes_system_calls_and_page_faults() {
    require_kvm!();
    for (flags, waits) in MODES {
        let lab = Lab::new();
        let (body, calls) = made(&lab, waits);
        let performed = run(&lab, &format!("--guest image {flags}"), &body);
        assert!(performed.is_none_or(|performed| performed == calls), "{flags:?}: {performed:?} of {calls}");
    }
}

// Catches: a snapshot between a SYSCALL's page fault and what the VMM makes of it; a restored vCPU without the
// breakpoint; virtual time that depends on SYSCALLs.
#[test]
fn a_guest_with_user_code_is_saved_and_restored() {
    require_kvm!();
    let lab = Lab::new();
    let (body, calls) = made(&lab, false);
    run(&lab, "--guest image --time virtual --trace whole", &body);
    for at in ["21us", "22us", "40us"] {
        let save = format!("--guest image --time virtual --save-at {at} --save-to snap{at} --trace save");
        let before = run(&lab, &save, &body).unwrap();
        let after = run(&lab, &format!("restore snap{at}"), &body).unwrap();
        assert_eq!(before + after, calls, "{at}: {before} and {after}");
        assert!(calls == 0 || before.min(after) > 0, "{at}: {before} and {after}");
        let [whole, saved] = ["whole", "save"].map(|name| fs::read_to_string(lab.path(name)).unwrap());
        let inputs =
            |trace: &str| trace.lines().filter(|line| line.contains("port")).map(str::to_owned).collect::<Vec<_>>();
        let (whole, saved) = (inputs(&whole), inputs(&saved));
        assert!(saved.len() > 10 && whole.starts_with(&saved), "{at}: {saved:?} {whole:?}");
    }
}
