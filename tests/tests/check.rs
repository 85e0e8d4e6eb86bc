//! `vmm check`: it judges a guest by its LAPIC and page alone, as the guest's own records do; each check can fail.

use std::{collections::BTreeMap, fs};

use serde_json::Value;
use vm_tests::{CLOCKEVENTS, Ended, Lab, finish, ktap, require_kvm};

/// At boot.
const GUEST: &str = "--tsc-khz 2600000";

/// Runs `vmm check` on the embedded guest, in virtual time.
#[track_caller]
fn check(lab: &Lab, cmdline: &str, flags: &str, code: i32) -> (Ended, Value) {
    let mut command = lab.vmm(&format!("check --json check.json {GUEST} {flags}"));
    let ended = finish(command.args(["--cmdline", cmdline])).expect(code);
    (ended, serde_json::from_slice(&fs::read(lab.path("check.json")).unwrap()).unwrap())
}

/// The verdict of each check.
fn verdicts(json: &Value) -> BTreeMap<String, String> {
    let rows = json["checks"].as_array().expect("checks");
    let text = |value: &Value| value.as_str().expect("text").to_owned();
    rows.iter().map(|row| (text(&row["check"]), text(&row["verdict"]))).collect()
}

/// The checks that failed.
fn failed(json: &Value) -> Vec<String> {
    verdicts(json).into_iter().filter(|(_, verdict)| verdict == "failed").map(|(check, _)| check).collect()
}

// Catches: a clockevent that the judge without records calls otherwise than the guest's own records do; a comparison
// that takes every guest for one that follows, or none.
#[test]
fn it_agrees_with_the_guests_records() {
    require_kvm!();
    for clockevent in CLOCKEVENTS {
        let (lab, cmdline) = (Lab::new(), format!("{clockevent} hz=100 count=400"));
        // The same migrations, judged by the records: a tick that is late, or an interrupt that was early.
        let flags =
            "--time virtual --migrate-every 500ms --tsc-khz-cycle 1300000,2600000,5200000,2600000 --fail-on late=1ms";
        let by_records = finish(&mut lab.guest(&cmdline, &format!("{GUEST} {flags}"))).code();
        let wrong = clockevent == "clockevent=lapic-deadline";
        assert_eq!(by_records, i32::from(wrong), "{clockevent}");
        let (_, json) = check(&lab, &cmdline, "", i32::from(wrong));
        assert_eq!(failed(&json), if wrong { vec!["intervals"] } else { vec![] }, "{clockevent}: {json:#}");
        let told = |answer: &str| json["migrations"].to_string().matches(&format!("\"answer\":\"{answer}\"")).count();
        let (follows, old) = (told("follows"), told("old"));
        assert!(if wrong { old >= 4 && follows == 0 } else { follows >= 4 && old == 0 }, "{clockevent}: {json:#}");
    }
}

// Catches: a deadline in flight that the host's policy moves, unnoticed; one that counts nanoseconds, blamed with it.
#[test]
fn a_deadline_that_a_restore_moves_is_found() {
    require_kvm!();
    let (_, json) = check(&Lab::new(), "clockevent=kvm-tsc-deadline scenario=idle", "--deadline keep", 1);
    assert_eq!(failed(&json), ["deadlines in flight"], "{json:#}");
    // The guest is judged apart from that: it wakes at the wrong time, and arms its timer right.
    assert!(!json["migrations"].to_string().contains("\"answer\":\"old\""), "{json:#}");
    let late_ns = json.pointer("/timers/0/in_flight/late_ns").and_then(Value::as_u64).unwrap();
    assert!((1..=10_000_000).contains(&late_ns), "{late_ns}");
    let (_, json) = check(&Lab::new(), "clockevent=kvm-ns-deadline scenario=idle", "--deadline keep", 0);
    assert_eq!(json.pointer("/timers/0/in_flight/count"), Some(&Value::from(4)));
}

// Catches: a check that cannot fail. Each of these is a restore that goes wrong.
#[test]
fn a_faulty_restore_fails_its_check() {
    require_kvm!();
    let faults = [
        ("page-not-republished", "kvmclock pages"),
        ("page-base-ahead", "kvmclock pages"),
        ("no-guest-stopped", "GUEST_STOPPED"),
        ("deadline-before-lapic", "deadlines in flight"),
    ];
    for (fault, must_fail) in faults {
        let flags = format!("--inject {fault}");
        let (_, json) = check(&Lab::new(), "clockevent=kvm-tsc-deadline scenario=idle", &flags, 1);
        assert!(failed(&json).iter().any(|check| check == must_fail), "{fault}: {:?}", verdicts(&json));
    }
}

// Catches: a run that depends on the host's load or speed, and an account that changes what the guest does.
#[test]
fn two_runs_find_the_same() {
    require_kvm!();
    let lab = Lab::new();
    let run = |flags: &str| check(&lab, "clockevent=kvm-tsc-deadline scenario=smp count=100000", flags, 0).1;
    let (first, second) = (run("--cpus 2"), run("--cpus 2"));
    assert_eq!(first, second);
    assert_eq!(first["timers"].as_array().map(Vec::len), Some(2));
    // Each CPU of it arms its timer, and is compared.
    for cpu in ["/migrations/0/armings/0/0/answer", "/migrations/0/armings/1/0/answer"] {
        assert_eq!(first.pointer(cpu), Some(&Value::from("follows")), "{:#}", first["migrations"][0]);
    }
}

// Catches: a table that does not fit a terminal; test results that say another thing than the exit code.
#[test]
fn its_results_are_for_people_and_for_ci() {
    require_kvm!();
    let lab = Lab::new();
    let flags = "--junit check.xml --ktap check.ktap";
    let (ended, _) = check(&lab, "clockevent=lapic-deadline scenario=idle", flags, 1);
    assert!(ended.stdout.lines().all(|line| line.chars().count() <= 96), "{}", ended.stdout);
    assert!(ended.stdout.contains("does not follow"), "{}", ended.stdout);
    assert!(ended.stderr.contains("vmm: 1 of 6 checks failed: intervals"), "{}", ended.stderr);
    let junit = fs::read_to_string(lab.path("check.xml")).unwrap();
    assert!(junit.contains("tests=\"6\"") && junit.contains("failures=\"1\""), "{junit}");
    assert!(junit.contains("the same again: vmm check"), "{junit}");
    let results = ktap::results(&fs::read_to_string(lab.path("check.ktap")).unwrap());
    let not_ok: Vec<&str> =
        results.iter().filter(|result| !result.ok).map(|result| result.description.as_str()).collect();
    assert_eq!(not_ok, ["vmm check intervals"]);
}

// Catches: a guest that never gets to where the migrations begin, called good or waited for without end; a wrong
// command line taken for a failure of the guest.
#[test]
fn a_guest_that_cannot_be_judged_is_an_error() {
    require_kvm!();
    let lab = Lab::new();
    let run = |flags: &str, code| lab.run(&format!("check {GUEST} {flags}")).expect(code).stderr;
    let said = run("--wait-for login: --within 2s", 1);
    assert!(
        said.contains("2s of VM time have passed before its console showed \"login:\"; its last lines: "),
        "{said}"
    );
    let said = run("--cmdline count=3", 1);
    assert!(said.contains("the guest ended (code 0 at the debug-exit port) before it had 10 interrupts"), "{said}");
    let said = run("--cmdline count=100", 1);
    assert!(said.contains("1 of 7 checks failed: migrations"), "{said}");
    let said = run("--tsc-khz-cycle 100", 2);
    assert!(said.contains("100 kHz"), "{said}");
    let said = run("--guest no-such-file", 2);
    assert!(said.contains("no-such-file"), "{said}");
}
