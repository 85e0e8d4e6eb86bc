//! Builds the guest kernel, for `src/lib.rs` to embed and for users to boot elsewhere.
//!
//! A nested cargo, because the guest needs another profile, link script and instruction set than the program around
//! it. Its settings are all here: nothing from the outer build may reach it, so that the same sources give the same
//! guest whatever is being built.

use std::env;
use std::error::Error;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The one target that every installation has; the guest needs nothing from its standard library.
const TARGET: &str = "x86_64-unknown-linux-gnu";
/// Between the flags in `CARGO_ENCODED_RUSTFLAGS`.
const SEPARATOR: &str = "\x1f";

fn main() {
    if let Err(error) = build() {
        for line in error.to_string().lines() {
            println!("cargo::error={line}");
        }
        std::process::exit(1);
    }
}

fn build() -> Result<(), Box<dyn Error>> {
    let package = PathBuf::from(variable("CARGO_MANIFEST_DIR")?);
    let workspace = package.ancestors().nth(2).ok_or("the guest-image package is not two directories deep")?;
    let out = PathBuf::from(variable("OUT_DIR")?);
    rerun_if_changed(workspace);

    let target_dir = out.join("guest");
    let mut cargo = Command::new(variable("CARGO")?);
    cargo
        .current_dir(workspace)
        .args(["build", "--package", "guest", "--bin", "guest", "--features", "bare-metal"])
        .args(["--profile", "guest", "--target", TARGET, "--color", "never", "--target-dir"])
        .arg(&target_dir);
    if workspace.join("Cargo.lock").exists() {
        cargo.arg("--locked");
    }
    for (name, _) in env::vars_os() {
        if leaks(&name) {
            cargo.env_remove(name);
        }
    }
    cargo.env("CARGO_ENCODED_RUSTFLAGS", flags(workspace)?);

    let output = cargo.output().map_err(|e| format!("cannot run cargo for the guest: {e}"))?;
    if !output.status.success() {
        return Err(format!("building the guest failed:\n{}", String::from_utf8_lossy(&output.stderr)).into());
    }
    let guest = target_dir.join(TARGET).join("guest").join("guest");
    publish(&guest, &out)?;
    // Also into the target directory, for users to boot. Cargo tags a target directory that it created. If there is no
    // tag, it is found by its layout: `out` is <target>/<profile>/build/<package>/out.
    let tagged = out.ancestors().find(|dir| dir.join("CACHEDIR.TAG").exists());
    if let Some(root) = tagged.or_else(|| out.ancestors().nth(4)) {
        publish(&guest, root)?;
    }
    Ok(())
}

fn variable(name: &str) -> Result<OsString, String> {
    env::var_os(name).ok_or_else(|| format!("cargo did not set {name}"))
}

/// Prints the inputs of the guest's build, for cargo to watch.
fn rerun_if_changed(workspace: &Path) {
    for path in ["guest/Cargo.toml", "guest/src", "guest/link.ld", "crates/guest-abi", "Cargo.toml", "Cargo.lock"] {
        println!("cargo::rerun-if-changed={}", workspace.join(path).display());
    }
    println!("cargo::rerun-if-changed=build.rs");
}

/// Whether a variable of the outer build would change the inner one.
fn leaks(name: &OsString) -> bool {
    let Some(name) = name.to_str() else { return false };
    const EXACT: [&str; 9] = [
        "RUSTFLAGS",
        "CARGO_BUILD_RUSTFLAGS",
        "CARGO_ENCODED_RUSTFLAGS",
        "RUSTC_WORKSPACE_WRAPPER",
        "CARGO_BUILD_RUSTC_WORKSPACE_WRAPPER",
        "CLIPPY_ARGS",
        "CARGO_INCREMENTAL",
        "CARGO_TARGET_DIR",
        "CARGO_BUILD_TARGET",
    ];
    // Profile overrides; per-target flags; and the variables that cargo sets for this script's own package.
    const PREFIXES: [&str; 6] = [
        "CARGO_PROFILE_",
        "CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS",
        "CARGO_PKG_",
        "CARGO_CFG_",
        "CARGO_FEATURE_",
        "DEP_",
    ];
    EXACT.contains(&name) || PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

/// The guest's compiler flags.
fn flags(workspace: &Path) -> Result<OsString, Box<dyn Error>> {
    let script = workspace.join("guest/link.ld");
    let mut flags: Vec<String> = [
        // Linked to one address, entered without a loader.
        "-Crelocation-model=static",
        // Interrupts run on stacks of their own, but the kernel's own code should not depend on it.
        "-Cno-redzone=yes",
        // CR4.OSFXSR is clear, and some hosts cannot emulate SSE in supervisor code. The compiler warns that the float
        // ABI changes; there are no floats.
        "-Ctarget-feature=-sse,-sse2",
        "-Clink-arg=-nostartfiles",
        "-Clink-arg=-nostdlib",
        "-Clink-arg=-static",
        "-Clink-arg=-no-pie",
        "-Clink-arg=-Wl,--build-id=none",
        "-Clink-arg=-Wl,-z,max-page-size=4096",
        "-Clink-arg=-Wl,-z,norelro",
        "-Clink-arg=-Wl,--no-eh-frame-hdr",
    ]
    .map(String::from)
    .to_vec();
    flags.push(format!("-Clink-arg=-T{}", utf8(&script)?));
    // No path of this machine in the file. The guest has no dependency outside the workspace.
    flags.push(format!("--remap-path-prefix={}=/vmm", utf8(workspace)?));
    Ok(flags.join(SEPARATOR).into())
}

fn utf8(path: &Path) -> Result<&str, String> {
    path.to_str().ok_or_else(|| format!("{} is not UTF-8", path.display()))
}

/// Puts the guest into `directory` as `guest.bin`, by a rename: a VMM may be reading the file that is there.
fn publish(guest: &Path, directory: &Path) -> Result<(), String> {
    let temporary = directory.join(format!(".guest.bin.{}", std::process::id()));
    let copy = fs::copy(guest, &temporary).and_then(|_| fs::rename(&temporary, directory.join("guest.bin")));
    copy.map_err(|e| {
        let _ = fs::remove_file(&temporary);
        format!("cannot put the guest into {}: {e}", directory.display())
    })
}
