//! Requirements of tests on this host, with the reason if one is not met, for [`crate::require!`].

use std::{env, fs::File, process::Command};

use crate::Lab;

/// KVM.
///
/// # Errors
/// If /dev/kvm cannot be opened.
///
/// # Panics
/// If it cannot, and CI=true: a test that CI skips may never run anywhere.
pub fn kvm() -> Result<(), String> {
    let Err(error) = File::options().read(true).write(true).open("/dev/kvm") else { return Ok(()) };
    let reason = format!("/dev/kvm cannot be opened: {error}");
    assert!(env::var_os("CI").is_none_or(|ci| ci != "true"), "CI=true, and {reason}");
    Err(reason)
}

/// A guest whose WRMSR of IA32_TSC_DEADLINE reaches the VMM, although the guest lists no sites.
///
/// # Errors
/// If this host's KVM swallows the write.
///
/// # Panics
/// If `vmm doctor` fails.
pub fn deadline_write() -> Result<(), String> {
    match doctor()["deadline_wrmsr"].as_str() {
        Some("swallowed") => Err("this host swallows IA32_TSC_DEADLINE".to_owned()),
        _ => Ok(()),
    }
}

/// A TSC that counts at the frequency that the VMM takes it to have, so that it can be compared with the wall clock.
///
/// # Errors
/// If VMM_TEST_HOST_KHZ pretends another.
pub fn true_tsc_frequency() -> Result<(), String> {
    match env::var_os("VMM_TEST_HOST_KHZ") {
        Some(_) => Err("VMM_TEST_HOST_KHZ pretends a TSC frequency, so that TSC and wall clock differ".to_owned()),
        None => Ok(()),
    }
}

/// A KVM that does not scale a guest's TSC.
///
/// # Errors
/// If this host's does.
///
/// # Panics
/// If `vmm doctor` fails.
pub fn no_tsc_scaling() -> Result<(), String> {
    match doctor()["tsc_scaling"].as_array().is_some_and(|tried| tried.iter().any(|one| one["works"] == true)) {
        true => Err("this host's KVM scales a TSC".to_owned()),
        false => Ok(()),
    }
}

/// What `vmm doctor --json` reports about this host.
///
/// # Panics
/// If it fails.
#[must_use]
pub fn doctor() -> serde_json::Value {
    serde_json::from_str(&Lab::new().run("doctor --json").expect(0).stdout).expect("JSON")
}

/// QEMU, without arguments yet.
///
/// # Errors
/// If it is not installed.
pub fn qemu() -> Result<Command, String> {
    let qemu = || Command::new("qemu-system-x86_64");
    match qemu().arg("--version").output() {
        Ok(_) => Ok(qemu()),
        Err(error) => Err(format!("qemu-system-x86_64 cannot be run: {error}")),
    }
}

/// strace with these arguments, to which a command is added.
///
/// # Errors
/// If it is not installed, is too old for an argument, or may not trace.
pub fn strace(arguments: &[&str]) -> Result<Command, String> {
    let strace = || {
        let mut strace = Command::new("strace");
        strace.args(arguments);
        strace
    };
    match strace().args(["-o", "/dev/null", "true"]).output() {
        Ok(output) if output.status.success() => Ok(strace()),
        Ok(_) => Err("strace is too old, or may not trace".to_owned()),
        Err(error) => Err(format!("strace cannot be run: {error}")),
    }
}
