//! A snapshot's host fingerprint: it is used on the same boot of the same host, and only there.

use std::{fs, path::Path};

use serde_json::{Value, json};
use vm_tests::{Lab, require_kvm, state_file::change_sections};

/// CPUID.1:ECX bit 16, which is reserved: no host has it.
const RESERVED_FEATURE: u64 = 1 << 16;

/// A snapshot of a guest with most of its ticks to come.
fn saved(lab: &Lab) {
    let run = lab.boot("count=20", "--time virtual --tsc-khz 2600000 --save-at 50ms --save-to snapshot");
    assert_eq!(run.summary.word("finish"), "saved");
}

/// Adds that bit to leaf 1 of `leaves`.
fn add_reserved_feature(leaves: &mut Value) {
    let leaves = leaves.as_array_mut().expect("leaves");
    let leaf = leaves.iter_mut().find(|leaf| leaf["function"] == 1).expect("leaf 1");
    leaf["ecx"] = json!(leaf["ecx"].as_u64().unwrap() | RESERVED_FEATURE);
}

/// Changes the snapshot's `state` as if its guest had seen that bit.
fn guest_saw_reserved_feature(state: &Path) {
    change_sections(state, |name, mut payload| {
        if name == "cpus" {
            add_reserved_feature(&mut payload["user"][0]["cpuid"]);
        }
        Some(payload)
    });
}

const REASON: [&str; 2] = ["this host lacks CPU features that the guest saw", "CPUID.1:ECX[16]"];

// Catches: a feature check that is skipped on the same boot, or on a host without an identity.
#[test]
fn features_are_compared_on_every_host() {
    require_kvm!();
    let lab = Lab::new();
    saved(&lab);
    let state = lab.path("snapshot/state");
    guest_saw_reserved_feature(&state);
    // On the boot that it was saved on.
    lab.run("restore snapshot").refused(3, &REASON);
    // A snapshot without a fingerprint, as a host without an identity makes it.
    change_sections(&state, |name, payload| (name != "host").then_some(payload));
    lab.run("restore snapshot").refused(3, &REASON);
}

// Catches: a fingerprint that is never used.
#[test]
fn on_the_same_boot_the_fingerprint_is_used() {
    require_kvm!();
    let lab = Lab::new();
    saved(&lab);
    let state = lab.path("snapshot/state");
    guest_saw_reserved_feature(&state);
    change_sections(&state, |name, mut payload| {
        if name == "host" {
            add_reserved_feature(&mut payload["features"]);
        }
        Some(payload)
    });
    lab.restore("snapshot", "").in_order(16);
}

// Catches: an emulated peculiarity that is saved as one of the host's.
#[test]
fn an_emulated_hosts_facts_are_not_saved() {
    require_kvm!();
    let lab = Lab::new();
    let flags = "--time virtual --tsc-khz 2600000 --save-at 50ms --save-to snapshot --emulate-host swallow-deadline";
    let _ = lab.boot("count=20", flags);
    let mut fingerprints = 0;
    change_sections(&lab.path("snapshot/state"), |name, payload| {
        if name == "host" {
            fingerprints += 1;
            assert_eq!(payload["facts"], Value::Null, "{payload:#}");
        }
        Some(payload)
    });
    assert_eq!(fingerprints, 1);
}

// Catches: features of another boot or of another KVM that are used for this one.
#[test]
fn the_fingerprint_of_another_host_is_not_used() {
    require_kvm!();
    let lab = Lab::new();
    saved(&lab);
    let state = lab.path("snapshot/state");
    let original = fs::read(&state).unwrap();
    type Change = fn(&mut Value);
    let others: [Change; 3] = [
        |host| host["boot"] = json!("00000000-0000-4000-8000-000000000000"),
        |host| host["kvm"][0] = json!(host["kvm"][0].as_u64().unwrap() + 1),
        |host| host["kvm"][2] = json!(host["kvm"][2].as_i64().unwrap() ^ 1),
    ];
    for other in others {
        fs::write(&state, &original).unwrap();
        guest_saw_reserved_feature(&state);
        change_sections(&state, |name, mut payload| {
            if name == "host" {
                add_reserved_feature(&mut payload["features"]);
                other(&mut payload["host"]);
            }
            Some(payload)
        });
        lab.run("restore snapshot").refused(3, &REASON);
    }
}

// Catches: a fingerprint that changes a guest's behaviour, or that is lost when the VM is saved again or merged.
#[test]
fn the_fingerprint_does_not_change_what_the_guest_does() {
    require_kvm!();
    let lab = Lab::new();
    saved(&lab);
    let fingerprint = |dir: &str| -> Value {
        let shown = lab.run(&format!("snapshot show --json {dir}")).expect(0).stdout;
        let shown: Value = serde_json::from_str(&shown).unwrap();
        let sections = shown["sections"].as_array().unwrap();
        sections.iter().find(|section| section["name"] == "host").expect("a fingerprint")["payload"].clone()
    };
    lab.run("restore snapshot --save-at 60ms --save-to again").expect(0);
    lab.run("snapshot merge again merged").expect(0);
    assert_eq!([fingerprint("again"), fingerprint("merged")], [fingerprint("snapshot"), fingerprint("snapshot")]);

    let with_fingerprint = lab.restore("snapshot", "");
    let trace = fs::read(lab.path("trace")).unwrap();
    change_sections(&lab.path("snapshot/state"), |name, payload| (name != "host").then_some(payload));
    let without = lab.restore("snapshot", "");
    with_fingerprint.in_order(16);
    without.in_order(16);
    assert!(fs::read(lab.path("trace")).unwrap() == trace, "the traces differ");
}
