//! The programs in `examples/`: they run, and print what their comments say.

use std::process::Command;

use vm_tests::{example, finish, require_kvm};

fn run(name: &str) -> String {
    finish(&mut Command::new(example(name))).expect(0).stdout
}

// Catches: an example that compiles and no longer does what it shows. Time is an argument, so that each line is fixed.
#[test]
fn embed_vlapic_takes_its_interrupts_when_they_are_due() {
    let out = run("embed_vlapic");
    let entered: Vec<_> = out.lines().filter(|line| line.contains(" enters")).map(str::trim_start).collect();
    let want = [(1_001_500, 0x40), (2_001_500, 0x40), (3_000_000, 0x41), (3_000_500, 0x50)];
    let want = want.map(|(ns, vector)| format!("{ns} ns  vector {vector:#x} enters; its handler writes EOI"));
    assert_eq!(entered, want, "{out}");
    assert!(out.ends_with("3001500 ns  the guest halts for ever\n"), "{out}");
}

#[test]
fn embed_kvmclock_goes_on_where_it_stood() {
    let out = run("embed_kvmclock");
    let shown: Vec<_> = out.lines().filter(|line| line.contains("TSC ")).map(str::trim_start).collect();
    let want = [
        "TSC 2000000000: 1000000000 ns",
        "TSC 2000002000: 1000001000 ns",
        "TSC 3000000000: 1500000000 ns",
        // The migration: half the ticks are the same time.
        "TSC 3000000000: 1500000000 ns",
        "TSC 3000001000: 1500001000 ns",
        "TSC 4000000000: 2500000000 ns",
    ];
    assert_eq!(shown, want, "{out}");
    assert!(out.contains("version 2: ") && out.contains("version 4: "), "{out}");
}

#[test]
fn migrate_in_process_loses_no_tick() {
    require_kvm!();
    let out = run("migrate_in_process");
    for line in ["at 505000000 ns: 2600000 kHz -> 1300000 kHz", "100 ticks, 0 lost, 0 early wakes"] {
        assert!(out.lines().any(|printed| printed == line), "{line:?} is not in {out}");
    }
    // A deadline that kept its raw value is 5 ms late. A rescaled one is late by the handler's own operations, of which
    // each costs a microsecond.
    let worst = out.lines().find_map(|line| line.strip_prefix("worst: ")?.split(' ').next()).expect("a worst tick");
    assert!(worst.parse::<u64>().expect("a number") < 100_000, "{out}");
}
