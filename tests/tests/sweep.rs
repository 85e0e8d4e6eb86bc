//! `vmm sweep`: the windows that the study is about are found, and found again.

use std::{fs, path::Path};

use guest_abi::report::SECTION;
use serde_json::Value;
use vm_tests::{Lab, require_kvm, start};

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
    require_kvm!();
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
    require_kvm!();
    let lab = Lab::new();
    let found = sweep(&lab, "clockevent=lapic-deadline", "--ratio 0.5", 1);
    assert_eq!(found["inputs"]["ticks"], 2);
    let verdicts = verdicts(&found, 0);
    assert!(verdicts.len() > 100 && verdicts.iter().all(|(_, verdict)| verdict == "late"), "{verdicts:?}");
}

// Catches: host time or state in a result; points that depend on the worker; a merge that loses or doubles some.
#[test]
fn runs_workers_and_shards_find_the_same_bytes() {
    require_kvm!();
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
    sweep(&lab, OPEN, "--shard 2/3 --cpuid -kvmclock-stable-bit", 1);
    lab.run("sweep merge 1-3 found.json 3-3").refused(2, &["found.json", "1-3", "inputs differ"]);
    lab.run("sweep merge merged.json").refused(2, &["merged.json is not a shard"]);
    fs::write(lab.path("junk"), b"{}").expect("written");
    lab.run("sweep merge junk").refused(2, &["junk is not the result of a sweep"]);
}

// Catches: a sweep that is blind to a torn clock reading, or to a restore in the wrong order.
#[test]
fn planted_bugs_are_found() {
    require_kvm!();
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

// Catches: a fault without an effect.
#[test]
fn every_fault_shows() {
    require_kvm!();
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

// Catches: a point that cannot be replayed, or whose replay has another outcome.
#[test]
fn a_found_point_is_replayed_with_a_trace() {
    require_kvm!();
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

// Catches: pairs that depend on the worker; a second migration to a wrong frequency.
#[test]
fn pairs_of_migrations_and_several_cpus_are_swept_the_same_twice() {
    require_kvm!();
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

// Catches: a kick (of the wake timer, for example) between the injection of an interrupt and its entry. After one, the
// handler's first boundary was missed, and all later ones had other numbers.
#[test]
fn kicks_do_not_change_the_numbers_of_boundaries() {
    require_kvm!();
    const SIGRTMIN: i32 = 34;
    let lab = Lab::new();
    let flags = "--workers 1 --every exit --ratio 2 --cpus 2";
    let calm = sweep(&lab, "scenario=smp", flags, 0);
    let mut command = lab.vmm("sweep --json kicked.json");
    let mut running = start(command.args(["--cmdline", "scenario=smp"]).args(flags.split_whitespace()));
    let mut kicks = 0;
    while !running.has_ended() {
        // Before the handler is there a kick would end the process.
        let status = fs::read_to_string(format!("/proc/{}/status", running.id())).unwrap_or_default();
        let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
        let caught = caught.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
        if caught & 1 << (SIGRTMIN - 1) != 0 {
            let sent =
                std::process::Command::new("kill").arg(format!("-{SIGRTMIN}")).arg(running.id().to_string()).status();
            kicks += i32::from(sent.is_ok_and(|status| status.success()));
        }
    }
    running.finish().expect(0);
    assert!(kicks > 10, "{kicks} kicks");
    assert_eq!(calm, read(&lab.path("kicked.json")));
}

// Catches: a stretch that begins before the first tick, where no CPU counts as ticking: all lost, or all on time.
#[test]
fn the_first_tick_is_judged_too() {
    require_kvm!();
    let lab = Lab::new();
    sweep(&lab, "clockevent=kvm-ns-deadline", "--every exit --from tick:1 --ratio 1", 0);
    let found = sweep(&lab, "clockevent=lapic-deadline", "--every exit --from tick:1 --patience 1s --ratio 0.1", 1);
    assert!(verdicts(&found, 0).iter().all(|(_, verdict)| verdict == "late"), "{:#?}", found["totals"]);
}

// Catches: pairs that are dropped because the first migration keeps the guest from the second.
#[test]
fn a_guest_that_the_first_migration_kills_counts_in_pairs() {
    require_kvm!();
    let lab = Lab::new();
    let flags = "--depth 2 --samples 40 --ratio 0.5,2";
    let whole = sweep(&lab, CLOSED, flags, 0);
    let found = sweep(&lab, CLOSED, &format!("{flags} --inject deadline-before-lapic"), 1);
    let pairs = |found: &Value| {
        let points = found["points"].as_array().expect("points");
        points.iter().map(|point| point["at"].clone()).collect::<Vec<_>>()
    };
    let (whole, found_pairs) = (pairs(&whole), pairs(&found));
    assert!(whole.iter().all(|pair| found_pairs.contains(pair)), "{whole:?} {found_pairs:?}");
    let lost = verdicts(&found, 0).iter().filter(|(_, verdict)| verdict == "lost").count();
    assert!(lost > 0, "{:#?}", found["totals"]);
}

// Catches: results that are lost because two go to one file, or a panic when the table's reader has gone.
#[test]
fn results_are_not_lost() {
    require_kvm!();
    let lab = Lab::new();
    lab.run("sweep --json a.json --report ./a.json").refused(2, &["--json", "--report", "a.json"]);
    let mut command = lab.vmm("sweep --every exit --json kept.json --cmdline clockevent=kvm-ns-deadline");
    let mut child =
        command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().expect("started");
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("its end");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(!String::from_utf8_lossy(&output.stderr).contains("panicked"), "{output:?}");
    assert_eq!(read(&lab.path("kept.json"))["complete"], true);
}

// Catches: a shard with points cut away, or there twice, that makes a whole with holes.
#[test]
fn shards_with_other_points_do_not_merge() {
    require_kvm!();
    let lab = Lab::new();
    sweep(&lab, CLOSED, "--every exit --shard 1/1", 0);
    let good = read(&lab.path("found.json"));
    let refused = |change: &dyn Fn(&mut Value), why: &str| {
        let mut bad = good.clone();
        change(&mut bad);
        fs::write(lab.path("bad.json"), bad.to_string()).expect("written");
        lab.run("sweep merge bad.json").refused(2, &["bad.json", why]);
    };
    let points = |value: &mut Value| value["points"].as_array_mut().expect("points").clone();
    refused(&|bad| bad["points"] = points(bad)[1..].to_vec().into(), "some are missing");
    refused(&|bad| bad["points"] = [points(bad), points(bad)].concat().into(), "twice");
    refused(&|bad| bad["points"][0]["outcomes"] = Value::Array(Vec::new()), "every ratio");
    refused(&|bad| bad["points"][0]["at"] = serde_json::json!([1, 2]), "number of migrations");
    refused(&|bad| bad["shard"]["index"] = 0.into(), "no such shard");
}

// Catches: Ctrl-C that loses what was found, or that leaves half a file.
#[test]
fn an_interrupted_sweep_keeps_what_it_found() {
    require_kvm!();
    let lab = Lab::new();
    // Forty migrations a point: on no host is this over when the signal comes.
    let ratios = ["0.5,2"; 20].join(",");
    let mut command = lab.vmm(&format!("sweep --cpus 4 --json found.json --ratio {ratios}"));
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

// Catches: a sweep that begins although its steps pass over boundaries, and ends with a message about something else.
#[test]
fn a_host_that_does_not_step_exactly_cannot_sweep() {
    require_kvm!();
    let lab = Lab::new();
    for flags in ["", "--depth 2 --samples 10", "--point 3 --ratio 2", "--every exit"] {
        lab.run(&format!("sweep --emulate-host coarse-step {flags}"))
            .refused(3, &["single steps are not exact", "vmm doctor", "--migrate-every"]);
    }
    let doctor = lab.run("doctor --emulate-host coarse-step").expect(0);
    assert!(doctor.stdout.contains("vmm sweep is refused"), "{doctor:#?}");
    // It is only sweeps that step.
    let _ = lab.boot("count=3", "--time virtual --emulate-host coarse-step");
}

// Catches: bad input that is reported late, or not at all.
#[test]
fn bad_input_is_reported() {
    let lab = Lab::new();
    for (flags, parts) in [
        ("sweep --ratio 0.01", ["--ratio", "0.1 to 10"]),
        ("sweep --from tick:0", ["--from", "from 1"]),
        ("sweep --shard 3/2", ["--shard", "like 2/5"]),
        ("sweep --inject nothing", ["--inject", "deadline-before-lapic"]),
        ("sweep --trace t", ["--trace", "--point"]),
        ("sweep --depth 2 --samples 0", ["--samples", "1.."]),
        ("sweep --from 0xno", ["--from", "0x100200"]),
        ("sweep --json /nonexistent/x", ["--json", "/nonexistent/x"]),
    ] {
        let ended = lab.run(flags);
        assert_eq!(ended.code(), 2, "{flags}: {ended:#?}");
        for part in parts {
            assert!(ended.stderr.contains(part), "{flags}: {part:?} is not in {ended:#?}");
        }
    }
}

// As above, where the guest's image must be read, or the guest run, to see it.
#[test]
fn mistakes_about_the_guest_are_refused_with_a_reason() {
    require_kvm!();
    let lab = Lab::new();
    lab.run("sweep --guest /bin/true").refused(2, &["/bin/true", "PVH"]);
    lab.run("sweep --from no_such_function").refused(2, &["no_such_function"]);
    lab.run("sweep --from Clock::read").refused(2, &["Clock::read", "could be any of"]);
    lab.run("sweep --from tick:3 --to tick:2").refused(2, &["--to tick:2 is not after"]);
    vm_tests::finish(lab.vmm("sweep --from tick:99").args(["--cmdline", "count=100"]))
        .refused(2, &["makes only 100 ticks"]);
}

// Catches: a judge by interrupts that is blind to a late or lost tick, or that sees one where a migration changes
// nothing. The guest's own records of the same points are the other account.
#[test]
fn a_guest_without_records_gets_the_verdicts_that_its_records_give() {
    require_kvm!();
    let lab = Lab::new();
    fs::write(lab.path("silent"), vm_tests::guest_without(SECTION)).unwrap();
    let numbers = |found: &Value, want: fn(&str) -> bool| -> Vec<u64> {
        let points = verdicts(found, 0).into_iter().filter(|(_, verdict)| want(verdict));
        points.map(|(number, _)| number).collect()
    };
    for (cmdline, flags) in [
        (OPEN, "--ratio 0.5"),
        (OPEN, "--ratio 0.5 --deadline keep --every exit --to tick:9"),
        (OPEN, "--ratio 2"),
        ("clockevent=lapic-deadline", "--ratio 0.5 --every exit"),
        ("scenario=smp clockevent=kvm-tsc-deadline count=60", "--cpus 2 --ratio 1 --every exit"),
    ] {
        let code = i32::from(!flags.contains("--ratio 2") && !flags.contains("--ratio 1"));
        let by_records = sweep(&lab, cmdline, &format!("{flags} --ticks 2"), code);
        let by_interrupts = sweep(&lab, cmdline, &format!("--guest silent {flags}"), code);
        assert_eq!(by_interrupts["inputs"]["by_interrupts"], true);
        assert_eq!(numbers(&by_interrupts, bad), numbers(&by_records, bad), "{cmdline} {flags}");
    }
}
