//! A refusal costs little: no waiting for a file, no reading in vain, no message that quotes a whole file.

use std::{
    fs::{self, File},
    path::Path,
    process::Command,
};

use serde_json::{Value, json};
use vm_tests::{Ended, Lab, finish, kvm, raw, require_kvm, skip_part, state_file::change_sections};

/// The most that a message may say, in bytes: some lines of a screen.
const MESSAGE_BYTES: usize = 8000;

/// As [`Lab::run`], with a limit for the address space: to read or allocate more than that fails.
fn within(lab: &Lab, mib: u32, flags: &str) -> Ended {
    let vmm = lab.vmm(flags);
    let mut shell = Command::new("sh");
    let limit = format!("ulimit -v {}; exec \"$@\"", mib * 1024);
    shell.current_dir(lab.path("")).env_remove("RUST_LOG").args(["-c", &limit, "sh"]);
    finish(shell.arg(vmm.get_program()).args(vmm.get_args()))
}

/// A file of no bytes on the disk.
fn sparse(path: &Path, mib: u64) {
    File::create(path).unwrap().set_len(mib << 20).unwrap();
}

fn saved(lab: &Lab) {
    lab.boot("clockevent=kvm-tsc-deadline count=20", "--time virtual --tsc-khz 2600000 --save-at 50ms --save-to good");
}

/// A copy of that snapshot with other sections.
fn changed(lab: &Lab, change: impl FnMut(&str, Value) -> Option<Value>) {
    let dir = lab.path("snapshot");
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir(&dir).unwrap();
    for file in ["state", "memory"] {
        fs::copy(lab.path("good").join(file), dir.join(file)).unwrap();
    }
    change_sections(&dir.join("state"), change);
}

/// Every command that reads a snapshot refuses it with exit code 2, for this reason, and in bounds.
fn refused_by_all(lab: &Lab, reason: &str) {
    for command in
        ["restore snapshot", "snapshot show snapshot", "snapshot show --json snapshot", "snapshot merge snapshot out"]
    {
        let ended = within(lab, 700, command);
        ended.refused(2, &["snapshot snapshot: ", reason]);
        assert!(ended.stderr.len() < MESSAGE_BYTES && ended.stdout.is_empty(), "{command}: {ended:#?}");
        assert!(!lab.path("out").exists(), "{command}");
    }
}

// Catches: a FIFO that is waited for, and a device that is read for ever, in the place of any file that is read whole.
#[test]
fn what_is_no_regular_file_is_named() {
    let lab = Lab::new();
    let status = Command::new("mkfifo").arg(lab.path("fifo")).status().unwrap();
    assert!(status.success());
    fs::write(lab.path("guest"), raw::multiboot(&raw::SUCCESS)).unwrap();
    for (path, kind) in [("fifo", "a FIFO"), ("/dev/zero", "a device"), (".", "a directory")] {
        let reason = format!("{kind}, not a regular file");
        lab.run(&format!("--guest {path}")).refused(2, &["guest image", path, &reason]);
        lab.run(&format!("--guest guest --initrd {path}")).refused(2, &["initrd", path, &reason]);
        lab.run(&format!("sweep --guest {path} --from 0 --to 1")).refused(2, &[path, &reason]);
        lab.run(&format!("sweep merge {path}")).refused(2, &[path, &reason]);
        for file in ["state", "memory"] {
            let dir = lab.path("snapshot");
            let _ = fs::remove_dir_all(&dir);
            fs::create_dir(&dir).unwrap();
            let target = fs::canonicalize(lab.path(path)).unwrap();
            std::os::unix::fs::symlink(target, dir.join(file)).unwrap();
            if file == "state" {
                lab.run("restore snapshot").refused(2, &["snapshot/state", &reason]);
                lab.run("snapshot show snapshot").refused(2, &["snapshot/state", &reason]);
            } else if let Err(reason) = kvm() {
                skip_part!("{reason}");
            } else {
                saved(&lab);
                fs::copy(lab.path("good/state"), dir.join("state")).unwrap();
                lab.run("restore snapshot").refused(2, &["snapshot/memory", &reason]);
                fs::remove_dir_all(lab.path("good")).unwrap();
            }
        }
    }
}

// Catches: a gigabyte that is read to learn that it is no guest, or that it does not fit.
#[test]
fn files_that_are_too_large_are_not_read() {
    let lab = Lab::new();
    sparse(&lab.path("zeros"), 1024);
    within(&lab, 300, "--guest zeros").refused(2, &["guest image zeros: not an ELF64"]);
    sparse(&lab.path("larger"), 1025);
    within(&lab, 300, "--guest larger").refused(2, &["guest image larger: larger than 1073741824 bytes"]);
    fs::write(lab.path("guest"), raw::multiboot(&raw::SUCCESS)).unwrap();
    sparse(&lab.path("initrd"), 900);
    within(&lab, 300, "--guest guest --initrd initrd")
        .refused(2, &["initrd of 943718400 bytes", "use a larger --memory"]);
    within(&lab, 300, "sweep merge zeros").refused(2, &["zeros", "larger than"]);
}

// Catches: a line that repeats what 100 KB of a file, or of the command line, say.
#[test]
fn messages_are_bounded() {
    let lab = Lab::new();
    let long = "x".repeat(100_000);
    for flags in [
        format!("--{long}"),
        format!("--guest {long}"),
        format!("restore {long}"),
        format!("--guest x --tsc {long}"),
        long.clone(),
    ] {
        let ended = lab.run(&flags);
        assert_eq!(ended.code(), 2, "{ended:#?}");
        assert!(ended.stderr.len() < MESSAGE_BYTES && ended.stderr.contains('…'), "{} bytes", ended.stderr.len());
    }
    fs::write(lab.path("shard"), format!("{{\"{long}\": 1}}")).unwrap();
    let ended = lab.run("sweep merge shard");
    ended.refused(2, &["shard is not the result of a sweep"]);
    assert!(ended.stderr.len() < MESSAGE_BYTES);
    // A name that moves the cursor.
    let ended = lab.run("--guest \u{1b}[2Jgone");
    ended.refused(2, &["[2Jgone"]);
    assert!(!ended.stderr.contains('\u{1b}'), "{ended:#?}");
}

// Catches: a state file of some MiB that takes gigabytes, and what it says repeated whole.
#[test]
fn hostile_state_files_cost_little() {
    require_kvm!();
    let lab = Lab::new();
    saved(&lab);
    let section = |wanted: &'static str, value: Value| {
        move |name: &str, old: Value| Some(if name == wanted { value.clone() } else { old })
    };
    changed(&lab, section("cpus", json!(vec![0; 5_000_000])));
    refused_by_all(&lab, "section `cpus` has 10000001 bytes, more than the 4194304 that it may have");
    changed(&lab, section("cpus", json!(vec![0; 2_000_000])));
    refused_by_all(&lab, "section `cpus` cannot be read");
    changed(&lab, section("devices", json!({ "y".repeat(100_000): 1 })));
    refused_by_all(&lab, "section `devices` cannot be read: unknown field `yyy");
    changed(&lab, |name, mut old| {
        if name == "machine" {
            old["image"] = json!("\u{1b}[31m".repeat(20_000));
        }
        Some(old)
    });
    refused_by_all(&lab, "the name of its image has 100000 bytes");
    changed(&lab, |name, mut old| {
        if name == "cpus" {
            let leaf = old["user"][0]["cpuid"][0].clone();
            old["user"][0]["cpuid"] = json!(vec![leaf; 20_000]);
        }
        Some(old)
    });
    refused_by_all(&lab, "cpu 0: more than 256 CPUID leaves");
    // A name that fits is shown cut, and does nothing to the terminal.
    changed(&lab, |name, mut old| {
        if name == "machine" {
            old["image"] = json!("\u{1b}[31m".repeat(2000));
        }
        Some(old)
    });
    let shown = lab.run("snapshot show snapshot").expect(0).stdout;
    assert!(shown.len() < MESSAGE_BYTES && !shown.contains('\u{1b}') && shown.contains('…'), "{shown}");
}

// Catches: a snapshot that no VM was saved as, and that is shown or merged as if it were, or that ends with another
// exit code.
#[test]
fn snapshots_that_contradict_themselves_are_refused_by_all() {
    require_kvm!();
    let lab = Lab::new();
    saved(&lab);
    let clock = |change: fn(&mut Value)| {
        move |name: &str, mut old: Value| {
            if name == "clock" {
                change(&mut old);
            }
            Some(old)
        }
    };
    changed(&lab, clock(|clock| clock["moment"]["vm"] = json!(clock["moment"]["vm"].as_u64().unwrap() + 1)));
    refused_by_all(&lab, "the saved VM time is 50000001 ns, but the saved page gives 50000000 ns");
    changed(&lab, clock(|clock| clock["moment"]["tsc"] = json!(clock["moment"]["tsc"].as_u64().unwrap() + 1000)));
    refused_by_all(&lab, "but the saved page gives");
    changed(&lab, clock(|clock| clock["moment"]["page"]["tsc_timestamp"] = json!(u64::MAX)));
    refused_by_all(&lab, "is before the base 18446744073709551615 of the saved page");
    changed(&lab, clock(|clock| clock["judge"]["tsc"] = json!(u64::MAX)));
    refused_by_all(&lab, "its account of VM time begins at TSC 18446744073709551615, after the saved TSC");
    for base in [0xfe00_0000_u64, 0xfee0_0000, 0xffff_f000] {
        changed(&lab, |name, mut old| {
            if name == "memory" {
                old["regions"][0]["guest_base"] = json!(base);
            }
            Some(old)
        });
        refused_by_all(&lab, "where the local APICs are");
    }
    changed(&lab, |name, mut old| {
        if name == "memory" {
            old["regions"][0]["guest_base"] = json!((1_u64 << 52) - 4096);
        }
        Some(old)
    });
    refused_by_all(&lab, "ends beyond 52 address bits");
    changed(&lab, |name, old| Some(if name == "cpus" { json!({ "user": [] }) } else { old }));
    refused_by_all(&lab, "0 vCPUs are not possible");
    // As it was, it is good.
    changed(&lab, |_, old| Some(old));
    lab.restore("snapshot", "");
    lab.run("snapshot merge snapshot out").expect(0);
    lab.run("snapshot show out").expect(0);
}

// Catches: flags of one kind that end with exit codes of two.
#[test]
fn a_file_that_cannot_be_written_has_one_exit_code() {
    require_kvm!();
    let lab = Lab::new();
    for flag in ["trace", "summary", "report"] {
        let ended = lab.run(&format!(
            "--guest {} --time virtual --cmdline count=3 --{flag} /dev/full",
            vm_tests::guest().display()
        ));
        assert_eq!(ended.code(), 2, "{flag}: {ended:#?}");
        assert!(ended.stderr.contains("/dev/full: No space left on device"), "{flag}: {ended:#?}");
    }
}

// Catches: an offset into a code segment that is printed as an address, and a message that does not name the vCPU.
#[test]
fn a_vcpus_place_is_its_number_and_a_linear_address() {
    require_kvm!();
    let lab = Lab::new();
    // lgdt [0x100040]; jmp 8:0x2e, in a code segment that begins at 0x100000; what follows, from 0x10002e on.
    let based = |rest: &[u8]| {
        let mut code = vec![0x0f, 0x01, 0x15, 0x40, 0, 0x10, 0, 0xea, 0x2e, 0, 0, 0, 8, 0];
        code.extend(rest);
        code.resize(0x20, 0);
        code.extend([15, 0, 0x48, 0, 0x10, 0, 0, 0]);
        code.extend([0u64, 0x00cf_9b10_0000_ffff].map(u64::to_le_bytes).concat());
        raw::multiboot(&code)
    };
    let run = |image: &[u8], flags: &str| {
        fs::write(lab.path("image"), image).unwrap();
        lab.run(&format!("--guest image {flags}"))
    };
    // cli; hlt: the address is that after it.
    for flags in ["", "--cpus 3", "--lapic kvm"] {
        let ended = run(&based(&[0xfa, 0xf4]), flags);
        if ended.code() == 3 {
            skip_part!("{flags:?} is not to be had here");
            continue;
        }
        ended.refused(1, &["cpu 0: the guest halted at 0x100030 with interrupts off"]);
    }
    // jmp to itself, until it is stopped.
    let spins = run(&based(&[&raw::INTERRUPTIBLE[..], &[0xeb, 0xfe]].concat()), "--timeout 200ms");
    spins.refused(1, &["has not ended after 200ms: cpu 0 at 0x100033, interrupts on"]);
    // lidt [0x500], where zeros are; int3: a triple fault, by which kernels reboot.
    let reboots = run(&based(&[0x0f, 0x01, 0x1d, 0, 5, 0, 0, 0xcc]), "--timeout 60s");
    reboots.refused(1, &["the guest's CPU shut down (triple fault)"]);
    // ud2 without a handler: a triple fault, or what KVM cannot emulate.
    run(&based(&[0x0f, 0x0b]), "--timeout 60s").refused(1, &["vmm: cpu 0: "]);
}
