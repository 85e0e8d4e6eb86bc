//! `vmm clock`: what it measures of a clock that loses nothing, that it sees planted faults, and its results.

use std::{fs, thread, time::Duration};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use vm_tests::{Ended, Lab, require, require_kvm, start, true_tsc_frequency};

/// Runs `vmm clock` in virtual time, and returns how it ended and its JSON.
#[track_caller]
fn measure(flags: &str, code: i32) -> (Ended, Value) {
    let lab = Lab::new();
    let ended = lab.run(&format!("clock --time virtual --json clock.json {flags}")).expect(code);
    let json = fs::read_to_string(lab.path("clock.json")).unwrap();
    (ended, serde_json::from_str(&json).unwrap())
}

fn number(json: &Value, pointer: &str) -> f64 {
    json.pointer(pointer).and_then(Value::as_f64).unwrap_or_else(|| panic!("no number {pointer}"))
}

/// The numbers of a page of vCPU 0, of which both sides of a stop must agree.
fn page(stop: &Value, which: &str) -> Vec<Value> {
    let page = stop.pointer(&format!("/vcpus/0/{which}")).expect("a page");
    ["tsc_timestamp", "system_time", "tsc_to_system_mul", "tsc_shift"].map(|field| page[field].clone()).to_vec()
}

// Catches: a restore that makes a new base from a reading that was rounded down (0.95 ns a migration at 2.1 GHz), and
// deadlines that creep by ticks.
#[test]
fn a_thousand_migrations_at_one_frequency_lose_nothing() {
    require_kvm!();
    let flags = "--tsc-khz 2100000 --every 1ms --migrations 1000 --fail-on back,total=0ns,worst=0ns,deadline=0ns";
    let (_, json) = measure(flags, 0);
    assert_eq!(number(&json, "/count"), 1000.0);
    assert_eq!(json.pointer("/error/total_is_zero"), Some(&Value::Bool(true)));
    assert_eq!(number(&json, "/error/nonzero"), 0.0);
    assert_eq!(number(&json, "/deadline_ticks"), 0.0);
    let stops = json["stops"].as_array().unwrap();
    assert_eq!(stops.len(), 1000);
    for stop in stops {
        assert_eq!(page(stop, "old"), page(stop, "new"));
        if let Some(deadline) = stop.pointer("/vcpus/0/deadline").filter(|deadline| !deadline.is_null()) {
            assert_eq!(deadline["before"], deadline["after"]);
        }
    }
    // A tick each 10 ms, a migration each ms: most deadlines are in flight at nine stops or ten.
    assert!(number(&json, "/longest/stops") >= 9.0, "{}", json["longest"]);
}

// Catches: errors that add up over migrations between frequencies, where each page alone is as good as it can be.
#[test]
fn errors_between_frequencies_do_not_add_up() {
    require_kvm!();
    let cycle = "--tsc-khz 2600000 --tsc-khz-cycle 1300000,3900000,2600000";
    // Any page is off by at most 1/26 ns at these frequencies, so two by twice that (crates/vmtime/src/rebase.rs).
    let (_, json) = measure(&format!("{cycle} --every 1ms --migrations 300 --fail-on total=0.04ns,worst=0.08ns"), 0);
    assert!(number(&json, "/error/nonzero") > 100.0, "{}", json["error"]);
    // The errors of all stops add up to what the last page is off, which is what the VMM says that it carries.
    assert!((number(&json, "/error/total_ns") + number(&json, "/remainder_ns")).abs() < 1e-9, "{}", json["error"]);
    assert_eq!(number(&json, "/went_back"), 0.0);
}

// Catches: a migration in place that is another operation than one with a new virtual machine.
#[test]
fn a_migration_in_place_is_the_same_to_the_guest() {
    require_kvm!();
    let flags = "--tsc-khz 2600000 --tsc-khz-cycle 1300000,2599871 --migrations 30";
    let [rebuilt, in_place] = ["", "--in-place"].map(|more| measure(&format!("{flags} {more}"), 0).1);
    assert_eq!(rebuilt["stops"], in_place["stops"]);
    assert_eq!((&rebuilt["error"], &rebuilt["ticks"]), (&in_place["error"], &in_place["ticks"]));
}

// Catches: an instrument that cannot fail. The TSC goes on one second ahead, and the page does not know.
#[test]
fn a_tsc_that_jumps_is_seen() {
    require_kvm!();
    let flags = "--tsc-khz 2100000 --every 10ms --migrations 5 --inject tsc-jump";
    let (ended, json) = measure(&format!("{flags} --fail-on drift=1ms"), 1);
    assert!((number(&json, "/error/mean_ns") - 1e9).abs() < 1.0, "{}", json["error"]);
    ended.refused(1, &["drift is ", "the limit is 1000000 ns"]);
    measure(&format!("{flags} --fail-on none"), 0);
}

// Catches: an instrument that looks at the resume only. The page is right there, and then runs at twice the rate.
#[test]
fn a_page_that_is_not_republished_is_seen_between_the_stops() {
    require_kvm!();
    let cycle = "--tsc-khz 2000000 --tsc-khz-cycle 1000000,2000000";
    let flags = format!("{cycle} --every 5ms --migrations 4 --inject page-not-republished");
    let (ended, json) = measure(&format!("{flags} --fail-on rate=1us"), 1);
    ended.refused(1, &["rate is -"]);
    assert_eq!(number(&json, "/error/nonzero"), 0.0);
    // Half of the legs ran at half the frequency, by the page still at 2 GHz.
    assert!(number(&json, "/rate_ns") < -1e6);
}

// Catches: a base ahead of the TSC that is taken for a good page because it lies on the right line.
#[test]
fn a_base_ahead_of_the_tsc_is_seen() {
    require_kvm!();
    for cycle in ["2000000", "1000000,2000000"] {
        let flags = format!("--tsc-khz 2000000 --tsc-khz-cycle {cycle} --migrations 3 --inject page-base-ahead");
        let (ended, json) = measure(&flags, 1);
        assert_eq!(number(&json, "/bases_ahead"), 3.0, "{cycle}");
        ended.refused(1, &["the guest's clock went back"]);
    }
}

// Catches: a pause that is measured as if it had taken no time, under either policy.
#[test]
fn a_pause_counts_as_the_policy_says() {
    require_kvm!();
    let flags = "--tsc-khz 2100000 --pauses 20 --pause-length 3ms";
    for downtime in ["catch-up", "steal"] {
        let (_, json) = measure(&format!("{flags} --downtime {downtime} --fail-on worst=0ns"), 0);
        let stops = json["stops"].as_array().unwrap();
        assert!(stops.iter().all(|stop| stop["downtime_ns"] == 3_000_000 && stop["kind"] == "pause"));
        // The TSC advanced by whole ticks for the same time, and the page's rate is rounded to 2⁻³² of a tick.
        assert!(number(&json, "/same_tsc/worst_ns").abs() < 0.01, "{downtime}: {}", json["same_tsc"]);
    }
    let (_, json) = measure(&format!("{flags} --fail-on worst=0ns"), 0);
    assert!(json["stops"].as_array().unwrap().iter().all(|stop| stop["downtime_ns"] == 0));
}

// Catches: vCPUs whose pages differ after a restore.
#[test]
fn all_vcpus_have_one_clock() {
    require_kvm!();
    let (_, json) = measure("--tsc-khz 2600000 --cpus 3 --tsc-khz-cycle 1300000,2600000 --migrations 20", 0);
    assert_eq!(number(&json, "/between_vcpus/nonzero"), 0.0);
    assert!(json["stops"].as_array().unwrap().iter().any(|stop| stop["vcpus"].as_array().unwrap().len() == 3));
}

// Catches: text that a mail program breaks, a field that scripts rely on and that is gone, a report without its chart.
#[test]
fn results_are_text_for_a_mail_json_and_a_report() {
    require_kvm!();
    let lab = Lab::new();
    let flags = "clock --time virtual --tsc-khz 2600000 --tsc-khz-cycle 1300000,3900000,2600000 --migrations 30";
    let ended = lab.run(&format!("{flags} --json clock.json --report clock.html")).expect(0);
    assert!(ended.stdout.lines().all(|line| line.chars().count() <= 72 && line.is_ascii()), "{}", ended.stdout);
    assert!(ended.stdout.lines().count() < 50, "{}", ended.stdout);
    assert!(ended.stdout.contains("standard error") && ended.stdout.contains("#####"), "{}", ended.stdout);
    let json: Value = serde_json::from_str(&fs::read_to_string(lab.path("clock.json")).unwrap()).unwrap();
    assert_eq!(json["schema"], "vmm-clock/1");
    for field in [
        "/setup/lapic",
        "/setup/tsc_khz",
        "/complete",
        "/error/mean_ns",
        "/error/standard_error_ns",
        "/error/median_ns",
        "/error/worst_at",
        "/error/histogram/0/count",
        "/reading/total_ns",
        "/deadlines/worst_ns",
        "/longest/stops",
        "/rate_ns",
        "/remainder_ns",
        "/stops/0/stop_tsc",
        "/stops/0/vcpus/0/old/version",
        "/worst/number",
    ] {
        assert!(json.pointer(field).is_some_and(|value| !value.is_null()), "{field} is missing");
    }
    let html = fs::read_to_string(lab.path("clock.html")).unwrap();
    assert!(html.contains("data-points=\"60\"") && html.contains("Histogram"), "no chart with two series of 30");
    let stdout = lab.run(&format!("{flags} --json -")).expect(0).stdout;
    assert!(serde_json::from_str::<Value>(&stdout).is_ok(), "{stdout}");
}

// Catches: a run of the same inputs that measures something else.
#[test]
fn virtual_time_measures_the_same_twice() {
    require_kvm!();
    let flags = "--tsc-khz 2600000 --tsc-khz-cycle 1300000,2599871 --cpus 2 --seed 7 --migrations 15";
    assert_eq!(measure(flags, 0).1, measure(flags, 0).1);
}

// Catches: a kvmclock of KVM that is measured before KVM has published it, and a LAPIC that is not asked for.
#[test]
fn both_lapics_are_measured_in_real_time() {
    require_kvm!();
    for lapic in ["user", "kvm"] {
        let lab = Lab::new();
        let ended = lab.run(&format!("clock --lapic {lapic} --migrations 5 --json clock.json")).expect(0);
        assert!(ended.stdout.contains(&format!("LAPIC and kvmclock: {lapic};")), "{}", ended.stdout);
        let json: Value = serde_json::from_str(&fs::read_to_string(lab.path("clock.json")).unwrap()).unwrap();
        assert!(number(&json, "/raw/count") > 0.0 && number(&json, "/error/count") >= 5.0, "{json}");
        // The VMM's own page stays, where the TSC continues with its value. KVM makes another one.
        for stop in json["stops"].as_array().unwrap().iter().filter(|_| lapic == "kvm") {
            assert_ne!(page(stop, "old"), page(stop, "new"), "KVM has not published this page: {stop}");
        }
        assert_eq!(number(&json, "/went_back"), 0.0);
    }
}

// Catches: a gap that the VMM does not find; VM time that leaps over it under freeze, or loses it under catch-up.
#[test]
fn gaps_are_found_and_counted_as_the_policy_says() {
    require_kvm!();
    // VM time is compared with CLOCK_MONOTONIC_RAW.
    require!(true_tsc_frequency());
    for (lapic, downtime) in [("user", "freeze"), ("user", "catch-up"), ("kvm", "freeze"), ("kvm", "catch-up")] {
        let what = format!("--lapic {lapic} --downtime {downtime}");
        let lab = Lab::new();
        let ended = lab
            .run(&format!("clock {what} --gaps 2 --fail-on back,missed --json clock.json --report clock.html"))
            .expect(0);
        let json: Value = serde_json::from_str(&fs::read_to_string(lab.path("clock.json")).unwrap()).unwrap();
        assert!(ended.stdout.contains("the VMM found 2 of 2 gaps"), "{what}: {}", ended.stdout);
        assert!(ended.stdout.lines().all(|line| line.chars().count() <= 72 && line.is_ascii()), "{}", ended.stdout);
        assert!(fs::read_to_string(lab.path("clock.html")).unwrap().contains("The VMM found 2 of 2 gaps"));
        assert_eq!((number(&json, "/gaps/made"), number(&json, "/gaps/found")), (2.0, 2.0), "{what}: {json}");
        assert_eq!(number(&json, "/went_back"), 0.0, "{what}");
        let gaps = json["stops"].as_array().unwrap().iter().filter(|stop| stop["kind"] == "gap").count();
        // A busy host may stop the process once more, before KVM has published its page: then there is no account.
        assert!(json["unaccounted"].as_u64().unwrap() + u64::try_from(gaps).unwrap() >= 2, "{what}: {json}");
        for gap in json["gaps"]["each"].as_array().unwrap() {
            let [length, found, vm, off] =
                ["length_ns", "found_ns", "vm_ns", "vm_minus_raw_ns"].map(|field| number(gap, &format!("/{field}")));
            assert!(length >= 1e9, "{what}: SIGCONT came too early: {gap}");
            // A gap is taken to begin up to a tenth of a second late, and a busy host delays what comes after it. Half
            // of it is far from both, and from a gap that has no effect.
            assert!(found > length / 2.0, "{what}: {gap}");
            match downtime {
                "freeze" => assert!(vm < length / 2.0, "{what}: {gap}"),
                // The two clocks' rates differ by much less than a thousandth.
                _ => assert!(vm > length * 0.99 && off.abs() < length / 1000.0, "{what}: {gap}"),
            }
        }
    }
}

// Catches: a gap that the VMM does not find, counted as found, left out, or waited for without an end.
#[test]
fn a_gap_that_is_too_short_is_counted_as_not_found() {
    require_kvm!();
    require!(true_tsc_frequency());
    let lab = Lab::new();
    let flags = "clock --gaps 3 --gap-length 20ms --json clock.json";
    lab.run(flags).expect(0);
    let json: Value = serde_json::from_str(&fs::read_to_string(lab.path("clock.json")).unwrap()).unwrap();
    assert_eq!((number(&json, "/gaps/made"), &json["complete"]), (3.0, &Value::Bool(true)), "{json}");
    let gaps = json["gaps"]["each"].as_array().unwrap();
    let missed: Vec<&Value> = gaps.iter().filter(|gap| gap["found_ns"].is_null()).collect();
    assert_eq!(number(&json, "/gaps/made") - number(&json, "/gaps/found"), missed.len() as f64, "{json}");
    for gap in missed {
        // Nobody stopped VM time.
        assert!(number(gap, "/vm_ns") > number(gap, "/length_ns") * 0.99, "{gap}");
    }
    lab.run(&format!("{flags} --fail-on missed")).refused(1, &["the VMM found ", " of 3 gaps"]);
}

/// The state and the parent of a process, as in proc_pid_stat(5); none if it is gone.
fn process(id: i32) -> Option<(char, i32)> {
    let stat = fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
    let mut words = stat.rsplit_once(") ")?.1.split_whitespace();
    Some((words.next()?.chars().next()?, words.next()?.parse().ok()?))
}

/// The child of a process that has one.
fn child_of(id: i32) -> Option<i32> {
    let ids = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    ids.into_iter().find(|child| process(*child).is_some_and(|(_, parent)| parent == id))
}

// Catches: a process that stays stopped, or runs on for an hour, when its parent is told to end or is killed; and a
// parent that is stopped itself, so that a shell takes the command for suspended.
#[test]
fn a_measurement_of_gaps_ends_at_any_time() {
    require_kvm!();
    for (signal, ends) in [(Signal::SIGTERM, Some(1)), (Signal::SIGINT, Some(1)), (Signal::SIGKILL, None)] {
        let lab = Lab::new();
        let mut running = start(&mut lab.vmm("clock --gaps 1000 --gap-length 1h"));
        let stopped = (0..6000).find_map(|_| {
            thread::sleep(Duration::from_millis(10));
            assert!(!running.has_ended(), "{signal}");
            child_of(running.id()).filter(|child| process(*child).is_some_and(|(state, _)| state == 'T'))
        });
        let stopped = stopped.expect("a child that is stopped");
        assert!(process(running.id()).is_some_and(|(state, _)| state != 'T'), "{signal}: the parent is stopped");
        kill(Pid::from_raw(running.id()), signal).expect("it is there");
        // Its pipes close when both have ended.
        let ended = running.finish();
        assert_eq!(ended.status.code(), ends, "{signal}: {ended:?}");
        assert!(ends.is_none() || ended.stderr.contains("interrupted after 1 of 1000 stops"), "{signal}: {ended:?}");
        // The kernel closes a process's pipes a moment before that has ended.
        let has_ended = (0..6000).any(|_| {
            thread::sleep(Duration::from_millis(1));
            process(stopped).is_none_or(|(state, _)| matches!(state, 'Z' | 'X'))
        });
        assert!(has_ended, "{signal}: it is left behind");
    }
}

// Catches: a bad flag that is not refused, or without a word on what to do.
#[test]
fn bad_flags_are_refused() {
    require_kvm!();
    let lab = Lab::new();
    for (flags, parts) in [
        ("--migrations 0", &["--migrations", "not a number from 1"][..]),
        ("--migrations 5 --pauses 5", &["--migrations", "--pauses"]),
        ("--tsc-khz-cycle 5", &["--tsc-khz-cycle", "5"]),
        ("--fail-on late=1ms", &["--fail-on", "late=1ms", "drift=TIME"]),
        ("--inject nonsense", &["--inject", "nonsense"]),
        ("--lapic kvm --time virtual", &["--time virtual", "--lapic user"]),
        ("--json x --report x", &["--json and --report both name x"]),
        ("--every 0s", &["--every", "more than zero"]),
        ("--gaps 2 --time virtual", &["--gaps", "--time real", "--pauses"]),
        ("--gaps 2 --pauses 2", &["--gaps", "--pauses"]),
        ("--gaps 2 --tsc-khz-cycle 1000000", &["--gaps", "--tsc-khz-cycle"]),
        ("--gaps 2 --gap-length 1us", &["--gap-length", "1ms to 1h"]),
        ("--gap-length 2s", &["the following required arguments were not provided"]),
        ("--lapic kvm --downtime steal", &["--downtime steal", "--lapic user"]),
    ] {
        lab.run(&format!("clock {flags}")).refused(2, parts);
    }
    let far = "--time virtual --tsc-khz 1000000 --tsc-khz-cycle 20000000";
    lab.run(&format!("clock {far}")).refused(2, &["20000000"]);
    // A guest that ends before the last stop.
    let mut command = lab.vmm("clock --time virtual --migrations 50 --cmdline");
    command.arg("count=5");
    vm_tests::finish(&mut command).refused(1, &["the guest ended after ", "of 50 stops", "scenario=idle"]);
}
