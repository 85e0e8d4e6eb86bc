//! Files that can break a VM: one that may not grow, one that is truncated, one that a killed VMM left.

use std::{
    fs::{self, File},
    os::unix::net::UnixStream,
    process::Command,
    thread,
    time::Duration,
};

use vm_tests::{Lab, finish, require_kvm, start};

/// Time between two polls for something that another process is about to do.
const LOOK_AGAIN: Duration = Duration::from_millis(2);

/// Saves a guest that writes more pages, after every tick, than a restore checks before it runs.
fn save(lab: &Lab) {
    lab.boot("scenario=idle hz=100 touch=600", "--save-at 300ms --save-to snapshot");
}

fn truncate(lab: &Lab, bytes: u64) {
    File::options().write(true).open(lab.path("snapshot/memory")).unwrap().set_len(bytes).unwrap();
}

// Catches: a VM that ends by SIGBUS, with nothing said, when its memory file becomes shorter; one that goes on with
// what KVM makes of memory that it cannot read; and one that ends well.
#[test]
fn a_memory_file_that_is_truncated_under_the_vm_is_reported() {
    require_kvm!();
    for (flags, bytes) in [("", 0), ("--verify now", 0), ("", 3 << 20), ("--time virtual", 1 << 20), ("--paused", 0)] {
        let lab = Lab::new();
        save(&lab);
        let mut process = start(&mut lab.vmm(&format!("restore snapshot --api-sock s {flags}")));
        while UnixStream::connect(lab.path("s")).is_err() {
            assert!(!process.has_ended(), "{:#?}", process.finish());
            thread::sleep(LOOK_AGAIN);
        }
        truncate(&lab, bytes);
        // The VMM notices when it reads a lost page. A snapshot reads all pages.
        let _ = lab.run("ctl --api-sock s snapshot second");
        let _ = lab.run("ctl --api-sock s quit");
        process.finish().refused(2, &["vmm: snapshot snapshot: memory file snapshot/memory ", "truncated"]);
        assert!(!lab.path("second").exists(), "{flags}");
    }
}

// Catches: a process that ends by SIGXFSZ, with nothing said, when it reaches its RLIMIT_FSIZE.
#[test]
fn a_file_that_may_not_grow_is_an_error_like_any() {
    require_kvm!();
    let lab = Lab::new();
    let limited = |flags: &str| {
        let vmm = lab.guest("", flags);
        let mut shell = Command::new("sh");
        shell.current_dir(lab.path("")).env_remove("RUST_LOG").args(["-c", "ulimit -f 64; exec \"$@\"", "sh"]);
        finish(shell.arg(vmm.get_program()).args(vmm.get_args()))
    };
    let save = limited("--save-at 20ms --save-to snapshot");
    assert_eq!(save.code(), 1, "{save:#?}");
    assert!(save.stderr.contains("memory: cannot write: File too large"), "{save:#?}");
    let trace = limited("--time virtual --trace t");
    assert!(trace.code() != 0 && trace.stderr.contains("File too large"), "{trace:#?}");
    // Nothing but the trace.
    let names: Vec<_> = fs::read_dir(lab.path("")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["t"]);
}

// Catches: guest memory that a killed save leaves for ever.
#[test]
fn the_next_save_removes_what_a_killed_one_left() {
    require_kvm!();
    let lab = Lab::new();
    let unfinished = || {
        let names = fs::read_dir(lab.path("")).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.starts_with(".snapshot.")).count()
    };
    // Killed while it writes; if it was faster than that, again.
    for _ in 0..50 {
        let _ = fs::remove_dir_all(lab.path("snapshot"));
        let process = start(&mut lab.guest("touch=2000", "--save-at 100ms --save-to snapshot"));
        while unfinished() == 0 && !lab.path("snapshot").exists() {
            thread::yield_now();
        }
        drop(process);
        if unfinished() != 0 {
            break;
        }
    }
    assert_eq!(unfinished(), 1);
    let _ = fs::remove_dir_all(lab.path("snapshot"));
    lab.boot("", "--save-at 20ms --save-to snapshot");
    assert_eq!(unfinished(), 0);
    lab.restore("snapshot", "");
}
