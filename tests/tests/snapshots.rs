//! Snapshots' memory: it is verified before it is used, and saved as the changes since an earlier snapshot.

use std::{
    fs::{self, File},
    os::unix::{fs::FileExt, net::UnixStream},
    process::Command,
    thread,
    time::Duration,
};

use serde_json::Value;
use vm_tests::{Ended, Lab, doctor, require_kvm, skip, start};

/// Time between two polls for something that another process is about to do.
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

// Catches: a guest that ran on memory that is not what was saved.
#[test]
fn damage_is_reported_before_the_guest_runs() {
    require_kvm!();
    let lab = Lab::new();
    damaged(&lab);
    for flags in ["--verify now", "", "--time real --verify background", "--paused --api-sock s"] {
        let ended = lab.run(&format!("restore snapshot {flags}"));
        ended.refused(2, &REASON);
        assert!(ended.stdout.is_empty(), "{flags}: the guest ran: {ended:#?}");
        assert_eq!(ended.stderr.lines().count(), 1, "{flags}: {ended:#?}");
    }
}

/// A snapshot of a guest that has written, and goes on writing, more than is checked before it runs; and where the file
/// has the last page of that.
fn large(lab: &Lab) -> u64 {
    lab.boot("scenario=idle hz=100 touch=600", "--save-at 300ms --save-to snapshot");
    let memory = File::open(lab.path("snapshot/memory")).unwrap();
    let (mut page, mut last) = ([0; 4096], 0);
    for at in (0..memory.metadata().unwrap().len()).step_by(4096) {
        memory.read_exact_at(&mut page, at).unwrap();
        if page != [0; 4096] {
            last = at;
        }
    }
    last
}

fn flip(lab: &Lab, at: u64) {
    let memory = File::options().read(true).write(true).open(lab.path("snapshot/memory")).unwrap();
    let mut byte = [0];
    memory.read_exact_at(&mut byte, at).unwrap();
    memory.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
}

// Catches: a page that reaches the guest before it is checked; and a VM that never ends because every thread that could
// end it waits for that page.
#[test]
fn a_damaged_page_that_the_guest_uses_ends_the_vm() {
    require_kvm!();
    let lab = Lab::new();
    let last = large(&lab);
    // Whole, it runs until it is stopped.
    let stopped = lab.run("restore snapshot --timeout 300ms");
    assert!(stopped.stderr.contains("the guest has not ended after 300ms"), "{stopped:#?}");
    flip(&lab, last + 8);
    for flags in
        ["", "--verify background --trace t", "--tsc-khz 2000000 --tsc trapped", "--api-sock s", "--verify now"]
    {
        lab.run(&format!("restore snapshot {flags}")).refused(2, &REASON);
    }
}

// Catches: damage in an unused page that is not found, or that is found and then saved.
#[test]
fn damage_that_the_guest_does_not_use_is_found_and_not_saved() {
    require_kvm!();
    let lab = Lab::new();
    let last = large(&lab);
    flip(&lab, last);
    lab.run("restore snapshot --paused --api-sock s").refused(2, &REASON);
    lab.run("restore snapshot --save-at 301ms --save-to second").refused(2, &REASON);
    lab.run("snapshot merge snapshot second").refused(2, &["memory file snapshot/memory is not what was saved"]);
    assert!(!lab.path("second").exists());
}

// Catches: damage that is saved again, with a checksum that matches it.
#[test]
fn damage_is_not_saved_again() {
    require_kvm!();
    let lab = Lab::new();
    damaged(&lab);
    lab.run("restore snapshot --save-at 60ms --save-to second").refused(2, &REASON);
    assert!(!lab.path("second").exists());
}

// Catches: a way to end the VM that does not wait for the memory verification.
#[test]
fn damage_is_reported_at_the_end_of_the_vm() {
    require_kvm!();
    let lab = Lab::new();
    damaged(&lab);
    let mut process = start(&mut lab.vmm("restore snapshot --paused --api-sock s"));
    while UnixStream::connect(lab.path("s")).is_err() && !process.has_ended() {
        thread::sleep(LOOK_AGAIN);
    }
    // In time or too late: the VM's own end is the same.
    let _ = lab.run("ctl --api-sock s quit");
    process.finish().refused(2, &REASON);
}

// Catches: a verification that changes what a guest does, or that finds damage where there is none.
#[test]
fn undamaged_memory_is_the_same_either_way() {
    require_kvm!();
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

/// A VM with a control socket whose guest ticks without end, and the requests that tests send to it.
struct Ticking<'a> {
    lab: &'a Lab,
    process: vm_tests::Running,
}

impl<'a> Ticking<'a> {
    fn start(lab: &'a Lab, command: &mut Command) -> Self {
        let mut vm = Self { lab, process: start(command) };
        // The file exists a moment before the VMM listens.
        while UnixStream::connect(lab.path("s")).is_err() {
            assert!(!vm.process.has_ended(), "the VM ended: {:#?}", vm.process.finish());
            thread::sleep(LOOK_AGAIN);
        }
        vm
    }

    fn ctl(&self, command: &str) -> Ended {
        self.lab.run(&format!("ctl --api-sock s {command}"))
    }

    fn ticks(&self) -> u64 {
        let status: Value = serde_json::from_str(&self.ctl("status").expect(0).stdout).expect("JSON");
        status["ticks"].as_u64().expect("a number")
    }

    /// Waits until the guest has made new ticks, and pages have changed.
    fn ticks_on(&mut self) {
        let before = self.ticks();
        while self.ticks() < before + 3 {
            assert!(!self.process.has_ended(), "the VM ended");
            thread::sleep(LOOK_AGAIN);
        }
    }

    fn quit(self) {
        let _ = self.ctl("quit").expect(0);
        let ended = self.process.finish().expect(0);
        assert!(ended.stderr.contains(" 0 lost,"), "{ended:#?}");
    }
}

/// Asserts that the chain that ends with `last`, merged, equals the snapshot `whole`, byte for byte.
fn same(lab: &Lab, last: &str, whole: &str) {
    let merged = format!("{last}-merged");
    let _ = lab.run(&format!("snapshot merge {last} {merged}")).expect(0);
    for file in ["memory", "state"] {
        let [one, other] = [&merged, whole].map(|dir| fs::read(lab.path(dir).join(file)).unwrap());
        assert!(one == other, "{file} of {last} is not that of {whole}");
    }
}

/// Chains of changes of a VM with these flags, in which each snapshot must be what the VM was.
fn chains_hold(flags: &str) {
    let lab = Lab::new();
    let cmdline = "scenario=idle hz=250";
    let flags = format!("--api-sock s --track-dirty {flags}");
    let mut vm = Ticking::start(&lab, &mut lab.guest(cmdline, &flags));
    vm.ctl("snapshot early --base none").refused(1, &["has not been saved yet"]);
    let _ = vm.ctl("snapshot 0").expect(0);
    for number in 1..=5 {
        vm.ticks_on();
        // Nothing that was changed until now may be forgotten with what fails, or with the virtual machine.
        vm.ctl(&format!("snapshot 0 --base {}", number - 1)).refused(1, &["exists and is not empty"]);
        if number == 3 && !flags.contains("--lapic kvm") {
            let _ = vm.ctl("migrate --tsc-khz 2000000").expect(0);
        }
        vm.ticks_on();
        let _ = vm.ctl(&format!("snapshot {number} --base {} --stay-paused", number - 1)).expect(0);
        if number != 5 {
            let _ = vm.ctl("resume").expect(0);
        }
    }
    // The VM has stood still since the last one: whole, it is the same.
    let _ = vm.ctl("snapshot whole").expect(0);
    same(&lab, "5", "whole");
    vm.ctl("snapshot next --base 5").refused(1, &["5 is not the latest snapshot of this VM"]);
    let mut latest = "whole";
    if !flags.contains("--lapic kvm") {
        // A paused VM that migrates has a new kvmclock page, which only the VMM has written.
        let _ = vm.ctl("migrate --tsc-khz 2100000").expect(0);
        let _ = vm.ctl("snapshot moved --base whole").expect(0);
        let _ = vm.ctl("snapshot moved-whole").expect(0);
        same(&lab, "moved", "moved-whole");
        latest = "moved-whole";
    }
    let _ = vm.ctl("resume").expect(0);
    vm.ticks_on();
    let _ = vm.ctl(&format!("snapshot next --base {latest}")).expect(0);
    vm.quit();

    let mut ticks = 0;
    for number in ["0", "1", "2", "3", "4", "5", "next"] {
        let mut restore = lab.vmm(&format!("restore {number} --api-sock s --track-dirty --paused"));
        let mut vm = Ticking::start(&lab, &mut restore);
        let saved = vm.ticks();
        assert!(ticks == 0 || saved > ticks, "snapshot {number} was saved after {saved} ticks, the one before {ticks}");
        ticks = saved;
        let _ = vm.ctl("resume").expect(0);
        vm.ticks_on();
        // And on from there: a branch of the chain.
        let _ = vm.ctl(&format!("snapshot {number}-on --base {number} --stay-paused")).expect(0);
        let _ = vm.ctl(&format!("snapshot {number}-whole")).expect(0);
        same(&lab, &format!("{number}-on"), &format!("{number}-whole"));
        vm.quit();
    }
    let shown = lab.run("snapshot show 5-on").expect(0).stdout;
    assert_eq!(shown.lines().filter(|line| line.trim_start().starts_with("chain ")).count(), 7, "{shown}");
}

// Catches: a page that the guest, the VMM or KVM wrote and no snapshot of changes has.
#[test]
fn chains_of_changes() {
    require_kvm!();
    chains_hold("");
}

#[test]
fn chains_of_changes_with_trapped_reads_and_several_cpus() {
    require_kvm!();
    chains_hold("--tsc trapped --cpus 2");
}

#[test]
fn chains_of_changes_in_virtual_time() {
    require_kvm!();
    chains_hold("--time virtual --tsc-khz 2600000");
}

#[test]
fn chains_of_changes_with_kvms_lapic() {
    require_kvm!();
    chains_hold("--lapic kvm");
}

// Catches: a base that is accepted although the pages changed since were not tracked.
#[test]
fn changes_that_were_not_tracked() {
    require_kvm!();
    let lab = Lab::new();
    let mut vm = Ticking::start(&lab, &mut lab.guest("scenario=idle hz=250", "--api-sock s"));
    vm.ticks_on();
    let _ = vm.ctl("snapshot whole").expect(0);
    vm.ctl("snapshot changes --base whole").refused(1, &["start the VM with --track-dirty"]);
    assert!(!lab.path("changes").exists());
    vm.quit();
    let mut vm = Ticking::start(&lab, &mut lab.vmm("restore whole --api-sock s"));
    vm.ticks_on();
    vm.ctl("snapshot changes --base whole").refused(1, &["start the VM with --track-dirty"]);
    vm.quit();
}

// Catches: a chain that is restored without one of its parts, or with another in its place.
#[test]
fn chains_that_are_not_whole() {
    require_kvm!();
    let lab = Lab::new();
    let mut vm = Ticking::start(&lab, &mut lab.guest("scenario=idle hz=250", "--api-sock s --track-dirty"));
    for command in ["snapshot a", "snapshot b --base a", "snapshot c --base b"] {
        vm.ticks_on();
        let _ = vm.ctl(command).expect(0);
    }
    vm.quit();
    let refused = |what: &[&str]| {
        lab.run("restore c").refused(2, what);
        lab.run("snapshot show c").refused(2, what);
        lab.run("snapshot merge c merged").refused(2, what);
        assert!(!lab.path("merged").exists());
    };
    fs::rename(lab.path("a"), lab.path("hidden")).unwrap();
    refused(&["b holds changes only, and its base cannot be used", "a/state: No such file"]);
    fs::create_dir(lab.path("a")).unwrap();
    for file in ["state", "memory"] {
        fs::copy(lab.path("c").join(file), lab.path("a").join(file)).unwrap();
    }
    refused(&["b holds changes only, and", "a is not the snapshot that they were made to"]);
    fs::remove_dir_all(lab.path("a")).unwrap();
    fs::rename(lab.path("hidden"), lab.path("a")).unwrap();
    let memory = File::options().write(true).open(lab.path("a/memory")).unwrap();
    memory.write_all_at(&[1], memory.metadata().unwrap().len() - 5000).unwrap();
    for when in ["now", "background"] {
        lab.run(&format!("restore c --timeout 60s --verify {when}")).refused(2, &["a/memory is not what was saved"]);
    }
}

// Catches: a VMM that needs KVM_CAP_XCRS: hosts whose CPU has no XSAVE have no XCR0 to save.
#[test]
fn a_host_without_xsave_saves_and_restores() {
    require_kvm!();
    let lab = Lab::new();
    let flags = "--time virtual --tsc-khz 2600000 --save-at 50ms";
    let _ = lab.boot("count=20", &format!("{flags} --save-to bare --emulate-host no-xsave"));
    assert!(lab.run("snapshot show --json bare").expect(0).stdout.contains("\"xcrs\": []"));
    lab.restore("bare", "--emulate-host no-xsave").in_order(16);
    // A host that has more will do.
    lab.restore("bare", "").in_order(16);
    let without: Value =
        serde_json::from_str(&lab.run("doctor --json --emulate-host no-xsave").expect(0).stdout).unwrap();
    let xcrs = without["capabilities"].as_array().unwrap().iter().find(|cap| cap["name"] == "KVM_CAP_XCRS").unwrap();
    assert_eq!(xcrs["present"], false);
    let doctor = doctor();
    let xcrs = doctor["capabilities"].as_array().unwrap().iter().find(|cap| cap["name"] == "KVM_CAP_XCRS").unwrap();
    if xcrs["present"] == false {
        skip!("this host has no XSAVE that a guest could miss elsewhere");
    }
    let _ = lab.boot("count=20", &format!("{flags} --save-to full"));
    lab.run("restore full --emulate-host no-xsave").refused(3, &["CPU features", "CPUID.(0xD,0)"]);
}
