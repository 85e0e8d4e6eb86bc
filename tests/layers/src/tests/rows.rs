//! A table that says what is no longer so is wrong, and so is a tree with what the table does not know.

use super::{TABLE, findings_by, finds};
use crate::Reading;
use crate::picture::picture;
use crate::table::Table;
use crate::tree::Tree;

/// What is found in the table itself, for a tree of these files.
fn in_table(table: &str, files: &[(&str, &str)]) -> Vec<String> {
    let tree = files.iter().fold(Tree::default(), |tree, (file, code)| tree.with(file, code));
    findings_by(table, &tree).into_iter().filter(|finding| finding.starts_with("tests/layers/layers.toml:")).collect()
}

#[track_caller]
fn finds_in_table(files: &[(&str, &str)], want: &str) {
    let found = in_table(TABLE, files);
    assert!(found.iter().any(|finding| finding.contains(want)), "wanted: {want}\nfound: {found:#?}");
}

#[test]
fn a_folder_without_a_row() {
    finds("vmm/src/new/a.rs", "fn f() {}", "`new` has no row under `vmm/src` in tests/layers/layers.toml:2");
    finds("vmm/src/new.rs", "fn f() {}", "`new` has no row");
    finds("vmm/src/run/new.rs", "fn f() {}", "`new` has no row under `vmm/src/run`");
}

#[test]
fn a_row_without_a_folder() {
    finds_in_table(&[("vmm/src/time.rs", "")], "layers.toml:4:1: `vmm/src` has no file or folder `apic`");
}

#[test]
fn an_allowed_dependency_that_does_not_exist() {
    let unused = "layers.toml:4:21: `apic` may depend on `time` and does not any more";
    finds_in_table(&[("vmm/src/apic/a.rs", "")], unused);
    let found = in_table(TABLE, &[("vmm/src/apic/a.rs", "use crate::time::A;")]);
    assert!(!found.iter().any(|finding| finding.contains("`apic` may depend")), "{found:#?}");
}

#[test]
fn a_dependency_that_only_tests_have() {
    let code = "#[cfg(test)] mod tests { use crate::time::A; }";
    finds_in_table(&[("vmm/src/apic/a.rs", code)], "only tests of `apic` depend on `time`");
    finds_in_table(&[("vmm/src/run/clock.rs", "")], "tests of `run` need not be allowed to depend on `session`");
}

#[test]
fn a_name_that_is_not_used_where_it_may_stand() {
    let unused = "`vmm/src/kvm` may use `kvm_ioctls`, `kvm_bindings` and does not any more";
    finds_in_table(&[("vmm/src/kvm/a.rs", "")], unused);
    let found = in_table(TABLE, &[("vmm/src/kvm/a.rs", "use kvm_bindings::A;")]);
    assert!(!found.iter().any(|finding| finding.contains(unused)), "{found:#?}");
}

#[test]
fn a_folder_to_look_in_that_is_not_there() {
    finds_in_table(&[("vmm/src/a.rs", "")], "`guest/abi` has no Rust file in which to look for `std`, `alloc`");
}

#[test]
fn a_key_that_is_not_known() {
    let table = TABLE.replace("tests_may = true", "test_may = true");
    assert!(Table::parse(&table).unwrap_err().to_string().contains("test_may"));
}

#[test]
fn the_picture_has_what_depends_on_most_first() {
    let tree = Tree::default()
        .with("vmm/src/lib.rs", "mod time; mod run; mod session;")
        .with("vmm/src/time.rs", "")
        .with("vmm/src/run/mod.rs", "mod clock; use crate::time::A;")
        .with("vmm/src/run/clock.rs", "use crate::apic::B; #[cfg(test)] use crate::session::C;")
        .with("vmm/src/apic.rs", "use crate::time::A;")
        .with("vmm/src/session.rs", "use crate::{run, time};");
    let table = Table::parse(TABLE).unwrap();
    let want = "\
vmm/src
  3 session  run time
  2 run      apic time
  1 apic     time
  0 lib      -
  0 time     -

vmm/src/run
  0 clock  -
  0 mod    -
";
    assert_eq!(picture(&Reading::new(&tree, &table)), want);
}
