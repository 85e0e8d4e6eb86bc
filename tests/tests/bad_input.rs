//! What cannot be done: one clear line, the right exit code, nothing half-written.

use std::{
    fs,
    os::unix::{
        fs::{MetadataExt, PermissionsExt},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use vm_tests::{Ended, Lab, finish, guest, guest_without, require_kvm, skip, vmm};

fn boot(lab: &Lab, image: &str, flags: &str) -> Ended {
    lab.run(&format!("--guest {image} {flags}"))
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// A copy of the guest, changed.
fn changed_guest(lab: &Lab, name: &str, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(guest()).unwrap();
    change(&mut bytes);
    fs::write(lab.path(name), bytes).unwrap();
}

/// The file offset of the last PT_LOAD's p_memsz (System V ABI, `Elf64_Phdr`).
fn last_memsz(bytes: &[u8]) -> usize {
    let number = |at: usize, size: usize| {
        bytes[at..at + size].iter().rev().fold(0usize, |number, byte| number << 8 | usize::from(*byte))
    };
    let (table, entry, count) = (number(32, 8), number(54, 2), number(56, 2));
    let loads = (0..count).map(|n| table + n * entry).filter(|at| number(*at, 4) == 1);
    loads.max().unwrap() + 40
}

// Catches: a panic, a hang or a wrong exit code on a file that is no guest.
#[test]
fn images_that_are_none() {
    let lab = Lab::new();
    let whole = fs::read(guest()).unwrap();
    fs::write(lab.path("text"), "#!/bin/sh\n").unwrap();
    fs::write(lab.path("empty"), "").unwrap();
    boot(&lab, "absent", "").refused(2, &["absent", "No such file"]);
    boot(&lab, "text", "").refused(2, &["text", "not an ELF64"]);
    boot(&lab, "empty", "").refused(2, &["empty", "not an ELF64"]);
    boot(&lab, ".", "").refused(2, &["directory"]);
    changed_guest(&lab, "arm", |bytes| bytes[18] = 183);
    boot(&lab, "arm", "").refused(2, &["x86-64"]);
    require_kvm!();
    for length in [10, 63, 64, 100, 300, 4096, 20_000, whole.len() / 2, whole.len() - 1] {
        fs::write(lab.path("cut"), &whole[..length]).unwrap();
        boot(&lab, "cut", "--cmdline count=1").refused(2, &["guest image cut: "]);
    }
}

// Catches: an image that is written past the end of guest RAM, or a message without what would help.
#[test]
fn images_larger_than_memory() {
    require_kvm!();
    let lab = Lab::new();
    for (name, size) in [("bss", 64u64 << 20), ("huge", u64::MAX), ("wraps", u64::MAX - 0x10_0000)] {
        changed_guest(&lab, name, |bytes| {
            let at = last_memsz(bytes);
            bytes[at..at + 8].copy_from_slice(&size.to_le_bytes());
        });
        boot(&lab, name, "--memory 2M").refused(2, &[name, "--memory"]);
    }
    boot(&lab, "bss", "--memory 128M --cmdline count=1").expect(0);
    boot(&lab, "bss", "--memory 1M").refused(2, &["memory size"]);
    boot(&lab, "bss", "--memory lots").refused(2, &["--memory"]);
}

// Catches: numbers that are not a frequency, taken as one.
#[test]
fn frequencies_that_no_tsc_has() {
    let lab = Lab::new();
    for khz in ["0", "9999", "100000001", "18446744073709551616", "-5", "2.6", "fast"] {
        lab.run(&format!("--guest x --tsc-khz={khz}")).refused(2, &["--tsc-khz"]);
        lab.run(&format!("restore x --tsc-khz={khz}")).refused(2, &["--tsc-khz"]);
        lab.run(&format!("--guest x --migrate-every 1s --tsc-khz-cycle=2600000,{khz}"))
            .refused(2, &["--tsc-khz-cycle"]);
    }
}

fn saved(lab: &Lab) {
    let flags = "--time virtual --tsc-khz 2600000 --save-at 50ms --save-to snapshot";
    let run = lab.boot("clockevent=kvm-tsc-deadline count=20", flags);
    assert_eq!(run.summary.word("finish"), "saved");
}

// Catches: a restore to a frequency for which the arithmetic was not made.
#[test]
fn frequencies_too_far_from_the_saved_one() {
    require_kvm!();
    let lab = Lab::new();
    saved(&lab);
    for khz in [259_999, 26_000_001] {
        let flags = format!("restore snapshot --tsc-khz {khz}");
        lab.run(&flags).refused(2, &[&khz.to_string(), "0.1 to 10 times", "2600000"]);
    }
    for khz in [260_000, 26_000_000] {
        let _ = lab.restore("snapshot", &format!("--tsc-khz {khz}"));
    }
}

// Catches: half a snapshot left where none can be made, or a user's files overwritten.
#[test]
fn directories_that_cannot_take_a_snapshot() {
    require_kvm!();
    let lab = Lab::new();
    let save =
        |to: &str| boot(&lab, guest().to_str().unwrap(), &format!("--time virtual --save-at 50ms --save-to {to}"));
    fs::create_dir(lab.path("occupied")).unwrap();
    fs::write(lab.path("occupied/state"), "mine").unwrap();
    fs::write(lab.path("file"), "mine").unwrap();
    save("occupied").refused(2, &["occupied", "not empty"]);
    save("file").refused(2, &["file", "not a directory"]);
    save("absent/snapshot").refused(2, &["absent"]);
    save("/proc/snapshot").refused(2, &["/proc"]);
    assert_eq!(fs::read(lab.path("occupied/state")).unwrap(), b"mine");
    assert_eq!(fs::read(lab.path("file")).unwrap(), b"mine");
    assert_eq!(
        (names(&lab.path("")), names(&lab.path("occupied"))),
        (vec!["file".to_owned(), "occupied".to_owned()], vec!["state".to_owned()])
    );
}

// Catches: a damaged snapshot that is restored, wholly or in part.
#[test]
fn snapshots_that_were_changed() {
    require_kvm!();
    let lab = Lab::new();
    saved(&lab);
    let [state, memory] = ["state", "memory"].map(|name| lab.path("snapshot").join(name));
    let refused = |file: &PathBuf, what: &str| {
        let ended = lab.run("restore snapshot");
        ended.refused(2, &[file.to_str().unwrap().rsplit_once("/snapshot/").unwrap().1]);
        assert!(ended.stdout.is_empty(), "{what}: the guest ran: {ended:#?}");
    };
    let whole = fs::read(&state).unwrap();
    for length in [0, 1, 8, 12, 100, whole.len() / 2, whole.len() - 1] {
        fs::write(&state, &whole[..length]).unwrap();
        refused(&state, "cut short");
    }
    // Every part of the file: header, names, checksums, each section.
    for at in (0..whole.len()).step_by(whole.len() / 60) {
        let mut edited = whole.clone();
        edited[at] ^= 1;
        fs::write(&state, edited).unwrap();
        refused(&state, "a bit flipped");
    }
    fs::write(&state, [whole.as_slice(), b"x"].concat()).unwrap();
    refused(&state, "longer");
    fs::remove_file(&state).unwrap();
    refused(&state, "absent");
    fs::write(&state, &whole).unwrap();

    let file = fs::File::options().write(true).open(&memory).unwrap();
    let size = file.metadata().unwrap().len();
    for length in [0, 4096, size - 1, size + 1] {
        file.set_len(length).unwrap();
        refused(&memory, "another size");
    }
    // As long as it was, but not what it was: the last set_len(0) left zeros.
    file.set_len(size).unwrap();
    refused(&memory, "zeros");
    fs::remove_file(&memory).unwrap();
    refused(&memory, "absent");
    lab.run("restore nothing").refused(2, &["nothing"]);
    lab.run("snapshot show nothing").refused(2, &["nothing"]);
}

// Catches: virtual time or trapping that silently does nothing for a guest that cannot be trapped.
#[test]
fn a_guest_without_trap_sites() {
    require_kvm!();
    let lab = Lab::new();
    fs::write(lab.path("plain"), guest_without(".trap_sites")).unwrap();
    for flags in ["--tsc trapped", "--time virtual"] {
        boot(&lab, "plain", flags).refused(2, &["plain", "trap sites", flags]);
    }
    // Nothing else is wrong with it.
    let _ = boot(&lab, "plain", "--cmdline count=2").expect(0);
    boot(&lab, guest().to_str().unwrap(), "--time virtual --tsc host").refused(2, &["--time virtual", "--tsc host"]);
}

// Catches: flags that mean nothing together, taken anyway.
#[test]
fn flags_that_do_not_go_together() {
    let lab = Lab::new();
    for flags in [
        "--guest x --save-at 1s",
        "--guest x --save-to d",
        "--guest x --migrate-every 0s",
        "--guest x --migrate-every soon",
        "--guest x --tsc-khz-cycle 1000000",
        "--guest x --paused",
        "--cmdline hz=1",
        "--guest x --deadline later",
        "restore",
        "ctl --api-sock s",
        "--no-such-flag",
    ] {
        assert_eq!(lab.run(flags).code(), 2, "{flags}");
    }
}

// Catches: a host without KVM that gets another message than that.
#[test]
fn no_dev_kvm() {
    let _ = vmm();
    let mount = "mount -t tmpfs none /dev && exec \"$0\" \"$@\"";
    let hide = |program: &Path, args: &[&str]| {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--map-root-user", "sh", "-c", mount]).arg(program).args(args);
        command
    };
    match hide(Path::new("true"), &[]).output() {
        Ok(output) if output.status.success() => {}
        Ok(output) => skip!("/dev cannot be hidden from a process here: unshare: {}", output.status),
        Err(error) => skip!("/dev cannot be hidden from a process here: unshare: {error}"),
    }
    let ended = finish(&mut hide(vmm(), &["--guest", guest().to_str().unwrap()]));
    ended.refused(3, &["/dev/kvm", "does not exist"]);
}

// Catches: a user without the right to use KVM left with an errno.
#[test]
fn forbidden_dev_kvm() {
    const NOBODY: u32 = 65_534;
    let lab = Lab::new();
    let others = fs::metadata("/dev/kvm").map(|meta| meta.permissions().mode() & 0o007);
    let root = fs::metadata("/proc/self").is_ok_and(|me| me.uid() == 0);
    if !root || others.map_or(true, |mode| mode != 0) {
        skip!("needs root and a /dev/kvm that others may not open");
    }
    // In a directory that every user may enter and read, which the build's directory may not be.
    let [program, image] = [("vmm", vmm()), ("guest", guest())].map(|(name, from)| {
        fs::copy(from, lab.path(name)).unwrap();
        fs::set_permissions(lab.path(name), fs::Permissions::from_mode(0o755)).unwrap();
        lab.path(name)
    });
    fs::set_permissions(lab.path(""), fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = Command::new(program);
    command.arg("--guest").arg(image).current_dir("/").uid(NOBODY).gid(NOBODY);
    finish(&mut command).refused(3, &["/dev/kvm", "Permission denied"]);
}

// Catches: a panic of a command whose reader has gone (`vmm snapshot show … | head -1`).
#[test]
fn output_into_a_closed_pipe() {
    require_kvm!();
    let lab = Lab::new();
    saved(&lab);
    for command in ["snapshot show snapshot", "snapshot show --json snapshot", "doctor --json"] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let ended = lab.vmm(command).stdout(writer).stderr(Stdio::piped()).output().unwrap();
        let said = String::from_utf8_lossy(&ended.stderr);
        assert_eq!(ended.status.code(), Some(1), "{command}: {said}");
        assert_eq!(said, "vmm: cannot write to standard output: Broken pipe (os error 32)\n", "{command}");
    }
}
