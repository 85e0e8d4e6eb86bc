//! `vmm doctor --conformance`: every check has an answer, which agrees with what `vmm doctor` measures by other means.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

use serde_json::Value;
use vm_tests::{Lab, doctor, require_kvm};

fn answers(lab: &Lab) -> BTreeMap<String, Value> {
    let report: Value = serde_json::from_str(&lab.run("doctor --conformance --json").expect(0).stdout).unwrap();
    assert_eq!(report["schema"], "vmm-conformance/1");
    let answers = report["answers"].as_array().unwrap();
    let named: BTreeMap<_, _> =
        answers.iter().map(|answer| (answer["id"].as_str().unwrap().to_owned(), answer.clone())).collect();
    assert_eq!(named.len(), answers.len(), "two checks of one name: {answers:#?}");
    named
}

fn verdict<'a>(answers: &'a BTreeMap<String, Value>, id: &str) -> &'a str {
    answers[id]["verdict"].as_str().unwrap()
}

// Catches: a check that is not documented, or no longer exists.
#[test]
fn every_check_stands_in_the_page() {
    require_kvm!();
    let page = include_str!("../../docs/conformance.md");
    let (_, checks) = page.split_once("## Checks").unwrap();
    let (checks, _) = checks.split_once("\n## ").unwrap();
    let names = checks.lines().filter_map(|line| Some(line.strip_prefix("| `")?.split_once("` |")?.0));
    let documented: BTreeSet<&str> = names.flat_map(|names| names.split("`, `")).collect();
    let answers = answers(&Lab::new());
    let ids: BTreeSet<&str> = answers.keys().map(String::as_str).collect();
    assert_eq!(documented, ids);
}

// Catches: a guest that does not get to what it is to do (a wrong page table, a wrong descriptor), on this backend; a
// check whose result depends on load.
#[test]
fn no_check_fails_and_a_second_run_has_the_same_verdicts() {
    require_kvm!();
    let lab = Lab::new();
    let (first, second) = (answers(&lab), answers(&lab));
    for (id, answer) in &first {
        assert_ne!(answer["verdict"], "failed", "{answer:#}");
        assert_eq!(answer["verdict"], second[id]["verdict"], "{answer:#} {:#}", second[id]);
    }
}

// Catches: a check that measures something else than it says. `vmm doctor` finds the same with 32-bit guests of its
// own.
#[test]
fn it_agrees_with_doctor() {
    require_kvm!();
    let lab = Lab::new();
    let doctor = doctor();
    let answers = answers(&lab);
    let conforms = |id| verdict(&answers, id) == "conforms";
    assert_eq!(conforms("tsc-offset"), doctor["tsc_offset"]["works"] == true);
    assert_eq!(conforms("tsc-scale-up"), doctor["tsc_scaling"][0]["works"] == true);
    assert_eq!(conforms("tsc-scale-down"), doctor["tsc_scaling"][1]["works"] == true);
    assert_eq!(conforms("msr-deadline"), doctor["deadline_wrmsr"] == "exits");
    if !conforms("msr-deadline") {
        assert_eq!(conforms("msr-deadline-mwait"), doctor["deadline_wrmsr"] == "exits-with-mwait");
    }
    let x2apic = answers["msr-x2apic-read"]["measured"] == "an exit, before the access";
    assert_eq!(x2apic, doctor["x2apic_exits"] == true);
    assert_eq!(conforms("user-syscall"), doctor["user_syscall"] == "works");
    let exact = conforms("step-nop") && conforms("step-sti");
    assert_eq!(exact, doctor["single_step_exact"] == true);
}

// Catches: a plan that does not match, a verdict that KTAP turns round.
#[test]
fn ktap_has_a_line_for_each_check() {
    require_kvm!();
    let lab = Lab::new();
    let ktap = lab.run("doctor --conformance --ktap").expect(0).stdout;
    let answers = answers(&lab);
    assert!(ktap.starts_with("KTAP version 1\n"), "{ktap}");
    assert!(ktap.lines().any(|line| line == format!("1..{}", answers.len())), "{ktap}");
    for (id, answer) in &answers {
        let line = ktap.lines().find(|line| line.split(' ').any(|word| word == id) && line.contains("ok ")).unwrap();
        let bad = ["differs", "failed"].contains(&answer["verdict"].as_str().unwrap());
        assert_eq!(line.starts_with("not ok"), bad, "{line}: {answer:#}");
        assert_eq!(line.ends_with("# SKIP not offered"), answer["verdict"] == "not-offered", "{line}: {answer:#}");
    }
}

/// A report with one answer, and these words as its measurement.
fn report(kernel: &str, id: &str, verdict: &str, measured: &str) -> String {
    let answer = serde_json::json!({"id": id, "measured": measured, "verdict": verdict, "later": 1});
    let modules = ["kvm", "kvm_x"];
    serde_json::json!({"schema": "vmm-conformance/1", "kernel": kernel, "kvm_modules": modules, "answers": [answer]})
        .to_string()
}

// Catches: reports matched by position, a cell that breaks the table or the terminal, a file that is not a report
// accepted.
#[test]
fn reports_are_compared_by_check_and_foreign_files_refused() {
    let lab = Lab::new();
    let write = |name: &str, text: &str| fs::write(lab.path(name), text).unwrap();
    write("a", &report("6.1", "first", "differs", "one | two\n\u{1b}[31mthree\\<b>"));
    write("b", &report("7.2", "second", "conforms", ""));
    let table = lab.run("doctor --compare a b").expect(0).stdout;
    let rows: Vec<Vec<&str>> =
        table.lines().map(|line| line.split(" | ").map(|cell| cell.trim_matches([' ', '|'])).collect()).collect();
    assert_eq!(rows[0], ["check", "kvm_x 6.1", "kvm_x 7.2"], "{table}");
    assert_eq!((rows[3][0], rows[3][1], rows[3][2]), ("second", "–", "conforms"), "{table}");
    assert_eq!((rows.len(), table.contains('\u{1b}')), (4, false), "{table}");
    assert!(table.contains("**differs**: one \\| two") && table.contains("three\\\\&lt;b>"), "{table}");

    write("c", "{}");
    write("d", &report("7.2", "x", "conforms", "").replace("conformance/1", "conformance/9"));
    write("e", &report("7.2", "x", "splendid", ""));
    lab.run("doctor --compare a c").refused(2, &["c is not a report of `vmm doctor --conformance --json`", "schema"]);
    lab.run("doctor --compare d").refused(2, &["d has the layout vmm-conformance/9", "vmm-conformance/1"]);
    lab.run("doctor --compare e").refused(2, &["e is not a report", "splendid"]);
    lab.run("doctor --compare .").refused(2, &[". is not a file"]);
    lab.run("doctor --compare none").refused(2, &["cannot read none"]);
    lab.run("doctor --ktap").expect(2);
}
