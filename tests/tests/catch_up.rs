//! `--downtime catch-up`: after a stop the guest's clock shows what it would show if it had not been stopped, and by
//! how much it may be wrong is in the trace and the summary.

use std::{thread, time::Duration};

use serde_json::Value;
use vm_tests::{Lab, Line, Page, Trace, require, require_kvm, start, true_tsc_frequency};

/// The step of the guest's clock between two of its ticks, in nanoseconds: what its own readings advanced beyond what a
/// page with the numbers of `save` makes of the TSC's advance. Source `host`: the TSC counts on.
fn step(save: &Line, before: &Line, after: &Line) -> i128 {
    let shown = |line: &Line| i128::from(line.field("fired_ns"));
    let page = Page { tsc_timestamp: before.tsc(), system_time: 0, ..save.page() };
    shown(after) - shown(before) - page.ns(after.tsc())
}

/// Each restore of a trace, with its step: between the guest's last tick before the save and its first after the
/// restore.
fn restores(trace: &Trace) -> Vec<(&Line, i128)> {
    let ticks: Vec<&Line> = trace.all("tick").collect();
    let saves: Vec<&Line> = trace.all("save").collect();
    let step_of = |n: usize, restore: &Line| {
        let before = ticks.iter().rev().find(|tick| tick.tsc() <= saves[n].tsc())?;
        let after = ticks.iter().find(|tick| tick.tsc() >= restore.tsc())?;
        // Between them there is no other restore.
        let alone = saves.get(n + 1).is_none_or(|next| after.tsc() <= next.tsc())
            && n.checked_sub(1).is_none_or(|last| before.tsc() >= trace.all("restore").nth(last).unwrap().tsc());
        alone.then(|| step(saves[n], before, after))
    };
    trace.all("restore").enumerate().filter_map(|(n, restore)| Some((restore, step_of(n, restore)?))).collect()
}

/// A step may exceed its bound by this: both pages and both readings round by less than 2 ns, and a page's rate by 1
/// ppb.
fn roundings_ns(restore: &Line) -> i128 {
    8 + i128::from(restore.field("downtime_ns") / 1_000_000_000)
}

// Catches: TSC and clock read at two instants, or VM time that starts at another instant than the TSC. A thread that
// loses its CPU in between makes it worse, never the bound wrong.
#[test]
fn a_pause_moves_the_guests_clock_by_no_more_than_the_bound_says() {
    require_kvm!();
    for flags in ["--lapic user --tsc host", "--lapic kvm --tsc host"] {
        let lab = Lab::new();
        let flags = format!("{flags} --downtime catch-up --api-sock s --trace trace --summary summary");
        let mut process = start(&mut lab.guest("hz=200 count=1000000", &flags));
        let ticks = || {
            let status = lab.run("ctl --api-sock s status");
            let status: Option<Value> = serde_json::from_str(&status.stdout).ok();
            status.and_then(|status| status["ticks"].as_u64()).unwrap_or(0)
        };
        let mut tick_on = || {
            let before = ticks();
            while ticks() < before + 3 {
                assert!(!process.has_ended(), "the VM ended");
                thread::sleep(Duration::from_millis(10));
            }
        };
        tick_on();
        for _ in 0..8 {
            lab.run("ctl --api-sock s pause").expect(0);
            thread::sleep(Duration::from_millis(50));
            lab.run("ctl --api-sock s resume").expect(0);
            tick_on();
        }
        lab.run("ctl --api-sock s quit").expect(0);
        process.finish().expect(0);
        let trace = Trace::read(&lab.path("trace"));
        let restores = restores(&trace);
        assert!(restores.len() >= 8, "{flags}: {trace:?}");
        for (restore, step) in &restores {
            assert!(restore.field("downtime_ns") >= 50_000_000, "{flags}: {restore:?}");
            assert_eq!(restore.word("downtime_clock"), "tsc", "{flags}: {restore:?}");
            let bound = i128::from(restore.field("downtime_error_ns")) + roundings_ns(restore);
            assert!(step.abs() <= bound, "{flags}: a step of {step} ns, {restore:?}");
        }
        let summary: Value = serde_json::from_slice(&std::fs::read(lab.path("summary")).unwrap()).unwrap();
        let all: u64 = trace.all("restore").map(|restore| restore.field("downtime_error_ns")).sum();
        let count = trace.all("restore").count();
        assert_eq!(summary["downtimes"], serde_json::json!({"measured": count, "error_ns": all}), "{flags}");
    }
}

// Catches: a wall clock of the save that is not that of the instant at which VM time stopped, and one of the restore
// that is not that of the instant at which it starts again.
#[test]
fn a_restore_in_another_process_moves_it_by_no_more_than_bound_and_slew() {
    require_kvm!();
    require!(true_tsc_frequency());
    for lapic in ["user", "kvm"] {
        let lab = Lab::new();
        let flags = format!("--lapic {lapic} --tsc host");
        let before = lab.boot_traced("hz=100 count=60", &format!("{flags} --save-at 255ms --save-to s"));
        let after = lab.restore("s", "--tsc host --downtime catch-up");
        let (save, restore) = (before.trace().only("save"), after.trace().only("restore"));
        let clock = restore.word("downtime_clock");
        assert!(["tai", "realtime"].contains(&clock), "{restore:?}");
        let last = before.trace().all("tick").next_back().expect("a tick before the save");
        let step = step(save, last, after.trace().first("tick"));
        // NTP slews the wall clock by at most 500 ppm, and the TSC's frequency is known no better.
        let slew = i128::from(restore.field("downtime_ns")) / 1000;
        let bound = i128::from(restore.field("downtime_error_ns")) + roundings_ns(restore);
        assert!(step.abs() <= bound + slew, "{lapic}: a step of {step} ns, {restore:?}");
    }
}

// Catches: a bound for what was not measured.
#[test]
fn what_is_not_measured_has_no_bound() {
    require_kvm!();
    let lab = Lab::new();
    let _ = lab.boot("hz=100 count=60", "--save-at 255ms --save-to s");
    for flags in ["--downtime freeze", "--downtime catch-up --downtime-length 1s"] {
        let run = lab.restore("s", flags);
        let restore = run.trace().only("restore");
        assert!(!restore.has("downtime_clock") && !restore.has("downtime_error_ns"), "{flags}: {restore:?}");
        assert_eq!((run.summary.count("downtimes/measured"), run.summary.count("downtimes/error_ns")), (0, 0));
    }
}
