//! Circles between folders and between files.

use super::{TABLE, findings_by};
use crate::tree::Tree;

fn circles(files: &[(&str, &str)]) -> Vec<String> {
    circles_by(TABLE, files)
}

fn circles_by(table: &str, files: &[(&str, &str)]) -> Vec<String> {
    let tree = files.iter().fold(Tree::default(), |tree, (file, code)| tree.with(file, code));
    findings_by(table, &tree).into_iter().filter(|finding| finding.contains("depend on each other")).collect()
}

const LIB: (&str, &str) = ("vmm/src/lib.rs", "pub mod apic; pub mod kvm; pub mod run; pub mod session; pub mod time;");

#[test]
fn folders_in_a_circle() {
    let table = TABLE.replace("time     = { may = []", "time     = { may = [\"session\"]");
    let found = circles_by(
        &table,
        &[
            LIB,
            ("vmm/src/time/mod.rs", "use crate::session::A;"),
            ("vmm/src/session/mod.rs", "use crate::run::A;"),
            ("vmm/src/run/mod.rs", "\nuse crate::time::A;"),
        ],
    );
    let want = "vmm/src/run/mod.rs:2:18: folders of `vmm/src` depend on each other: run -> time -> session -> run";
    assert!(found.iter().any(|finding| finding == want), "{found:?}");
}

#[test]
fn tests_make_no_circle() {
    let session = ("vmm/src/session/mod.rs", "use crate::run::A;");
    let run = ("vmm/src/run/mod.rs", "#[cfg(test)] mod tests { use crate::session::A; }");
    assert!(circles(&[LIB, session, run]).is_empty());
}

#[test]
fn files_of_several_folders() {
    let found = circles(&[
        LIB,
        ("vmm/src/run/mod.rs", "mod clock; mod wake;"),
        ("vmm/src/run/clock.rs", "use super::wake::a::A; pub struct C;"),
        ("vmm/src/run/wake/mod.rs", "pub mod a;"),
        ("vmm/src/run/wake/a.rs", "use crate::run::clock::C; pub struct A;"),
    ]);
    let want = "files of several folders depend on each other: vmm/src/run/clock.rs -> vmm/src/run/wake/a.rs -> \
                vmm/src/run/clock.rs";
    assert!(found.iter().any(|finding| finding.contains(want)), "{found:?}");
}

#[test]
fn a_reexport_leads_to_the_file_that_defines() {
    // `kvm/mod.rs` re-exports `A` and does not depend on it; `deep` depends on the file that defines `A`.
    let files = [
        LIB,
        ("vmm/src/kvm/mod.rs", "mod a; pub mod deep; pub use a::A; pub use deep::B; pub struct M;"),
        ("vmm/src/kvm/a.rs", "pub struct A;"),
        ("vmm/src/kvm/deep/mod.rs", "use super::{A, M}; pub struct B;"),
    ];
    assert_eq!(circles(&files), [""; 0]);
    // A file that uses what is re-exported depends on the definition, and that makes a circle.
    let a = ("vmm/src/kvm/a.rs", "use super::B; pub struct A;");
    let found = circles(&[files[0], files[1], a, files[3]]);
    assert!(found.iter().any(|finding| finding.contains("vmm/src/kvm/a.rs -> vmm/src/kvm/deep/mod.rs")), "{found:?}");
}

#[test]
fn files_of_one_folder() {
    let small = [
        LIB,
        ("vmm/src/kvm/a.rs", "use crate::kvm::b::B; pub struct A;"),
        ("vmm/src/kvm/b.rs", "use super::a::A; pub struct B;"),
    ];
    let modules = ("vmm/src/kvm/mod.rs", "mod a; mod b; mod c;");
    assert_eq!(circles(&[&small[..], &[modules]].concat()), [""; 0]);
    // Three files are more than this table's two.
    let b = ("vmm/src/kvm/b.rs", "use super::c::C; pub struct B;");
    let c = ("vmm/src/kvm/c.rs", "use super::a::A; pub struct C;");
    let found = circles(&[small[0], small[1], modules, b, c]);
    assert!(found.iter().any(|finding| finding.contains("more than 2 files depend on each other")), "{found:?}");
}

#[test]
fn a_file_and_the_folder_of_its_modules_are_one_folder() {
    let found = circles(&[
        LIB,
        ("vmm/src/kvm/mod.rs", "mod pit;"),
        ("vmm/src/kvm/pit.rs", "mod channel; use channel::C; pub struct P;"),
        ("vmm/src/kvm/pit/channel.rs", "use super::P; pub struct C;"),
    ]);
    assert_eq!(found, [""; 0]);
}

#[test]
fn a_wider_circle_where_the_table_lets_it() {
    let files = [
        LIB,
        ("vmm/src/kvm/mod.rs", "pub mod deep; pub struct A;"),
        ("vmm/src/kvm/deep/mod.rs", "use crate::kvm::A; pub struct B;"),
        ("vmm/src/kvm/user.rs", ""),
    ];
    let needs = ("vmm/src/kvm/mod.rs", "pub mod deep; pub struct A; fn f() -> deep::B { deep::B }");
    let row = "at_most = 2\n[[circles.wider]]\nwithin = \"vmm/src/kvm\"\nwhy = \"one thing\"";
    let table = TABLE.replace("at_most = 2", row);
    let circle = [files[0], needs, files[2]];
    assert_eq!(circles(&circle).len(), 1);
    assert_eq!(circles_by(&table, &circle), [""; 0]);
    // Without a circle the row says nothing.
    let tree = files.iter().fold(Tree::default(), |tree, (file, code)| tree.with(file, code));
    let found = findings_by(&table, &tree);
    let want = "no circle within `vmm/src/kvm` is that wide any more";
    assert!(found.iter().any(|finding| finding.contains(want)), "{found:?}");
}
