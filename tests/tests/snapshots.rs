//! Snapshots' memory: verified behind the guest's back.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    thread,
    time::Duration,
};

use vm_tests::{Lab, kvm, start};

/// Between two looks at something that another process is about to do.
const LOOK_AGAIN: Duration = Duration::from_millis(2);

/// A snapshot of a guest with half of its ticks to come, whose RAM has a byte that was not saved, where no guest looks.
fn damaged(lab: &Lab) {
    let flags = "--time virtual --tsc-khz 2600000 --save-at 50ms --save-to snapshot";
    let run = lab.boot("clockevent=kvm-tsc-deadline count=20", flags);
    assert_eq!(run.summary.word("finish"), "saved");
    let memory = File::options().write(true).open(lab.path("snapshot/memory")).unwrap();
    memory.write_all_at(&[1], memory.metadata().unwrap().len() - 5000).unwrap();
}

const REASON: [&str; 2] =
    ["snapshot snapshot: memory file snapshot/memory is not what was saved", "the file was changed or damaged"];

// Catches: a guest that ran, and ended, on memory that is not what was saved, and nobody was told.
#[test]
fn damage_is_told_whenever_it_is_looked_for() {
    if !kvm() {
        return;
    }
    let lab = Lab::new();
    damaged(&lab);
    let before = lab.run("restore snapshot --verify now");
    before.refused(2, &REASON);
    assert!(before.stdout.is_empty(), "the guest ran: {before:#?}");
    // Virtual time: the guest ends at once.
    let behind = lab.run("restore snapshot");
    behind.refused(2, &REASON);
    let line = |ended: &vm_tests::Ended| ended.stderr.lines().last().map(str::to_owned);
    assert_eq!(line(&behind), line(&before));
    // Without end, and paused: the news end it.
    lab.run("restore snapshot --time real --verify background").refused(2, &REASON);
    lab.run("restore snapshot --paused --api-sock s").refused(2, &REASON);
}

// Catches: damage that is saved again, with a checksum that says it is well.
#[test]
fn damage_is_not_saved_again() {
    if !kvm() {
        return;
    }
    let lab = Lab::new();
    damaged(&lab);
    lab.run("restore snapshot --save-at 60ms --save-to second").refused(2, &REASON);
    assert!(!lab.path("second").exists());
}

// Catches: a way to end the VM that does not wait for the proof.
#[test]
fn damage_is_told_to_whoever_quits() {
    if !kvm() {
        return;
    }
    let lab = Lab::new();
    damaged(&lab);
    let mut process = start(&mut lab.vmm("restore snapshot --paused --api-sock s"));
    while !lab.path("s").exists() && !process.has_ended() {
        thread::sleep(LOOK_AGAIN);
    }
    // In time or too late: the VM's own end is the same.
    let _ = lab.run("ctl --api-sock s quit");
    process.finish().refused(2, &REASON);
}

// Catches: a verification that changes what a guest does, or that finds damage where there is none.
#[test]
fn undamaged_memory_is_the_same_either_way() {
    if !kvm() {
        return;
    }
    let lab = Lab::new();
    damaged(&lab);
    // Mended, it is the snapshot that it was.
    let memory = File::options().write(true).open(lab.path("snapshot/memory")).unwrap();
    memory.write_all_at(&[0], memory.metadata().unwrap().len() - 5000).unwrap();
    drop(memory);
    for when in ["now", "background"] {
        assert_eq!(lab.restore("snapshot", &format!("--verify {when}")).summary.word("finish"), "ended");
        let run = lab.restore("snapshot", &format!("--verify {when} --save-at 60ms --save-to {when}"));
        assert_eq!(run.summary.word("finish"), "saved");
    }
    assert_eq!(fs::read(lab.path("now/memory")).unwrap(), fs::read(lab.path("background/memory")).unwrap());
}
