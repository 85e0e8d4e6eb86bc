//! `vmm sweep`: the windows that the study is about are found, and found again.

use std::{fs, path::Path};

use serde_json::Value;
use vm_tests::{Lab, kvm, start};

const OPEN: &str = "clockevent=kvm-tsc-deadline conversion=split recheck=off";
const CLOSED: &str = "clockevent=kvm-tsc-deadline conversion=split recheck=on";

/// Sweeps with these flags; the exit code must be `code`.
#[track_caller]
fn sweep(lab: &Lab, cmdline: &str, flags: &str, code: i32) -> Value {
    let mut command = lab.vmm("sweep");
    command.args(["--cmdline", cmdline, "--json", "found.json"]).args(flags.split_whitespace());
    vm_tests::finish(&mut command).expect(code);
    read(&lab.path("found.json"))
}

#[track_caller]
fn read(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).expect("the result")).expect("JSON")
}

/// Each point's number and its verdict at the ratio number `ratio`.
fn verdicts(found: &Value, ratio: usize) -> Vec<(u64, String)> {
    let points = found["points"].as_array().expect("points");
    let one = |point: &Value| {
        let verdict = point["outcomes"][ratio]["verdict"].as_str().expect("a verdict").to_owned();
        (point["at"][0].as_u64().expect("a number"), verdict)
    };
    points.iter().map(one).collect()
}

fn bad(verdict: &str) -> bool {
    !matches!(verdict, "on-time" | "rearmed")
}

/// The text of the instruction at `address`.
fn instruction(found: &Value, address: &Value) -> String {
    let code = found["code"].as_array().expect("code").iter().find(|code| code["address"] == *address);
    code.expect("its code")["instruction"].as_str().expect("text").to_owned()
}

// Catches: a sweep that misses the race that the thread of 2016 is about, or sees it where it is closed; a migration in
// place that is none.
#[test]
fn the_window_between_version_check_and_wrmsr_is_found_and_recheck_closes_it() {
    if !kvm() {
        return;
    }
    let lab = Lab::new();
    let found = sweep(&lab, OPEN, "--ratio 0.5", 1);
    let windows = found["windows"].as_array().expect("windows");
    let [window] = windows.as_slice() else { panic!("one window, not {windows:#?}") };
    assert_eq!(window["verdict"], "late");
    // It ends with the WRMSR: after it the deadline is in flight, and rescaled.
    assert_eq!(instruction(&found, &window["last_address"]), "wrmsr");
    let open = window["points"].as_u64().expect("a count");
    assert!((2..40).contains(&open), "a few instructions, not {open}");
    assert!(verdicts(&found, 0).iter().any(|(_, verdict)| verdict == "on-time"));
    // A deadline in the old units: one period asked, two waited.
    let late = window["worst_late_ns"].as_u64().expect("a time");
    assert!((9_900_000..10_100_000).contains(&late), "{late} ns late");

    let found = sweep(&lab, CLOSED, "--ratio 0.5,2", 0);
    assert_eq!(found["windows"].as_array().map(Vec::len), Some(0), "{:#?}", found["windows"]);
    let found = sweep(&lab, "clockevent=kvm-ns-deadline", "--ratio 0.5,2", 0);
    assert_eq!(found["windows"].as_array().map(Vec::len), Some(0), "{:#?}", found["windows"]);
}

// Catches: ticks after the first that are not waited for; a guest that learns the new frequency by accident.
#[test]
fn the_native_clockevent_is_late_from_every_point_of_the_second_tick() {
    if !kvm() {
        return;
    }
    let lab = Lab::new();
    let found = sweep(&lab, "clockevent=lapic-deadline", "--ratio 0.5", 1);
    assert_eq!(found["inputs"]["ticks"], 2);
    let verdicts = verdicts(&found, 0);
    assert!(verdicts.len() > 100 && verdicts.iter().all(|(_, verdict)| verdict == "late"), "{verdicts:?}");
}

// Catches: anything of the host in a result; points that depend on who tries them; a merge that loses or doubles some.
#[test]
fn runs_workers_and_shards_find_the_same_bytes() {
    if !kvm() {
        return;
    }
    let lab = Lab::new();
    let bytes = |lab: &Lab, name: &str| fs::read(lab.path(name)).expect("a result");
    sweep(&lab, OPEN, "--workers 1", 1);
    let whole = bytes(&lab, "found.json");
    sweep(&lab, OPEN, "--workers 3", 1);
    assert!(whole == bytes(&lab, "found.json"), "another number of workers found something else");
    for shard in ["1/3", "2/3", "3/3"] {
        sweep(&lab, OPEN, &format!("--shard {shard}"), 1);
        fs::rename(lab.path("found.json"), lab.path(shard.replace('/', "-"))).expect("renamed");
    }
    lab.run("sweep merge 3-3 1-3 2-3 --json merged.json").expect(1);
    assert!(whole == bytes(&lab, "merged.json"), "the merged shards are not the whole");
    lab.run("sweep merge 1-3 2-3").refused(2, &["shard 3/3 is missing"]);
    lab.run("sweep merge 1-3 1-3").refused(2, &["1-3", "shard 1/3, and so is another"]);
    lab.run("sweep merge merged.json").refused(2, &["merged.json is not a shard"]);
    fs::write(lab.path("junk"), b"{}").expect("written");
    lab.run("sweep merge junk").refused(2, &["junk is not the result of a sweep"]);
}

// Catches: a sweep that is blind to a torn clock reading, or to a restore in the wrong order.
#[test]
fn planted_bugs_are_found() {
    if !kvm() {
        return;
    }
    let lab = Lab::new();
    let found = sweep(&lab, "clockevent=kvm-tsc-deadline plant=early-check", "--ratio 0.5", 1);
    let windows = found["windows"].as_array().expect("windows");
    let [window] = windows.as_slice() else { panic!("one window, not {windows:#?}") };
    assert_eq!(window["verdict"], "clock-stepped");
    assert_eq!(instruction(&found, &window["last_address"]), "rdtsc");

    let at = |found: &Value, which: &str| verdicts(found, 0).iter().filter(|(_, verdict)| verdict == which).count();
    // Every deadline in flight is lost; so are none where none is.
    let found = sweep(&lab, CLOSED, "--ratio 1 --inject deadline-before-lapic", 1);
    assert!(at(&found, "lost") > 10 && at(&found, "on-time") > 10, "{:#?}", found["totals"]);
    let found = sweep(&lab, CLOSED, "--ratio 1 --inject deadline-before-tsc", 1);
    assert!(at(&found, "late") > 10 && at(&found, "on-time") > 10, "{:#?}", found["totals"]);
    // And nothing without them.
    sweep(&lab, CLOSED, "--ratio 1", 0);
}

// Catches: a fault that bends nothing.
#[test]
fn every_fault_shows() {
    if !kvm() {
        return;
    }
    let lab = Lab::new();
    for (fault, verdict) in [
        ("page-not-republished", "clock-stepped"),
        ("no-guest-stopped", "untold"),
        ("zero-to-now", "rearmed"),
        ("tsc-jump", "clock-stepped"),
        ("page-base-ahead", "clock-stepped"),
    ] {
        let code = i32::from(bad(verdict));
        let found = sweep(&lab, CLOSED, &format!("--every exit --ratio 0.5 --inject {fault}"), code);
        assert!(verdicts(&found, 0).iter().any(|(_, found)| found == verdict), "{fault}: {:#?}", found["totals"]);
    }
}

// Catches: a point that cannot be looked at again, or that is another one then.
#[test]
fn a_found_point_is_replayed_with_a_trace() {
    if !kvm() {
        return;
    }
    let lab = Lab::new();
    let found = sweep(&lab, OPEN, "--ratio 0.5", 1);
    let point = found["windows"][0]["first"][0].as_u64().expect("a number");
    let again = |trace: &str| {
        let flags = format!("sweep --ratio 0.5 --point {point} --trace {trace}");
        let ended = vm_tests::finish(lab.vmm(&flags).args(["--cmdline", OPEN])).expect(1);
        assert!(ended.stdout.contains("late; 10.0ms late"), "{ended:#?}");
        fs::read(lab.path(trace)).expect("a trace")
    };
    let trace = again("one");
    assert!(trace == again("two"), "two replays differ");
    let lines = String::from_utf8(trace).expect("text");
    assert_eq!(lines.matches("\"event\":\"restore\"").count(), 1);
    vm_tests::finish(lab.vmm("sweep --point 100000").args(["--cmdline", OPEN])).refused(2, &["--point 100000", "0 to"]);
}

// Catches: pairs that depend on who tries them; a second migration that goes elsewhere.
#[test]
fn pairs_of_migrations_and_several_cpus_are_swept_the_same_twice() {
    if !kvm() {
        return;
    }
    let lab = Lab::new();
    for (cmdline, flags) in
        [(CLOSED, "--depth 2 --samples 300 --ratio 0.5,2"), ("scenario=smp", "--cpus 3 --every read --ratio 0.5")]
    {
        let first = sweep(&lab, cmdline, flags, 0);
        assert!(first["points"].as_array().is_some_and(|points| points.len() >= 3), "{first:#?}");
        let cpus: std::collections::BTreeSet<_> =
            first["points"].as_array().expect("points").iter().map(|point| point["cpu"].as_u64()).collect();
        assert_eq!(cpus.len(), if flags.contains("cpus") { 3 } else { 1 });
        assert_eq!(first, sweep(&lab, cmdline, &format!("{flags} --workers 1"), 0));
    }
}

// Catches: Ctrl-C that loses what was found, or that leaves half a file.
#[test]
fn an_interrupted_sweep_keeps_what_it_found() {
    if !kvm() {
        return;
    }
    let lab = Lab::new();
    let mut command = lab.vmm("sweep --cpus 4 --json found.json");
    let running = start(command.args(["--cmdline", "scenario=smp"]));
    // It walks through the stretch first; a signal before the first point has nothing to keep, which is said.
    std::thread::sleep(std::time::Duration::from_millis(3000));
    let ended = {
        let pid = nix::unistd::Pid::from_raw(running.id());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).expect("a signal sent");
        running.finish().expect(1)
    };
    if ended.stderr.contains("before the first point") {
        return;
    }
    assert!(ended.stderr.contains("interrupted"), "{ended:#?}");
    let found = read(&lab.path("found.json"));
    assert_eq!(found["complete"], false);
    assert!(found["points"].as_array().is_some_and(|points| !points.is_empty()));
}

// Catches: bad input that is found out late, or not at all.
#[test]
fn bad_input_is_told() {
    let lab = Lab::new();
    for (flags, parts) in [
        ("sweep --ratio 0.01", ["--ratio", "0.1 to 10"]),
        ("sweep --from tick:0", ["--from", "from 1"]),
        ("sweep --shard 3/2", ["--shard", "like 2/5"]),
        ("sweep --inject nothing", ["--inject", "deadline-before-lapic"]),
        ("sweep --trace t", ["--trace", "--point"]),
        ("sweep --guest /bin/true", ["/bin/true", "trap sites"]),
        ("sweep --json /nonexistent/x", ["--json", "/nonexistent/x"]),
    ] {
        if flags.contains("guest") && !kvm() {
            continue;
        }
        let ended = lab.run(flags);
        assert_eq!(ended.code(), 2, "{flags}: {ended:#?}");
        for part in parts {
            assert!(ended.stderr.contains(part), "{flags}: {part:?} is not in {ended:#?}");
        }
    }
    if kvm() {
        lab.run("sweep --from no_such_function").refused(2, &["no_such_function"]);
        lab.run("sweep --from set_next_event").refused(2, &["set_next_event", "could be any of"]);
        lab.run("sweep --from tick:3 --to tick:2").refused(2, &["--to tick:2 is not after"]);
        vm_tests::finish(lab.vmm("sweep --from tick:99").args(["--cmdline", "count=100"]))
            .refused(2, &["makes only 100 ticks"]);
    }
}
