//! Several vCPUs, and emulated peculiarities of other hosts.

use vm_tests::{Lab, finish, require_kvm};

// Catches: a migration that loses an IPI or a tick, or lets one CPU's clock fall behind another's.
#[test]
fn a_hundred_migrations_of_four_cpus() {
    require_kvm!();
    for time in ["--time virtual", "--time real --tsc trapped"] {
        let flags = format!("--cpus 4 {time} --migrate-every 29ms --tsc-khz-cycle 1300000,3900000,2600000");
        let run = Lab::new().boot("scenario=smp count=300 hz=100", &flags);
        assert_eq!(run.ended.code(), 0, "{run:#?}");
        assert_eq!(run.summary.count("lost"), 0, "{run:#?}");
        assert_eq!(run.summary.count("ticks/ticks"), 1200, "{run:#?}");
        assert_eq!(run.summary.count("ticks/clock_steps_back"), 0, "{run:#?}");
        assert_eq!(run.summary.count("ticks/ipis_sent"), 1200, "{run:#?}");
        assert_eq!(run.summary.count("ticks/ipis_received"), 1200, "{run:#?}");
        assert!(run.summary.count("migrations") >= 90, "{run:#?}");
    }
}

// Catches: an order of vCPUs in the round robin that depends on anything but the seed.
#[test]
fn four_cpus_in_virtual_time_repeat() {
    require_kvm!();
    let lab = Lab::new();
    let trace = |seed| {
        let run = lab.boot_traced("scenario=smp count=40 hz=100", &format!("--cpus 4 --time virtual --seed {seed}"));
        assert_eq!(run.ended.code(), 0, "{run:#?}");
        run.trace.unwrap().bytes
    };
    let [first, again, other] = [1, 1, 2].map(trace);
    assert!(first == again);
    assert!(first != other);
}

// Catches: a host that swallows the TSC deadline on which a guest with deadline sites loses its timer.
#[test]
fn a_host_that_swallows_deadlines() {
    require_kvm!();
    let lab = Lab::new();
    for time in ["real", "virtual"] {
        let flags = format!("--time {time} --emulate-host swallow-deadline");
        lab.boot("clockevent=kvm-tsc-deadline count=20", &flags).in_order(20);
    }
    finish(&mut lab.vmm("--emulate-host swallow-deadline")).expect(0);
}

// Catches: a doctor that cannot examine the host that the other tests run on.
#[test]
fn the_doctor_examines_this_host() {
    require_kvm!();
    let ended = finish(&mut Lab::new().vmm("doctor --json")).expect(0);
    let report: serde_json::Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(report["schema"], "vmm-doctor/1");
    assert!(report["host_tsc_khz"].as_u64().unwrap() > 100_000);
}
