//! Guests that execute instructions which some hosts' KVM cannot emulate in supervisor code, run in several ways.

use std::fs;

use crate::{
    Lab,
    long_mode::{Body, Register::Rsi, WRITABLE},
    skip_part,
};

/// `CMPXCHG16B [RSI]`.
pub const CMPXCHG16B: [u8; 4] = [0x48, 0x0f, 0xc7, 0x0e];

/// How a guest can be run, and whether an interrupt waits. In virtual time that makes the VMM single-step.
pub const MODES: [(&str, bool); 4] =
    [("", false), ("--time virtual", false), ("--lapic kvm", false), ("--time virtual --x2apic on", true)];

/// Sends this CPU a vector through its x2APIC, which waits because interrupts are off.
fn interrupt_waits(body: &mut Body) {
    // mov ecx, 0x1b; rdmsr; or eax, 0xc00; wrmsr: x2APIC mode.
    body.code(&[0xb9, 0x1b, 0, 0, 0, 0x0f, 0x32, 0x0d, 0, 0x0c, 0, 0, 0x0f, 0x30]);
    // xor edx, edx; mov ecx, 0x80f; mov eax, 0x1ff; wrmsr: enabled. mov ecx, 0x83f; mov eax, 0x40; wrmsr: self IPI.
    body.code(&[0x31, 0xd2, 0xb9, 0x0f, 8, 0, 0, 0xb8, 0xff, 1, 0, 0, 0x0f, 0x30]);
    body.code(&[0xb9, 0x3f, 8, 0, 0, 0xb8, 0x40, 0, 0, 0, 0x0f, 0x30]);
}

/// Whether the host's CPU has a feature, by its name in /proc/cpuinfo.
///
/// # Panics
/// If that cannot be read.
#[must_use]
pub fn cpu_has(feature: &str) -> bool {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap();
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    flags.split_whitespace().any(|flag| flag == feature)
}

/// Runs the guest that `build` makes in each of `modes`. Of the first of `kinds`, which it executes `count` times, the
/// VMM must have performed no more, and nothing that is not of `kinds`. (It can be fewer: KVM may find a fault before
/// it finds that it cannot go on.)
///
/// # Panics
/// If the guest fails, or the summary says otherwise.
#[track_caller]
pub fn passes(modes: &[(&str, bool)], kinds: &[&str], count: u64, build: impl Fn(&mut Body)) {
    for (flags, waits) in modes {
        let (lab, mut body) = (Lab::new(), Body::default());
        if *waits {
            interrupt_waits(&mut body);
        }
        build(&mut body);
        fs::write(lab.path("image"), body.image()).unwrap();
        let ended = lab.run(&format!("--guest image --timeout 120s --summary summary {flags}"));
        if ended.code() == 3 {
            skip_part!("{flags:?} is not to be had here");
            continue;
        }
        let failed = ended.stderr.split("failed with code ").nth(1).and_then(|rest| rest.lines().next());
        let failed = failed.and_then(|number| number.trim().parse().ok());
        assert!(ended.code() == 0, "{flags:?}: {}\n{ended:#?}", failed.map_or("?", |number| body.about(number)));
        let summary: serde_json::Value =
            serde_json::from_str(&fs::read_to_string(lab.path("summary")).unwrap()).unwrap();
        let performed = summary["assists"].as_object().expect("counts by kind");
        assert!(performed.keys().all(|name| kinds.contains(&name.as_str())), "{flags:?}: {performed:?}");
        let performed = performed.get(kinds[0]).map_or(0, |count| count.as_u64().unwrap());
        assert!(performed <= count, "{flags:?}: {performed} of {count}");
    }
}

/// Whether the VMM performs instructions here. Where the CPU executes all of them, it decides about faults, and
/// emulated CPUs differ in that from what the SDM says.
///
/// # Panics
/// If the guest fails.
#[must_use]
pub fn vmm_performs() -> bool {
    let (lab, mut body) = (Lab::new(), Body::default());
    body.set(Rsi, WRITABLE + 0x10).code(&CMPXCHG16B);
    fs::write(lab.path("image"), body.image()).unwrap();
    lab.run("--guest image --timeout 120s --summary summary").expect(0);
    let summary: serde_json::Value = serde_json::from_str(&fs::read_to_string(lab.path("summary")).unwrap()).unwrap();
    summary["assists"].as_object().is_some_and(|kinds| !kinds.is_empty())
}
