//! Snapshots that were saved once, and kept: a build that reads their versions reads them as the build that wrote them
//! did.
//!
//! Each folder of tests/data/golden-snapshots has `whole`, a snapshot of two CPUs amid their ticks, in virtual time,
//! and `changes`, a snapshot based on it, of the same VM after a migration; and of each what a restore then traces,
//! `whole.jsonl` and `changes.jsonl`: each restore, interrupt, tick and end, with its instants. Folders are numbered. A
//! build restores those whose versions it writes, and refuses the others; a change that raises a version needs a new
//! one (CONTRIBUTING.md says how).
//!
//! They hold nothing that is the host's, so that any host can restore them: no CPU features but those that every x86-64
//! CPU has, no MSRs but those that each has, no XSAVE, the LAPIC behind its page of memory, because x2APIC's MSRs do
//! not exit everywhere.

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
};

use serde_json::Value;
use vm_tests::{
    Lab, require_kvm, start,
    state_file::{change_sections, versions},
};

const DATA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/data/golden-snapshots");

/// Each golden snapshot, by rising number.
fn golden() -> Vec<(u32, PathBuf)> {
    let number = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().parse().expect("a number");
    let mut all: Vec<_> =
        fs::read_dir(DATA).unwrap().map(|entry| entry.unwrap().path()).map(|path| (number(&path), path)).collect();
    all.sort();
    all
}

/// What is kept of a trace.
fn kept(trace: &[u8]) -> String {
    let events = ["restore", "inject", "tick", "end"].map(|event| format!("\"event\":\"{event}\""));
    let lines = std::str::from_utf8(trace).unwrap().lines();
    lines.filter(|line| events.iter().any(|event| line.contains(event))).map(|line| format!("{line}\n")).collect()
}

/// Saves `whole` in virtual time, as every golden snapshot was.
fn save(lab: &Lab) {
    let flags = "--time virtual --tsc-khz 2600000 --memory 4M --cpus 2 --seed 5 --x2apic off";
    let cmdline = "scenario=smp clockevent=kvm-tsc-deadline hz=100 count=12";
    let run = lab.boot(cmdline, &format!("{flags} --save-at 65ms --save-to whole"));
    assert_eq!(run.summary.word("finish"), "saved");
}

/// Saves `changes`, in which the same virtual machine has migrated: its kvmclock pages have changed. No CPU has run.
fn save_changes(lab: &Lab) {
    let flags = "--paused --track-dirty --api-sock s";
    let mut vm = start(&mut lab.vmm(&format!("restore whole {flags}")));
    while lab.run("ctl --api-sock s status").code() != 0 {
        assert!(!vm.has_ended(), "the VM ended: {:#?}", vm.finish());
    }
    let _ = lab.run("ctl --api-sock s migrate --tsc-khz 3900000").expect(0);
    let _ = lab.run("ctl --api-sock s snapshot changes --base whole").expect(0);
    let _ = lab.run("ctl --api-sock s quit").expect(0);
    let _ = vm.finish().expect(0);
}

/// The versions of format and sections that this build writes.
fn current() -> (u32, BTreeMap<String, u32>) {
    let lab = Lab::new();
    save(&lab);
    save_changes(&lab);
    versions(&lab.path("changes/state"))
}

// Catches: a section that is read otherwise than it was written, under the same version; a version that was raised and
// has no golden snapshot; a snapshot of another version that is not refused, or not by its name.
#[test]
fn golden_snapshots_go_on_as_they_did() {
    require_kvm!();
    let (format, sections) = current();
    let mut restored = Vec::new();
    for (number, path) in golden() {
        let lab = Lab::new();
        let (its_format, its_sections) = versions(&path.join("changes/state"));
        // Where this build writes no section `host`, because the host does not tell who it is, the snapshot may have
        // one.
        let same =
            its_format == format && sections.iter().all(|(name, version)| its_sections.get(name) == Some(version));
        if !same {
            lab.run(&format!("restore {}", path.join("changes").display())).refused(2, &["version"]);
            continue;
        }
        for snapshot in ["whole", "changes"] {
            let expected = fs::read_to_string(path.join(snapshot).with_extension("jsonl")).unwrap();
            for host in ["", "--emulate-host no-xsave", "--emulate-host swallow-deadline"] {
                let run = lab.restore(path.join(snapshot).to_str().unwrap(), host);
                assert_eq!(kept(&run.trace().bytes), expected, "golden snapshot {number}, {snapshot} {host}");
            }
        }
        restored.push(number);
    }
    assert_eq!(
        restored.len(),
        1,
        "golden snapshots of format {format}, {sections:?}: CONTRIBUTING.md says how to add one"
    );
}

/// Keeps the bits in `mask` of a register in each leaf `function`.
fn mask(leaves: &mut Value, function: u64, register: &str, mask: u64) {
    for leaf in leaves.as_array_mut().unwrap().iter_mut().filter(|leaf| leaf["function"] == function) {
        leaf[register] = (leaf[register].as_u64().unwrap() & mask).into();
    }
}

/// Takes away what is this host's.
fn make_portable(state: &Path) {
    change_sections(state, |name, mut payload| {
        match name {
            "machine" => payload["image"] = "guest.bin".into(),
            // Of no boot of any host.
            "host" => {
                payload["host"] = serde_json::json!({"boot": "00000000-0000-0000-0000-000000000000", "kvm": [0, 0, 0]});
                payload["facts"] = Value::Null;
                payload["features"] = Value::Array(Vec::new());
            }
            "cpus" => {
                for cpu in payload["user"].as_array_mut().unwrap() {
                    let leaves = &mut cpu["cpuid"];
                    // TSC-deadline, hypervisor.
                    mask(leaves, 1, "ecx", 1 << 24 | 1 << 31);
                    // What 64-bit mode needs: FPU, PSE, TSC, MSR, PAE, CX8, APIC, SEP, PGE, CMOV, PAT, MMX, FXSR, SSE,
                    // SSE2. Emulated hosts lack some of the others.
                    mask(leaves, 1, "edx", 0x0781_ab79);
                    for function in [7, 0xd] {
                        ["eax", "ebx", "ecx", "edx"].iter().for_each(|register| mask(leaves, function, register, 0));
                    }
                    // SYSCALL, NX, long mode.
                    mask(leaves, 0x8000_0001, "ecx", 0);
                    mask(leaves, 0x8000_0001, "edx", 1 << 11 | 1 << 20 | 1 << 29);
                    mask(leaves, 0x8000_0008, "ebx", 0);
                    let fpu = &mut cpu["kvm"]["fpu"];
                    fpu["xcrs"] = Value::Array(Vec::new());
                    // Behind the registers, the kernel says in the area which features its host has.
                    let legacy = fpu["xsave"].as_str().unwrap().get(..2 * 464).unwrap().trim_end_matches("00");
                    fpu["xsave"] = legacy.into();
                    // SYSENTER's, the PAT, SYSCALL's, IA32_KERNEL_GS_BASE.
                    let everywhere = |msr: &Value| {
                        matches!(
                            msr["index"].as_u64(),
                            Some(0x174..=0x176 | 0x277 | 0xc000_0081..=0xc000_0084 | 0xc000_0102)
                        )
                    };
                    cpu["kvm"]["msrs"].as_array_mut().unwrap().retain(everywhere);
                }
            }
            _ => {}
        }
        Some(payload)
    });
}

/// No test: saves a snapshot that every host can restore into the folder that VM_TESTS_SNAPSHOT names, for
/// scripts/across-hosts.
#[test]
#[ignore = "saves a snapshot for scripts/across-hosts"]
fn save_a_portable_snapshot() {
    require_kvm!();
    let to = PathBuf::from(env::var_os("VM_TESTS_SNAPSHOT").expect("VM_TESTS_SNAPSHOT names a folder"));
    let lab = Lab::new();
    save(&lab);
    make_portable(&lab.path("whole/state"));
    copy(&lab.path("whole"), &to);
}

fn copy(snapshot: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for file in ["state", "memory"] {
        fs::copy(snapshot.join(file), to.join(file)).unwrap();
    }
}

/// No test: adds a golden snapshot of the versions that this build writes.
#[test]
#[ignore = "writes to tests/data"]
fn add_a_golden_snapshot() {
    require_kvm!();
    let all = golden();
    let current = current();
    assert!(all.iter().all(|(_, path)| versions(&path.join("changes/state")) != current), "there is one: {current:?}");
    let lab = Lab::new();
    save(&lab);
    make_portable(&lab.path("whole/state"));
    save_changes(&lab);
    make_portable(&lab.path("changes/state"));
    let number = all.last().map_or(1, |(number, _)| number + 1);
    let folder = PathBuf::from(DATA).join(number.to_string());
    for snapshot in ["whole", "changes"] {
        copy(&lab.path(snapshot), &folder.join(snapshot));
    }
    for snapshot in ["whole", "changes"] {
        let run = lab.restore(snapshot, "");
        run.in_order(u64::try_from(run.trace().all("tick").count()).unwrap());
        fs::write(folder.join(snapshot).with_extension("jsonl"), kept(&run.trace().bytes)).unwrap();
    }
    println!("{} is new", folder.display());
}
