//! docs/snapshot-format.md lists all fields that snapshots hold.

use std::{collections::BTreeSet, fs, thread, time::Duration};

use regex::Regex;
use serde_json::Value;
use vm_tests::{Lab, require_kvm, start};

/// Between two looks for a control socket that another process is about to make.
const LOOK_AGAIN: Duration = Duration::from_millis(2);

/// The names of all fields in `value`, at any depth.
fn keys(value: &Value, found: &mut BTreeSet<String>) {
    match value {
        Value::Object(fields) => fields.iter().for_each(|(key, value)| {
            found.insert(key.clone());
            keys(value, found);
        }),
        Value::Array(values) => values.iter().for_each(|value| keys(value, found)),
        _ => {}
    }
}

/// Adds the fields of each section of the snapshot `dir`; answers with the sections' names.
fn keys_of(lab: &Lab, dir: &str, found: &mut BTreeSet<String>) -> Vec<String> {
    let shown: Value = serde_json::from_str(&lab.run(&format!("snapshot show --json {dir}")).expect(0).stdout).unwrap();
    let sections = shown["sections"].as_array().unwrap();
    sections.iter().for_each(|section| keys(&section["payload"], found));
    sections.iter().map(|section| section["name"].as_str().unwrap().to_owned()).collect()
}

/// The words of a page that stand for themselves in code: `word`, or a field of an example, "word":.
fn documented(page: &str) -> BTreeSet<&str> {
    let code = Regex::new("`([a-z0-9_]+)`|\"([a-z0-9_]+)\":").unwrap();
    code.captures_iter(page).map(|found| found.extract::<1>().1[0]).collect()
}

// Catches: a field that is saved and that no reader of the page can know of.
#[test]
fn every_field_of_a_snapshot_is_in_its_document() {
    require_kvm!();
    let lab = Lab::new();
    let mut fields = BTreeSet::new();
    // Several CPUs, and a chain of changes; timers that wait for the TSC, for nanoseconds and for a count; KVM's LAPIC.
    let mut vm = start(&mut lab.guest(
        "scenario=idle clockevent=kvm-tsc-deadline hz=250",
        "--time virtual --tsc-khz 2600000 --cpus 3 --track-dirty --api-sock s",
    ));
    while lab.run("ctl --api-sock s snapshot whole").code() != 0 {
        assert!(!vm.has_ended(), "the VM ended: {:#?}", vm.finish());
        thread::sleep(LOOK_AGAIN);
    }
    let _ = lab.run("ctl --api-sock s snapshot changes --base whole").expect(0);
    let _ = lab.run("ctl --api-sock s quit").expect(0);
    let _ = vm.finish().expect(0);
    let sections = keys_of(&lab, "changes", &mut fields);
    let all = ["machine", "clock", "cpus", "devices", "trap-sites", "judge", "host", "memory", "base"];
    assert_eq!(sections.iter().map(String::as_str).collect::<BTreeSet<_>>(), all.into());
    for clockevent in ["lapic-oneshot", "kvm-ns-deadline"] {
        let flags = format!("--time virtual --tsc-khz 2600000 --save-at 105ms --save-to {clockevent}");
        let _ = lab.boot(&format!("clockevent={clockevent}"), &flags);
        keys_of(&lab, clockevent, &mut fields);
    }
    let _ = lab.boot("scenario=idle", "--lapic kvm --save-at 105ms --save-to kvm");
    keys_of(&lab, "kvm", &mut fields);
    assert!(["ns", "count", "expires", "mp_state", "lent"].iter().all(|field| fields.contains(*field)), "{fields:?}");

    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/snapshot-format.md");
    let page = fs::read_to_string(page).unwrap();
    let documented = documented(&page);
    let missing: Vec<&String> = fields.iter().filter(|field| !documented.contains(field.as_str())).collect();
    assert!(missing.is_empty(), "not in docs/snapshot-format.md: {missing:?}");
}
