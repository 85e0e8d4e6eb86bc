//! What a tick costs the host, in calls. Counts, because times are the machine's: a count that grows is a regression on
//! every machine.

use std::fs;

use vm_tests::{Lab, finish, require, require_kvm, strace};

const CMDLINE: &str = "clockevent=kvm-tsc-deadline hz=250";

/// Tries, of which one must be within the bounds: a machine that is busy elsewhere adds kicks and late ticks to any of
/// them, and what a tick costs shows in all.
const TRIES: usize = 8;

/// What `costs/{name}` counts for a thousand ticks: the difference of a long and a short run, so that the start does
/// not count.
fn a_thousand_ticks(lab: &Lab, flags: &str, names: &[&str]) -> Vec<u64> {
    let counts = |count: u64| -> Vec<u64> {
        let run = lab.boot(&format!("{CMDLINE} count={count}"), flags);
        run.in_order(count);
        names.iter().map(|name| run.summary.count(&format!("costs/{name}"))).collect()
    };
    let (few, many) = (counts(50), counts(300));
    few.into_iter().zip(many).map(|(few, many)| many.saturating_sub(few) * 4).collect()
}

// Catches: another exit in the tick, an ioctl where the shared registers would do, a timer set twice, a second sleep.
// In virtual time exits are exact: see ticks.rs.
#[test]
fn a_tick_in_real_time_takes_two_exits_one_timer_and_no_other_vcpu_ioctl() {
    require_kvm!();
    let lab = Lab::new();
    for (flags, exits) in [("--tsc host", 2), ("--tsc host --pv-eoi off", 3)] {
        let names = ["exits", "entries", "vcpu_ioctls", "timers_set", "sleeps"];
        // Five in a hundred for kicks that bring a vCPU back in vain, and for ticks that are late.
        let most = [exits * 1000 + 50, exits * 1000 + 50, 0, 1050, 1050];
        let mut tries = Vec::new();
        let within = (0..TRIES).any(|_| {
            let counts = a_thousand_ticks(&lab, flags, &names);
            // Each tick arms its deadline: less is a counter that does not count. (On a machine that is too slow the
            // next deadline has passed before the guest halts, and it does not exit for that.)
            assert!(counts[0] >= 1000, "{flags}: {names:?} of 1000 ticks: {counts:?}");
            let within = counts.iter().zip(&most).all(|(count, most)| count <= most);
            tries.push(counts);
            within
        });
        assert!(within, "{flags}: {names:?} of 1000 ticks, wanted {most:?} at most: {tries:?}");
    }
}

// Catches: a system call in the tick that no counter counts: a lock that is fought for, a read, a write, a clock.
#[test]
fn a_tick_in_real_time_takes_five_system_calls() {
    require_kvm!();
    let summing = || strace(&["-f", "-qq", "-c", "-U", "calls,name"]);
    require!(summing());
    let lab = Lab::new();
    let calls = |count: u64| -> u64 {
        let vmm = lab.guest(&format!("clockevent=kvm-tsc-deadline hz=100 count={count}"), "--tsc host");
        let mut strace = summing().expect("found above");
        strace.current_dir(lab.path(".")).args(["-o", "calls", "--"]);
        strace.arg(vmm.get_program()).args(vmm.get_args());
        finish(&mut strace).expect(0);
        let table = fs::read_to_string(lab.path("calls")).expect("strace's table");
        let total = table.lines().find(|line| line.trim_end().ends_with("total")).unwrap_or_else(|| panic!("{table}"));
        total.split_whitespace().next().and_then(|calls| calls.parse().ok()).unwrap_or_else(|| panic!("{table}"))
    };
    // Of each of the 200: KVM_RUN twice, the timer set, the sleep, the return from the timer's signal. One in ten more
    // for a guest that strace makes late.
    let mut tries = Vec::new();
    let within = (0..TRIES).any(|_| {
        let took = calls(250).saturating_sub(calls(50));
        tries.push(took);
        took <= 200 * 5 + 100
    });
    assert!(within, "200 ticks took so many system calls: {tries:?}");
}
