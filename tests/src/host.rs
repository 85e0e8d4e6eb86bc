//! What this host can do.

use std::{env, fs::File};

/// Whether a test that needs KVM can run. If not, it says why; where CI=true a host without KVM is a failure, because
/// there a skipped test is one that nobody runs.
#[must_use]
pub fn kvm() -> bool {
    let Err(error) = File::options().read(true).write(true).open("/dev/kvm") else { return true };
    assert!(env::var_os("CI").is_none_or(|ci| ci != "true"), "CI=true, and /dev/kvm cannot be opened: {error}");
    eprintln!("skipped: /dev/kvm cannot be opened: {error}");
    false
}
