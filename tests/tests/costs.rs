//! What a tick costs the host, in calls. Counts, because times are the machine's: a count that grows is a regression on
//! every machine.

use std::{fs, process::Command};

use vm_tests::{Lab, finish, kvm};

const CMDLINE: &str = "clockevent=kvm-tsc-deadline hz=500";

/// What `costs/{name}` counts for a thousand ticks: the difference of a long and a short run, so that the start does not
/// count. The least of three, for a tick that a busy host delays costs a call more or less.
fn a_thousand_ticks(lab: &Lab, flags: &str, names: &[&str]) -> Vec<u64> {
    let counts = |count: u64| -> Vec<u64> {
        let run = lab.boot(&format!("{CMDLINE} count={count}"), flags);
        run.in_order(count);
        names.iter().map(|name| run.summary.count(&format!("costs/{name}"))).collect()
    };
    let mut least = vec![u64::MAX; names.len()];
    for _ in 0..3 {
        let (few, many) = (counts(100), counts(600));
        for (least, (few, many)) in least.iter_mut().zip(few.into_iter().zip(many)) {
            *least = (*least).min(many.saturating_sub(few) * 2);
        }
    }
    least
}

// Catches: another exit in the tick, an ioctl where the shared registers would do, a timer set twice, a second sleep. In
// virtual time exits are exact: see ticks.rs.
#[test]
fn a_tick_in_real_time_takes_two_exits_one_timer_and_no_other_vcpu_ioctl() {
    if !kvm() {
        return;
    }
    let lab = Lab::new();
    for (flags, exits) in [("--tsc host", 2), ("--tsc host --pv-eoi off", 3)] {
        let names = ["exits", "entries", "vcpu_ioctls", "timers_set", "sleeps"];
        let counts = a_thousand_ticks(&lab, flags, &names);
        // Five in a hundred for kicks that bring a vCPU back in vain, and for ticks that are late.
        let bounds = [exits * 1000 + 50, exits * 1000 + 50, 0, 1050, 1050];
        for ((name, count), bound) in names.iter().zip(&counts).zip(bounds) {
            // Less than the guest's own is a counter that does not count.
            assert!(*count >= if *name == "exits" { bound - 100 } else { 0 }, "{flags}: {counts:?}");
            assert!(*count <= bound, "{flags}: {name} of 1000 ticks: {count}, wanted {bound} at most: {counts:?}");
        }
    }
}

// Catches: a system call in the tick that no counter counts: a lock that is fought for, a read, a write, a clock.
#[test]
fn a_tick_in_real_time_takes_five_system_calls() {
    if !kvm() {
        return;
    }
    let trial =
        Command::new("strace").args(["-f", "-qq", "-c", "-U", "calls,name", "-o", "/dev/null", "true"]).output();
    if !trial.is_ok_and(|trial| trial.status.success()) {
        eprintln!("skipped: strace is not installed, is too old for -U, or may not trace");
        return;
    }
    let lab = Lab::new();
    let calls = |count: u64| -> u64 {
        let vmm = lab.guest(&format!("clockevent=kvm-tsc-deadline hz=100 count={count}"), "--tsc host");
        let mut strace = Command::new("strace");
        strace.current_dir(lab.path(".")).args(["-f", "-qq", "-c", "-U", "calls,name", "-o", "calls", "--"]);
        strace.arg(vmm.get_program()).args(vmm.get_args());
        finish(&mut strace).expect(0);
        let table = fs::read_to_string(lab.path("calls")).expect("strace's table");
        let total = table.lines().find(|line| line.trim_end().ends_with("total")).unwrap_or_else(|| panic!("{table}"));
        total.split_whitespace().next().and_then(|calls| calls.parse().ok()).unwrap_or_else(|| panic!("{table}"))
    };
    let least = (0..3).map(|_| calls(250).saturating_sub(calls(50))).min().unwrap_or(u64::MAX);
    // Of each of the 200: KVM_RUN twice, the timer set, the sleep, the return from the timer's signal. One in ten more for
    // a guest that strace makes late.
    assert!(least <= 200 * 5 + 100, "200 ticks took {least} system calls");
}
