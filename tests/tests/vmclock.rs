//! VMClock (`--vmclock on`): what a guest finds in the page after migrations, restores and faults.

use std::{os::unix::net::UnixStream, thread, time::Duration};

use serde_json::json;
use vm_tests::{Lab, Run, Summary, raw, require, require_kvm, state_file::change_sections, true_tsc_frequency};

/// What the guest printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Told {
    /// Real time at the last tick, in nanoseconds.
    real_ns: u64,
    disruptions: u64,
    restores: u64,
    wrong: u64,
    compared: u64,
}

#[track_caller]
fn told(run: &Run) -> Told {
    let line = run.ended.stdout.lines().find(|line| line.contains("vmclock: real time")).expect("a line about VMClock");
    let numbers = line.split(|c: char| !c.is_ascii_digit()).filter_map(|word| word.parse().ok());
    let numbers: Vec<u64> = numbers.collect();
    let &[sec, ns, disruptions, restores, wrong, compared, _worst_ns] = &numbers[..] else { panic!("{line}") };
    Told { real_ns: sec * 1_000_000_000 + ns, disruptions, restores, wrong, compared }
}

/// Virtual time begins with the year 2000.
const EPOCH_NS: u64 = 946_684_800_000_000_000;
const GUEST: &str = "vmclock=on hz=100 count=40";

// Catches: a migration that is not told, one that is told twice, a rate that stays the old one, and real time that is
// lost or gained by a restore: within a nanosecond.
#[test]
fn every_migration_is_told_and_real_time_goes_on() {
    require_kvm!();
    let flags = "--vmclock on --time virtual --tsc-khz 2100000";
    let alone = told(&Lab::new().boot(GUEST, flags));
    assert_eq!(alone, Told { disruptions: 0, restores: 0, wrong: 0, compared: 40, ..alone });
    let cycle = format!("{flags} --migrate-every 90ms --tsc-khz-cycle 1300000,3900000,2600000");
    let run = Lab::new().boot(GUEST, &cycle);
    let migrated = told(&run);
    assert_eq!((migrated.disruptions, migrated.restores), (4, 0));
    assert_eq!((migrated.wrong, migrated.compared), (0, 36));
    // The last tick is 400 ms after the first line of its boot, which is some hundred operations of a microsecond.
    for at in [alone.real_ns, migrated.real_ns] {
        assert!((400_000_000..400_900_000).contains(&(at - EPOCH_NS)), "{at}");
    }
}

// Catches: real time that stands still with VM time under freeze, or counts a downtime twice under catch-up; a restore
// from a snapshot that is not told from a live migration.
#[test]
fn real_time_counts_a_downtime_whatever_the_policy() {
    require_kvm!();
    let lab = Lab::new();
    lab.boot(GUEST, "--vmclock on --time virtual --tsc-khz 2100000 --save-at 105ms --save-to snap");
    // The last tick is at 400 ms of VM time; under catch-up, of the 295 ms that were left none is waited for.
    for (downtime, least_ns) in [("freeze", 3_400_000_000), ("catch-up", 3_105_000_000)] {
        let run = lab.restore("snap", &format!("--tsc-khz 1300000 --downtime {downtime} --downtime-length 3s"));
        let restored = told(&run);
        assert_eq!((restored.disruptions, restored.restores, restored.wrong), (1, 1, 0), "{downtime}");
        let real_ns = restored.real_ns - EPOCH_NS;
        assert!((least_ns..least_ns + 900_000).contains(&real_ns), "{downtime}: {real_ns}");
    }
}

/// Sweeps the exits of one tick: how many points there are, and at how many VMClock was wrong.
#[track_caller]
fn wrong(flags: &str) -> (usize, usize) {
    // The one-shot timer counts VM time: no fault in TSC or page makes it storm, which would end a run before the
    // second tick.
    let cmdline = "clockevent=lapic-oneshot vmclock=on";
    let points = Lab::new().sweep_exits(cmdline, &format!("--vmclock on --ticks 3 {flags}"));
    let wrong = points.iter().filter(|point| point["outcomes"][0]["wrong_time"] == true).count();
    (points.len(), wrong)
}

// Catches: a page that no fault can leave as it was, a guest that does not notice, and one that is alarmed by ours. At
// the same frequency, with no downtime, a page that was kept is still right.
#[test]
fn a_page_that_is_kept_is_found_wrong_at_another_frequency() {
    require_kvm!();
    for ratio in ["0.5", "0.99", "2"] {
        let (points, found) = wrong(&format!("--ratio {ratio} --inject vmclock-kept"));
        assert_eq!(found, points, "{ratio}");
        assert_eq!(wrong(&format!("--ratio {ratio}")).1, 0, "{ratio}");
    }
    assert_eq!(wrong("--ratio 1 --inject vmclock-kept").1, 0);
    // kvmclock goes on by the old frequency then, and VMClock by the new.
    let (points, found) = wrong("--ratio 0.5 --inject page-not-republished");
    assert_eq!(found, points);
}

fn error_ns(summary: &Summary) -> i64 {
    summary.value("vmclock_error_ns").as_i64().expect("a number")
}

/// As for the guest's time of day: NTP may slew the host's clock, and the TSC's frequency is known to some ppm.
const RIGHT_NS: u64 = 50_000_000;

// Catches: a page in real time that is off by what the VM was saved for, with either kind of LAPIC, and one that is
// judged where real time is not known.
#[test]
fn in_real_time_it_shows_the_hosts_clock_after_a_restore() {
    require_kvm!();
    let lab = Lab::new();
    let run = lab.boot(GUEST, "--vmclock on --time virtual");
    assert!(run.summary.value("vmclock_error_ns").is_null(), "{:#?}", run.summary);
    let run = lab.boot("hz=100 count=5", "--vmclock off");
    assert!(run.summary.value("vmclock_error_ns").is_null(), "{:#?}", run.summary);
    require!(true_tsc_frequency());
    for lapic in ["user", "kvm"] {
        let lab = Lab::new();
        let flags = format!("--lapic {lapic} --vmclock on --save-at 150ms --save-to snap");
        lab.boot("vmclock=on hz=100 count=40 clockevent=kvm-tsc-deadline", &flags);
        thread::sleep(Duration::from_millis(200));
        let run = lab.restore("snap", "--fail-on vmclock=1s");
        assert!(error_ns(&run.summary).unsigned_abs() <= RIGHT_NS, "{lapic}: {:#?}", run.summary);
        let told = told(&run);
        assert_eq!((told.disruptions, told.restores, told.wrong), (1, 1, 0), "{lapic}");
    }
}

// Catches: UTC that begins in 1970 if the VM was saved before it ran.
#[test]
fn a_vm_that_never_ran_begins_with_utc() {
    require_kvm!();
    let lab = Lab::new();
    let flags = "--vmclock on --time virtual --tsc-khz 2100000 --paused --api-sock s";
    let vm = vm_tests::start(&mut lab.guest(GUEST, flags));
    while UnixStream::connect(lab.path("s")).is_err() {
        thread::sleep(Duration::from_millis(5));
    }
    for command in ["snapshot new", "quit"] {
        lab.run(&format!("ctl --api-sock s {command}")).expect(0);
    }
    let _ = vm.finish().expect(0);
    let restored = told(&lab.restore("new", ""));
    assert!((400_000_000..400_900_000).contains(&(restored.real_ns - EPOCH_NS)), "{restored:?}");
    assert_eq!(restored.wrong, 0);
}

// Catches: a snapshot by which the VMM writes where no RAM is, or where a guest does not look, and goes on.
#[test]
fn a_snapshot_that_puts_the_page_elsewhere_is_refused() {
    require_kvm!();
    let lab = Lab::new();
    lab.boot(GUEST, "--vmclock on --cpus 2 --time virtual --save-at 105ms --save-to snap");
    let state = lab.path("snap/state");
    let good = std::fs::read(&state).expect("a state");
    let moved = |cpus: &[usize], edx: u64| {
        std::fs::write(&state, &good).expect("a file");
        change_sections(&state, |name, mut payload| {
            for cpu in cpus.iter().filter(|_| name == "cpus") {
                let leaves = payload["user"][*cpu]["cpuid"].as_array_mut().expect("leaves");
                let leaf = leaves.iter_mut().find(|leaf| leaf["function"] == 0x4000_0101).expect("the leaf");
                leaf["edx"] = json!(edx);
            }
            Some(payload)
        });
        lab.run("restore snap")
    };
    moved(&[0, 1], 0x100).refused(2, &["snap", "a VMClock page at 0x100000d0000", "0xd0000"]);
    moved(&[1], 0x100).refused(2, &["snap", "different VMClock pages"]);
    moved(&[], 0).expect(0);
}

// Catches: an image that is overwritten by the page or by the tables, and then fails as if it were wrong itself.
#[test]
fn an_image_in_the_place_of_the_page_is_refused() {
    require_kvm!();
    let lab = Lab::new();
    for load in [0xd_0000, 0xe_0000] {
        let image = raw::multiboot_with(0x1_0003, [load, load, 0, 0, load + 0x20], &raw::SUCCESS);
        std::fs::write(lab.path("image"), image).expect("a file");
        lab.run("--guest image --vmclock off --acpi off").expect(0);
        lab.run("--guest image --vmclock on").refused(2, &["image", "0xd0000", "--vmclock off"]);
    }
    lab.run("sweep --inject vmclock-kept").refused(2, &["vmclock-kept", "--vmclock on"]);
    lab.run("clock --inject vmclock-kept").refused(2, &["vmclock-kept", "--vmclock on"]);
}

// Catches: a guest that asks for VMClock and silently has none.
#[test]
fn a_guest_without_it_is_told() {
    require_kvm!();
    let ended = vm_tests::finish(&mut Lab::new().guest("vmclock=on", "--time virtual"));
    assert!(ended.stdout.contains("guest: error: vmclock=on: CPUID reports no VMClock page"), "{ended:#?}");
    assert_ne!(ended.code(), 0);
}
