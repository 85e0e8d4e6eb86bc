//! Live migration: a guest moves to another process while it runs.

use std::{thread, time::Duration};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use vm_tests::{Ended, Lab, Running, Trace, require_kvm, start};

/// How often something is tried that another process must first be ready for.
const TRIES: u32 = 3000;

/// A VMM that waits for a guest at `d<number>`, with the control socket `s<number>` and more flags.
fn receiver(lab: &Lab, number: usize, flags: &str) -> Running {
    start(&mut lab.vmm(&format!("receive unix:d{number} --api-sock s{number} --trace t{number} {flags}")))
}

fn ctl(lab: &Lab, number: usize, command: &str) -> Ended {
    lab.run(&format!("ctl --api-sock s{number} {command}"))
}

/// Moves the guest from `s<from>` to `d<to>` as soon as that waits. Until then the guest goes on at the source.
fn move_guest(lab: &Lab, from: usize, to: usize, flags: &str) -> Value {
    for _ in 0..TRIES {
        let ended = ctl(lab, from, &format!("migrate unix:d{to} {flags}"));
        if ended.code() == 0 {
            return serde_json::from_str(&ended.stdout).expect("JSON");
        }
        let not_yet = ["start vmm receive", "no control socket", "no VM listens"];
        assert!(not_yet.iter().any(|why| ended.stderr.contains(why)), "{ended:#?}");
        thread::sleep(Duration::from_millis(10));
    }
    panic!("nobody waits at d{to}");
}

/// What `ctl` at `s0` says to `command` once somebody waits at its address.
fn until_it_waits(lab: &Lab, command: &str) -> Ended {
    let mut answer = ctl(lab, 0, command);
    for _ in 0..TRIES {
        if !answer.stderr.contains("start vmm receive") {
            break;
        }
        thread::sleep(Duration::from_millis(10));
        answer = ctl(lab, 0, command);
    }
    answer
}

fn status(lab: &Lab, number: usize) -> Value {
    for _ in 0..TRIES {
        let ended = ctl(lab, number, "status");
        if ended.code() == 0 {
            return serde_json::from_str(&ended.stdout).expect("JSON");
        }
        thread::sleep(Duration::from_millis(10));
    }
    panic!("s{number} has no status");
}

fn ticks(lab: &Lab, number: usize) -> u64 {
    status(lab, number)["ticks"].as_u64().expect("ticks")
}

/// Asserts that the guest at `s<number>` makes new ticks.
fn ticks_on(lab: &Lab, number: usize) {
    let before = ticks(lab, number);
    assert!((0..TRIES).any(|_| ticks(lab, number) > before + 3), "the guest does not tick");
}

/// Asserts that VM time went on at `t<to>` where it stopped at `t<from>`, and the guest's TSC too.
fn clocks_went_on(lab: &Lab, from: usize, to: usize) {
    let [left, arrived] = [from, to].map(|number| Trace::read(&lab.path(format!("t{number}"))));
    let (save, restore) = (left.all("save").next_back().expect("a save"), arrived.first("restore"));
    assert_eq!(save.tsc(), restore.tsc(), "{save:?} {restore:?}");
    // The page of another frequency rounds otherwise.
    assert!((0..=1).contains(&(restore.vm_ns() - save.vm_ns())), "{save:?} {restore:?}");
}

// Catches: a tick that is lost on the way, or made twice; a clock that steps; a deadline that is not moved to the new
// frequency; a guest that goes on at the source, too.
#[test]
fn a_guest_moves_from_process_to_process_and_loses_no_tick() {
    require_kvm!();
    let lab = Lab::new();
    let flags = "--tsc trapped --tsc-khz 2600000 --api-sock s0 --trace t0 --summary sum0";
    let mut running = vec![start(&mut lab.guest("clockevent=kvm-tsc-deadline hz=100 count=400", flags))];
    let frequencies = [1_300_000, 3_900_000, 2_600_000, 700_000];
    for (hop, khz) in frequencies.into_iter().enumerate() {
        running.push(receiver(&lab, hop + 1, &format!("--tsc-khz {khz} --summary sum{}", hop + 1)));
        ticks_on(&lab, hop);
        let figures = move_guest(&lab, hop, hop + 1, "");
        let number = |name: &str| figures[name].as_u64().expect("a number");
        assert!(number("rounds") >= 1 && number("pages") > number("last_pages"), "{figures}");
        assert!(number("total_ns") >= number("downtime_ns"), "{figures}");
        assert_eq!(status(&lab, hop + 1)["tsc_khz"].as_u64(), Some(khz));
    }
    let last = running.pop().expect("the last").finish().expect(0);
    assert!(last.stderr.contains(" 0 lost, 0 woken early;"), "{last:#?}");
    for (hop, source) in running.into_iter().enumerate() {
        let ended = source.finish().expect(0);
        assert!(ended.stderr.contains("vmm: moved to unix:"), "{ended:#?}");
        clocks_went_on(&lab, hop, hop + 1);
    }
    let made = |number: usize| {
        let text = std::fs::read_to_string(lab.path(format!("sum{number}"))).expect("a summary");
        serde_json::from_str::<Value>(&text).expect("JSON")["ticks"]["ticks"].as_u64().expect("a number")
    };
    assert_eq!((0..=frequencies.len()).map(made).sum::<u64>(), 400);
}

// Catches: vCPUs that are stopped at different instants, an IPI that is lost on the way, virtual time that moves.
#[test]
fn four_cpus_move_in_virtual_time() {
    require_kvm!();
    let lab = Lab::new();
    let flags = "--time virtual --tsc-khz 2600000 --cpus 4 --api-sock s0 --trace t0";
    let first = start(&mut lab.guest("scenario=smp hz=1000 count=1000000", flags));
    let second = receiver(&lab, 1, "--tsc-khz 1000000");
    ticks_on(&lab, 0);
    move_guest(&lab, 0, 1, "");
    let third = receiver(&lab, 2, "");
    ticks_on(&lab, 1);
    move_guest(&lab, 1, 2, "--max-downtime 1s");
    ticks_on(&lab, 2);
    ctl(&lab, 2, "quit").expect(0);
    for process in [first, second, third] {
        let ended = process.finish().expect(0);
        assert!(ended.stderr.contains(" 0 lost,"), "{ended:#?}");
    }
    clocks_went_on(&lab, 0, 1);
    clocks_went_on(&lab, 1, 2);
}

// Catches: a guest that is lost because its destination was.
#[test]
fn a_guest_goes_on_where_it_is_if_it_cannot_move() {
    require_kvm!();
    let lab = Lab::new();
    let source = start(&mut lab.guest("scenario=idle", "--api-sock s0"));
    ticks_on(&lab, 0);
    let refused = |command: &str, code: i32, parts: &[&str]| {
        ctl(&lab, 0, command).refused(code, parts);
        ticks_on(&lab, 0);
    };
    refused("migrate unix:nobody", 1, &["the VM goes on here", "unix:", "start vmm receive"]);
    refused("migrate tcp:127.0.0.1:1", 1, &["tcp:127.0.0.1:1", "unencrypted", "--insecure"]);
    refused("migrate tcp:127.0.0.1:1 --insecure", 1, &["the VM goes on here", "tcp:127.0.0.1:1"]);
    refused("migrate nowhere", 2, &["write unix:PATH or tcp:HOST:PORT"]);
    refused("migrate unix:x --tsc-khz 1000000", 2, &["--tsc-khz"]);
    refused("migrate --max-downtime 1s", 2, &["required arguments"]);
    // One that takes no guest so large.
    let small = start(&mut lab.vmm("receive unix:small --max-memory 2M"));
    until_it_waits(&lab, "migrate unix:small").refused(1, &["the VM goes on here", "--max-memory allows 2097152"]);
    ticks_on(&lab, 0);
    kill(Pid::from_raw(small.id()), Signal::SIGKILL).expect("killed");
    drop(small);
    // One that cannot run it: the host's frequency is another one, and the guest's TSC is to be the host's.
    let other = start(&mut lab.vmm("receive unix:other --tsc host --tsc-khz 700000"));
    until_it_waits(&lab, "migrate unix:other")
        .refused(1, &["the VM goes on here", "the destination refuses the VM", "--tsc host"]);
    ticks_on(&lab, 0);
    assert_ne!(other.finish().code(), 0);
    // A paused one.
    ctl(&lab, 0, "pause").expect(0);
    ctl(&lab, 0, "migrate unix:nobody").refused(1, &["the VM is paused"]);
    ctl(&lab, 0, "resume").expect(0);
    ticks_on(&lab, 0);
    ctl(&lab, 0, "quit").expect(0);
    source.finish().expect(0);
}

// Catches: a destination that takes the guest over, and then cannot run it as its flags say; one that a signal has
// ended before.
#[test]
fn a_destination_that_cannot_go_on_lets_the_source_keep_the_guest() {
    require_kvm!();
    let lab = Lab::new();
    let source = start(&mut lab.guest("scenario=idle", "--api-sock s0"));
    ticks_on(&lab, 0);
    let cycle = start(&mut lab.vmm("receive unix:cycle --migrate-every 10us"));
    until_it_waits(&lab, "migrate unix:cycle").refused(1, &["the VM goes on here", "too short for real time"]);
    assert_eq!(cycle.finish().code(), 2);
    ticks_on(&lab, 0);
    let taken = start(&mut lab.vmm("receive unix:taken --api-sock s0"));
    until_it_waits(&lab, "migrate unix:taken").refused(1, &["the VM goes on here", "s0 is in use"]);
    assert_eq!(taken.finish().code(), 2);
    ticks_on(&lab, 0);
    let ended = start(&mut lab.vmm("receive unix:ended"));
    while !lab.path("ended").exists() {
        thread::sleep(Duration::from_millis(1));
    }
    kill(Pid::from_raw(ended.id()), Signal::SIGTERM).expect("a signal");
    let ended = ended.finish().expect(0);
    assert!(ended.stderr.contains("vmm: stopped") && !lab.path("ended").exists(), "{ended:#?}");
    ctl(&lab, 0, "quit").expect(0);
    source.finish().expect(0);
}

// Catches: TCP that does not carry a guest.
#[test]
fn a_guest_moves_over_tcp() {
    require_kvm!();
    let lab = Lab::new();
    lab.run("receive tcp:127.0.0.1:0").refused(2, &["tcp:127.0.0.1:0", "--insecure"]);
    let source = start(&mut lab.guest("scenario=idle", "--api-sock s0"));
    ticks_on(&lab, 0);
    let port = {
        // A port that is free now.
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        listener.local_addr().expect("an address").port()
    };
    let destination = start(&mut lab.vmm(&format!("receive tcp:127.0.0.1:{port} --insecure --api-sock s1")));
    until_it_waits(&lab, &format!("migrate tcp:127.0.0.1:{port} --insecure")).expect(0);
    source.finish().expect(0);
    ticks_on(&lab, 1);
    ctl(&lab, 1, "quit").expect(0);
    destination.finish().expect(0);
}
