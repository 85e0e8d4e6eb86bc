//! Which folder depends on which, however it is written.

use super::{findings_with, finds, passes};

const RUN: &str = "`time` may not depend on `run`: below all; see tests/layers/layers.toml:3";

#[test]
fn an_import_of_another_folder() {
    finds("vmm/src/time/a.rs", "use crate::run::Machine;", RUN);
    passes("vmm/src/apic/a.rs", "use crate::time::Now;");
    passes("vmm/src/run/mod.rs", "use self::clock::Clock;");
}

#[test]
fn the_finding_says_file_line_and_column() {
    let found = findings_with(&[], "vmm/src/time/a.rs", "// one\nuse crate::{\n    run::Machine,\n};");
    assert_eq!(found, [format!("vmm/src/time/a.rs:3:10: {RUN}")]);
}

#[test]
fn a_group_over_lines() {
    let code = "use crate::{\n    time::{Now, run},\n    pvclock,\n};";
    finds("vmm/src/apic/a.rs", code, "`apic` may not depend on `pvclock`");
    // `time::kvm` is no folder of the room.
    passes("vmm/src/apic/a.rs", "use crate::{time::{Now, kvm}};");
    // The checker before this one saw the end of the import in the brace that opens in the next line.
    finds("vmm/src/time/a.rs", "use crate\n    ::\n{\n    time::{\n  A },\n    run\n};", RUN);
    finds("vmm/src/time/a.rs", "use {std::fmt, crate::{time::Now, run::{self, Machine}}};", RUN);
}

#[test]
fn a_path_in_an_expression_a_type_or_a_pattern() {
    finds("vmm/src/run/a.rs", "fn f() { crate::session::run() }", "`run` may not depend on `session`");
    finds("vmm/src/time/a.rs", "fn f(machine: &Option<crate::run::Machine>) {}", RUN);
    finds("vmm/src/time/a.rs", "fn f() { let crate::run::A { x, .. } = y; }", RUN);
    finds("vmm/src/time/a.rs", "impl crate::run::Trait for X {}", RUN);
    finds("vmm/src/time/a.rs", "fn f() { <X as crate::run::Trait>::g() }", RUN);
    finds("vmm/src/time/a.rs", "fn f<T: Into<crate::run::X>>() -> impl Iterator<Item = T> { g::<T>() }", RUN);
}

#[test]
fn super_as_often_as_it_takes() {
    finds("vmm/src/time/a.rs", "use super::super::run;", RUN);
    finds("vmm/src/time/mod.rs", "use super::run::X;", RUN);
    finds("vmm/src/time/a/b.rs", "fn f() { super::super::super::run::g() }", RUN);
    finds("vmm/src/time/a.rs", "mod inner { use super::super::super::run; }", RUN);
    passes("vmm/src/time/a.rs", "mod inner { use super::super::run; }");
    passes("vmm/src/time/a.rs", "use self::run::X; mod run {}");
    passes("vmm/src/run/sched/a.rs", "use super::clock;");
}

#[test]
fn renames() {
    finds("vmm/src/time/a.rs", "use crate as x; fn f() { x::run::g() }", RUN);
    finds("vmm/src/time/a.rs", "use super::super as up; use up::run as r;", RUN);
    finds("vmm/src/time/a.rs", "use crate::{self as x}; fn f() { x::run::g() }", RUN);
    finds("vmm/src/time/a.rs", "extern crate self as x; fn f() { x::run::g() }", RUN);
    finds("vmm/src/time/a.rs", "fn f() { use crate as x; use x as y; y::run::g() }", RUN);
    // The rename stands in another file of the folder.
    let others = [("vmm/src/time/mod.rs", "pub use crate as x; mod a;"), ("vmm/src/lib.rs", "mod time; mod run;")];
    let found = findings_with(&others, "vmm/src/time/a.rs", "fn f() { super::x::run::g() }");
    assert!(found.iter().any(|finding| finding.contains(RUN)), "{found:?}");
    passes("vmm/src/apic/a.rs", "use crate as x; fn f() { x::time::g() }");
}

#[test]
fn globs() {
    let others = [("vmm/src/lib.rs", "mod time; mod run;"), ("vmm/src/run/mod.rs", "pub fn g() {}")];
    let found = findings_with(&others, "vmm/src/time/mod.rs", "use crate::*; fn f() { run::g() }");
    assert!(found.iter().any(|finding| finding.contains(RUN)), "{found:?}");
    finds("vmm/src/time/a.rs", "use crate::run::*;", RUN);
    passes("vmm/src/time/a.rs", "use super::*; use std::fmt::*;");
}

#[test]
fn macros() {
    finds("vmm/src/time/a.rs", "fn f() { println!(\"{}\", crate::run::X) }", RUN);
    finds("vmm/src/time/a.rs", "macro_rules! m { ($x:expr) => { $crate::run::g($x) }; }", RUN);
    finds("vmm/src/time/a.rs", "macro_rules! m { () => { use $crate::{time::A, run::{B, C}}; }; }", RUN);
    finds("vmm/src/time/a.rs", "m! { use crate as x; } fn f() { x::run::g() }", RUN);
    finds("vmm/src/time/a.rs", "m!([(crate::run::X)]);", RUN);
    finds("vmm/src/time/a.rs", "fn f() { crate::run::m!() }", RUN);
    passes("vmm/src/time/a.rs", "fn f() { m!(self.run, x.run::<A>(), $run::x, \"crate::run\", Vec::<A>::run) }");
}

#[test]
fn an_exported_macro_belongs_to_the_module_that_defines_it() {
    let say = "#[macro_export] macro_rules! say { () => {}; }";
    let others = [("vmm/src/lib.rs", "mod time; mod run;"), ("vmm/src/run/mod.rs", say)];
    let found = findings_with(&others, "vmm/src/time/mod.rs", "fn f() { crate::say!() }");
    assert!(found.iter().any(|finding| finding.contains(RUN)), "{found:?}");
}

#[test]
fn attributes() {
    finds("vmm/src/time/a.rs", "#[derive(crate::run::Derive)] struct A;", RUN);
    finds("vmm/src/time/a.rs", "struct A { #[serde(with = \"crate::run::hex\")] x: u8 }", RUN);
    passes("vmm/src/time/a.rs", "#[doc = \"crate::run\"] #[must_use = \"crate run\"] fn f() {}");
}

#[test]
fn a_reexport_is_a_dependency_on_the_folder_that_it_names() {
    finds("vmm/src/time/a.rs", "pub use crate::run::Machine;", RUN);
    let others = [
        ("vmm/src/lib.rs", "mod apic; mod time; mod run; pub use run::Machine; pub use run::sched as order;"),
        ("vmm/src/run/mod.rs", "pub struct Machine;"),
    ];
    // The crate's front page shows what `run` has: it is `run` all the same.
    for code in ["use crate::Machine;", "fn f() { crate::order::g() }"] {
        let found = findings_with(&others, "vmm/src/time/mod.rs", code);
        assert!(found.iter().any(|finding| finding.contains(RUN)), "{code}: {found:?}");
    }
    // What `run` shows of `apic` is part of `run`.
    let others =
        [("vmm/src/lib.rs", "mod apic; mod run; mod session;"), ("vmm/src/run/mod.rs", "pub use crate::apic::Lapic;")];
    let found = findings_with(&others, "vmm/src/session/mod.rs", "use crate::run::Lapic;");
    assert!(found.is_empty(), "{found:?}");
}

#[test]
fn what_the_front_page_defines_is_the_front_pages() {
    let others = [("vmm/src/lib.rs", "mod time; pub struct Error;")];
    let found = findings_with(&others, "vmm/src/time/mod.rs", "use crate::Error;");
    assert!(found.iter().any(|finding| finding.contains("`time` may not depend on `lib`")), "{found:?}");
}

#[test]
fn a_function_with_a_modules_name_is_not_on_the_way() {
    let others = [("vmm/src/lib.rs", "mod run; mod session; fn run() {}"), ("vmm/src/run/mod.rs", "pub struct A;")];
    let found = findings_with(&others, "vmm/src/session/mod.rs", "use crate::run::A;");
    assert!(found.is_empty(), "{found:?}");
}

#[test]
fn a_room_within_a_room() {
    finds("vmm/src/run/clock/a.rs", "use super::super::sched::X;", "`clock` may not depend on `sched`: below");
    finds("vmm/src/run/clock.rs", "use crate::run::{wake::X};", "`clock` may not depend on `wake`");
    passes("vmm/src/run/sched/mod.rs", "use super::{clock::A, wake};");
    let others = [
        ("vmm/src/lib.rs", "mod run;"),
        ("vmm/src/run/mod.rs", "mod clock; mod sched; pub use sched::Turn; use sched::Order;"),
        ("vmm/src/run/sched.rs", "pub struct Turn; pub struct Order;"),
    ];
    for code in ["use super::Turn;", "use super::*; fn f(order: Order) {}", "fn f() { super::Order::g() }"] {
        let found = findings_with(&others, "vmm/src/run/clock.rs", code);
        assert!(found.iter().any(|finding| finding.contains("`clock` may not depend on `sched`")), "{code}: {found:?}");
    }
}

#[test]
fn another_crate_of_the_package_uses_the_librarys_name() {
    let others = [
        ("vmm/Cargo.toml", "[package]\nname = \"the-vmm\""),
        ("vmm/src/lib.rs", "pub mod run;"),
        ("vmm/src/run/mod.rs", "pub struct A;"),
        ("vmm/src/main.rs", "mod time;"),
    ];
    let found = findings_with(&others, "vmm/src/time.rs", "use the_vmm::run::A;");
    assert!(found.iter().any(|finding| finding.contains(RUN)), "{found:?}");
    let found = findings_with(&others, "vmm/src/time.rs", "extern crate the_vmm as v; fn f() { v::run::g() }");
    assert!(found.iter().any(|finding| finding.contains(RUN)), "{found:?}");
}

#[test]
fn a_module_whose_file_is_elsewhere() {
    let others = [("vmm/src/lib.rs", "mod time;"), ("vmm/src/time/mod.rs", "mod a { #[path = \"../odd.rs\"] mod b; }")];
    // `super::super` of `time::a::b` is `time`, of which `super` is the crate.
    let found = findings_with(&others, "vmm/src/time/odd.rs", "use super::super::super::run::A;");
    assert!(found.iter().any(|finding| finding.contains(RUN)), "{found:?}");
    let found = findings_with(&others, "vmm/src/time/odd.rs", "use super::super::run::A;");
    assert!(found.is_empty(), "{found:?}");
}

#[test]
fn tests_may_what_their_row_says() {
    let session = "`run` may not depend on `session`";
    finds("vmm/src/run/sched.rs", "use crate::session::A;", session);
    finds("vmm/src/run/sched.rs", "#[cfg(not(test))] use crate::session::A;", session);
    finds("vmm/src/run/sched.rs", "#[cfg(any(test, unix))] use crate::session::A;", session);
    passes("vmm/src/run/sched.rs", "#[cfg(test)] mod tests { use crate::session::A; }");
    passes("vmm/src/run/sched.rs", "#[cfg(all(unix, test))] use crate::session::A;");
    passes("vmm/src/run/sched.rs", "#[test] fn f() { crate::session::g() }");
    finds("vmm/src/time/a.rs", "#[cfg(test)] mod tests { use crate::run::A; }", RUN);
    let others = [("vmm/src/lib.rs", "mod run;"), ("vmm/src/run/mod.rs", "mod a {} #[cfg(test)] mod sched;")];
    assert!(findings_with(&others, "vmm/src/run/sched.rs", "use crate::session::A;").is_empty());
}

#[test]
fn a_local_variable_is_no_module() {
    let others = [("vmm/src/lib.rs", "mod time; mod run; fn f(run: u8) { let time = run; g(time, run.x) }")];
    assert!(findings_with(&others, "vmm/src/time/mod.rs", "fn f(run: u8) -> u8 { run }").is_empty());
}

#[test]
fn what_is_no_code_is_no_dependency() {
    let code = "//! unsafe libc crate::run\n/// Instant\nfn f() {} // crate::run SystemTime\n/* use crate::run; */";
    passes("vmm/src/time/a.rs", code);
    passes("vmm/src/time/a.rs", "const A: &str = \"unsafe // crate::run\";\nconst B: u8 = 1;");
    passes("vmm/src/time/a.rs", "const A: &str = r#\"\nuse crate::run;\n\"#;");
    let after_a_string = "const A: &str = \"two \\\\\\\n  lines of unsafe\";\nuse crate::run;";
    finds("vmm/src/time/a.rs", after_a_string, RUN);
}
