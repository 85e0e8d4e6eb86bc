//! The guest's time of day after a stop: the wall clock that it asked for at boot, and its kvmclock.

use std::{thread, time::Duration};

use vm_tests::{Lab, Summary, require, require_kvm, true_tsc_frequency};

/// How long the VM is saved.
const SAVED: Duration = Duration::from_millis(300);
/// By how much a right time of day may be off: wall clock and TSC are read together to within microseconds, but NTP may
/// slew the wall clock, and the TSC's frequency is known to some ppm. What is to be found is 300 ms.
const RIGHT_NS: u64 = 50_000_000;

fn error_ns(summary: &Summary) -> i64 {
    summary.value("wall_error_ns").as_i64().expect("a number")
}

// Catches: a guest whose time of day is behind by the time that it was saved, and nobody says so; one that catches up
// and is said to be behind.
#[test]
fn under_freeze_it_is_behind_by_the_downtime_and_under_catch_up_right() {
    require_kvm!();
    require!(true_tsc_frequency());
    let lab = Lab::new();
    lab.boot("hz=100 count=40", "--save-at 100ms --save-to snap");
    thread::sleep(SAVED);
    let frozen = lab.restore("snap", "--downtime freeze");
    let behind = error_ns(&frozen.summary).saturating_neg();
    assert!(behind >= i64::try_from(SAVED.as_nanos()).unwrap(), "{behind} ns behind");
    let caught_up = lab.restore("snap", "--downtime catch-up");
    assert!(error_ns(&caught_up.summary).unsigned_abs() <= RIGHT_NS, "{:#?}", caught_up.summary);
    let judged = |flags: &str| lab.run(&format!("restore snap --fail-on wall=200ms {flags}"));
    let failed = judged("--downtime freeze").expect(1);
    assert!(failed.stderr.contains("the guest's time of day is "), "{failed:#?}");
    assert!(failed.stderr.contains(" behind the host's, the limit is 200ms"), "{failed:#?}");
    judged("--downtime catch-up").expect(0);
}

// Catches: a verdict about a time of day that there is none of.
#[test]
fn it_is_not_judged_where_nobody_knows_it() {
    require_kvm!();
    let lab = Lab::new();
    for flags in ["--time virtual", "--lapic kvm"] {
        let run = lab.boot("hz=100 count=5", flags);
        assert!(run.summary.value("wall_error_ns").is_null(), "{flags}: {:#?}", run.summary);
    }
    require!(true_tsc_frequency());
    let run = lab.boot("hz=100 count=5", "--time real");
    assert!(error_ns(&run.summary).unsigned_abs() <= RIGHT_NS, "{:#?}", run.summary);
}
