//! Names that only some folders may use, and paths of one machine.

use super::{findings_with, finds, passes};

#[test]
fn kvm_is_for_its_folder() {
    finds("vmm/src/run/a.rs", "use kvm_ioctls::Kvm;", "`kvm_ioctls`: only vmm/src/kvm speaks to KVM");
    finds("bench/src/rows/a.rs", "use kvm_ioctls::Kvm;", "`kvm_ioctls`");
    passes("bench/src/bin/floor/a.rs", "use kvm_ioctls::Kvm;");
    passes("vmm/src/kvm/a.rs", "use kvm_bindings::X; fn f() { unsafe { g() } }");
    passes("vmm/src/session/a.rs", "use other::kvm_ioctls; fn f(kvm_ioctls: u8) { g(kvm_ioctls) }");
}

#[test]
fn kvm_behind_a_rename_or_a_reexport() {
    finds("vmm/src/run/a.rs", "extern crate kvm_ioctls as k;", "`kvm_ioctls`");
    finds("vmm/src/run/a.rs", "use ::kvm_ioctls as k;", "`kvm_ioctls`");
    for reexport in ["pub use kvm_bindings::Regs;", "pub use kvm_bindings::*;"] {
        let others = [("vmm/src/lib.rs", "mod kvm; mod run;"), ("vmm/src/kvm/mod.rs", reexport)];
        let found = findings_with(&others, "vmm/src/run/mod.rs", "use crate::kvm::Regs;");
        assert!(found.iter().any(|finding| finding.contains("`kvm_bindings`")), "{reexport}: {found:?}");
    }
    let others = [("vmm/src/lib.rs", "mod kvm; mod run;"), ("vmm/src/kvm/mod.rs", "use kvm_bindings::*; make!(Regs);")];
    assert!(findings_with(&others, "vmm/src/run/mod.rs", "use crate::kvm::Regs;").is_empty());
}

#[test]
fn unsafe_code_is_for_its_folders() {
    finds("vmm/src/run/a.rs", "fn f() { unsafe { g() } }", "unsafe code lives");
    finds("bench/src/a.rs", "fn f() { unsafe { g() } }", "unsafe code lives");
    finds("guest/src/ticks.rs", "#[unsafe(no_mangle)] fn f() {}", "unsafe code lives");
    finds("vmm/src/run/a.rs", "unsafe impl Send for X {}", "unsafe code lives");
    finds("vmm/src/run/a.rs", "macro_rules! m { () => { unsafe { g() } }; }", "unsafe code lives");
    passes("guest/src/arch/a.rs", "#[unsafe(no_mangle)] fn f() {}");
}

#[test]
fn the_lint_of_unsafe_code() {
    finds("vmm/src/run/a.rs", "#![allow(unsafe_code, reason = \"x\")]", "unsafe_code lint");
    finds("vmm/src/run/a.rs", "#[cfg_attr(test, allow(unsafe_code))] mod x {}", "unsafe_code lint");
    passes("vmm/src/kvm/a.rs", "#![allow(unsafe_code)]");
}

#[test]
fn errors_of_the_program_are_the_programs() {
    finds("vmm/src/run/a.rs", "use anyhow::Result;", "error type of its own");
    finds("vmm/src/run/a.rs", "fn f() -> anyhow::Result<()> { g() }", "error type of its own");
    passes("vmm/src/cli/a.rs", "use anyhow::Result;");
    passes("tests/src/lib.rs", "use anyhow::Result;");
}

#[test]
fn a_pure_folder_needs_no_system() {
    finds("vmm/src/time/a.rs", "use libc::timespec;", "system call");
    finds("vmm/src/apic/a.rs", "fn f() { std::thread::sleep(d) }", "`std::thread`: this folder is pure");
    passes("vmm/src/apic/a.rs", "use std::{fmt, time::Duration};");
    passes("vmm/src/time/a.rs", "fn f() { m!(A::<B>::libc, $x::nix, x.libc) }");
    passes("vmm/src/session/a.rs", "use std::{thread, fs};");
}

// The checker before this one read lines: it saw `std::thread` only where these two words stood side by side.
#[test]
fn imports_that_a_text_search_misses() {
    finds("vmm/src/apic/a.rs", "use std::{thread, fs};", "`std::thread`");
    finds("vmm/src/apic/a.rs", "use std::{thread, fs};", "`std::fs`");
    finds("vmm/src/time/a.rs", "use crate as x; fn f() -> x::run::A { x::run::g() }", "may not depend on `run`");
    finds("vmm/src/apic/a.rs", "use std::{\n    fmt,\n    process::{\n        Command,\n    },\n};", "`std::process`");
    finds("vmm/src/apic/a.rs", "use std as s; fn f() { s::thread::sleep(d) }", "`std::thread`");
    finds("vmm/src/apic/a.rs", "use std::{self as s, fmt}; use s::env;", "`std::env`");
    finds("vmm/src/apic/a.rs", "use std::*; fn f() { thread::sleep(d) }", "`std::thread`");
    finds("vmm/src/apic/a.rs", "fn f() { m!(::std::net::X) }", "`std::net`");
}

#[test]
fn host_clocks() {
    finds("vmm/src/run/a.rs", "fn f() { let t = std::time::Instant::now(); }", "host time is read");
    finds("vmm/src/run/a.rs", "use std::time; fn f() { time::Instant::now() }", "host time is read");
    finds("vmm/src/run/a.rs", "use std::time::*; fn f(t: Instant) {}", "host time is read");
    finds("vmm/src/session/a.rs", "use std::time::{Duration, SystemTime};", "wall clock");
    passes("vmm/src/time/host.rs", "use std::time::SystemTime; fn f() { let t = SystemTime::now(); }");
    passes("vmm/src/session/a.rs", "use crate::time::Instant; fn f() { Instant::now() }");
    passes("vmm/src/session/a.rs", "#[cfg(test)] mod tests { use std::time::Instant; }");
    finds("vmm/src/run/a.rs", "#[cfg(test)] mod tests { use std::time::SystemTime; }", "wall clock");
}

#[test]
fn the_guest_has_no_standard_library() {
    finds("guest/abi/src/a.rs", "use std::fmt;", "no standard library");
    finds("guest/abi/src/a.rs", "extern crate alloc;", "no standard library");
    passes("guest/abi/src/a.rs", "use core::fmt; fn f(alloc: u8) -> u8 { alloc }");
}

#[test]
fn one_finding_for_a_name_in_a_file() {
    let code = "use std::{fmt, fs};\nfn f() { fs::read(x) }\nfn g() { std::fs::write(x) }";
    let found = findings_with(&[], "vmm/src/time/a.rs", code);
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].starts_with("vmm/src/time/a.rs:1:16: `std::fs`: this folder is pure; see"), "{found:?}");
}

#[test]
fn paths_of_one_machine() {
    // Put together here, so that this file does not name one.
    finds("docs/a.md", &format!("see /{}/somebody/vmm", "home"), "path of one machine");
    finds("vmm/src/run/a.rs", &format!("// /{}/x", "root"), "path of one machine");
    passes("docs/a.md", "https://example.org/home/page and ~/root/x");
}

#[test]
fn comments_end_at_column_120() {
    let comment = |columns: usize| format!("    // {}", "µ".repeat(columns - 7));
    passes("vmm/src/time/a.rs", &comment(120));
    finds("vmm/src/time/a.rs", &comment(121), "a comment ends at column 120");
    passes("docs/a.md", &comment(121));
}

#[test]
fn what_is_no_rust_is_found() {
    finds("vmm/src/run/a.rs", "fn f() {}\nfn {", "not read");
    finds("vmm/src/run/a.rs", "fn f() {}\nlet x = 1;", "vmm/src/run/a.rs:2:1: not read");
}
