//! Each rule finds its violation. The table here is a test's own, so that these tests stay when `layers.toml` changes.

mod arrows;
mod circles;
mod names;
mod rows;

use crate::Reading;
use crate::table::Table;
use crate::tree::Tree;

/// The rules of these tests.
const TABLE: &str = r#"
[rooms."vmm/src"]
time     = { may = [], why = "below all" }
apic     = { may = ["time"], why = "told the time" }
pvclock  = { may = ["time"], why = "numbers" }
kvm      = { may = ["time"], why = "ioctls" }
run      = { may = ["apic", "kvm", "time"], tests = ["session"], why = "knows no user" }
session  = { may = ["run", "time"], why = "one machine" }
cli      = { may = ["*"], why = "the program" }
lib      = { may = ["*"], why = "the front page" }
main     = { may = ["*"], why = "the program" }

[rooms."vmm/src/run"]
mod      = { may = ["*"], why = "the front page" }
clock    = { may = [], why = "below" }
wake     = { may = ["clock"], why = "wakes by the clock" }
sched    = { may = ["clock", "wake"], why = "whose turn it is" }

[circles]
at_most = 2

[[word]]
paths = ["kvm_ioctls", "kvm_bindings"]
only_in = ["vmm/src/kvm", "bench/src/bin/floor"]
looked_for_in = ["vmm", "guest", "tests", "bench"]
why = "only vmm/src/kvm speaks to KVM"

[[word]]
words = ["unsafe"]
only_in = ["vmm/src/kvm", "guest/src/arch"]
looked_for_in = ["vmm", "guest", "tests", "bench"]
why = "unsafe code lives in the kvm folder"

[[word]]
words = ["unsafe_code"]
only_in = ["vmm/src/kvm"]
looked_for_in = ["vmm"]
why = "no other module may change the unsafe_code lint"

[[word]]
paths = ["anyhow"]
only_in = ["vmm/src/cli"]
looked_for_in = ["vmm", "guest"]
why = "a library module has an error type of its own"

[[word]]
paths = ["libc", "nix"]
looked_for_in = ["vmm/src/time", "vmm/src/apic"]
why = "this folder needs no system call"

[[word]]
paths = ["std::thread", "std::fs", "std::net", "std::env", "std::process", "std::os"]
looked_for_in = ["vmm/src/time", "vmm/src/apic"]
why = "this folder is pure"

[[word]]
paths = ["std::time::Instant"]
only_in = ["vmm/src/cli"]
looked_for_in = ["vmm/src"]
tests_may = true
why = "host time is read in one place"

[[word]]
paths = ["std::time::SystemTime"]
only_in = ["vmm/src/time/host.rs"]
looked_for_in = ["vmm/src"]
why = "the wall clock is read in one place"

[[word]]
paths = ["std", "alloc"]
looked_for_in = ["guest/abi"]
why = "the guest has no standard library"

[machine_paths]
folders = ["home", "root", "Users", "work", "workspace"]
"#;

/// What is found in `tree` by `table`, as lines.
fn findings_by(table: &str, tree: &Tree) -> Vec<String> {
    let table = Table::parse(table).unwrap();
    Reading::new(tree, &table).findings().iter().map(ToString::to_string).collect()
}

/// What is found in the file, with these others beside it.
fn findings_with(others: &[(&str, &str)], file: &str, code: &str) -> Vec<String> {
    let tree = others.iter().fold(Tree::default(), |tree, (file, code)| tree.with(file, code)).with(file, code);
    findings_by(TABLE, &tree).into_iter().filter(|finding| finding.starts_with(&format!("{file}:"))).collect()
}

/// With this code in the file, something is found there that says `want`.
#[track_caller]
fn finds(file: &str, code: &str, want: &str) {
    let found = findings_with(&[], file, code);
    assert!(found.iter().any(|finding| finding.contains(want)), "{file}: {code}\nwanted: {want}\nfound: {found:#?}");
}

/// With this code in the file, nothing is found there.
#[track_caller]
fn passes(file: &str, code: &str) {
    let found = findings_with(&[], file, code);
    assert!(found.is_empty(), "{file}: {code}\nfound: {found:#?}");
}
