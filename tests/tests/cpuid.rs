//! `--cpuid`: what is taken away is away, for the guest's kernel and in snapshots; what cannot be is refused.

use std::fs;

use vm_tests::{
    Lab,
    long_mode::{
        Body,
        Register::{Rax, Rcx, Rdx},
    },
    require_kvm,
};

/// Where a feature is: leaf, an instruction that moves its register to EDX, and its bit.
type Feature = (u64, [u8; 2], u32);
const INVTSC: Feature = (0x8000_0007, [0x89, 0xd2], 1 << 8);
const STABLE: Feature = (0x4000_0001, [0x89, 0xc2], 1 << 24);
const SMAP: Feature = (7, [0x89, 0xda], 1 << 20);

/// A guest that fails unless it sees these features, or does not.
fn guest(lab: &Lab, features: &[(Feature, bool)]) {
    let mut body = Body::default();
    for ((leaf, to_edx, bit), wanted) in features {
        body.set(Rax, *leaf).set(Rcx, 0).code(&[0x0f, 0xa2]).code(to_edx);
        // and edx, bit.
        body.code(&[0x81, 0xe2]).code(&bit.to_le_bytes());
        body.expect(Rdx, if *wanted { u64::from(*bit) } else { 0 }, "CPUID");
        // in al, 0x80: time passes.
        body.code(&[0xe4, 0x80, 0xe4, 0x80]);
    }
    fs::write(lab.path("image"), body.image()).unwrap();
}

// Catches: a flag that changes nothing, or another bit; a restored guest with the host's CPUID.
#[test]
fn a_feature_that_is_taken_away_is_away_also_after_a_restore() {
    require_kvm!();
    for lapic in ["user", "kvm"] {
        let lab = Lab::new();
        let run = |flags: &str| lab.run(&format!("--guest image --timeout 60s --lapic {lapic} {flags}"));
        guest(&lab, &[(INVTSC, true)]);
        if run("").code() == 3 {
            continue;
        }
        run("").expect(0);
        guest(&lab, &[(INVTSC, false), (STABLE, false)]);
        run("").expect(1);
        run("--cpuid -invtsc,-kvmclock-stable-bit").expect(0);
    }
    let lab = Lab::new();
    // The second feature is looked at after the save.
    guest(&lab, &[(INVTSC, false), (STABLE, false)]);
    lab.run("--guest image --time virtual --cpuid -invtsc,-kvmclock-stable-bit --save-at 2us --save-to snap").expect(0);
    lab.run("restore snap").expect(0);
}

// Catches: a feature that the guest finds although it was taken away; a refusal that does not name it.
#[test]
fn a_feature_is_away_or_the_run_is_refused() {
    require_kvm!();
    let lab = Lab::new();
    guest(&lab, &[(SMAP, false)]);
    let ended = lab.run("--guest image --timeout 60s --cpuid -smap");
    match ended.code() {
        0 => {}
        _ => ended.refused(3, &["--cpuid", "cannot hide smap", "clearcpuid"]),
    }
}

// Catches: a feature that is insisted on and missed in silence; an exit code that blames the wrong one.
#[test]
fn what_cannot_be_is_refused() {
    require_kvm!();
    let lab = Lab::new();
    guest(&lab, &[]);
    let run = |change: &str| lab.run(&format!("--guest image --timeout 60s --cpuid {change}"));
    run("+invtsc").expect(0);
    // No x86-64 CPU has it.
    run("+ia64").refused(3, &["--cpuid +ia64", "does not offer"]);
    run("-x2apic").refused(2, &["x2apic", "--x2apic"]);
    run("-smaq").refused(2, &["smaq", "/proc/cpuinfo"]);
    run("smap").refused(2, &["smap", "-smap"]);
    run("-avx,+avx2").refused(2, &["+avx2 contradicts -avx"]);
}
