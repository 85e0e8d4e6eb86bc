//! The control socket and signals, on a guest that idles without end.

use std::{
    fs,
    io::{Read, Write},
    os::unix::{fs::PermissionsExt, net::UnixStream},
    path::Path,
    thread,
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use vm_tests::{Ended, Lab, Running, Trace, require_kvm, start};

/// Time between two polls for something that another process is about to do.
const LOOK_AGAIN: Duration = Duration::from_millis(2);
/// Number of polls, far more than any start needs.
const LOOKS: u32 = 30_000;

/// A VM with a control socket `s` in its lab.
struct Idle {
    lab: Lab,
    process: Running,
}

impl Idle {
    fn start(cmdline: &str, flags: &str) -> Self {
        let lab = Lab::new();
        let process = start(&mut lab.guest(&format!("scenario=idle {cmdline}"), &format!("--api-sock s {flags}")));
        let mut idle = Self { lab, process };
        // The file exists a moment before the VMM listens.
        idle.until(|idle| UnixStream::connect(idle.lab.path("s")).is_ok());
        idle
    }

    fn until(&mut self, mut condition: impl FnMut(&Self) -> bool) {
        for _ in 0..LOOKS {
            if condition(self) {
                return;
            }
            assert!(!self.process.has_ended(), "the VM ended");
            thread::sleep(LOOK_AGAIN);
        }
        panic!("it did not come");
    }

    fn ctl(&self, command: &str) -> Ended {
        self.lab.run(&format!("ctl --api-sock s {command}"))
    }

    fn status(&self) -> Value {
        serde_json::from_str(&self.ctl("status").expect(0).stdout).expect("JSON")
    }

    fn number(&self, name: &str) -> u64 {
        self.status()[name].as_u64().unwrap_or_else(|| panic!("no number {name}"))
    }

    /// Asserts that the guest runs: that it makes new ticks.
    fn ticks_on(&mut self) {
        let before = self.number("ticks");
        self.until(|idle| idle.number("ticks") > before + 3);
    }

    /// Asserts that it ends by itself, with success.
    fn ends(self) -> Ended {
        let ended = self.process.finish().expect(0);
        assert!(!self.lab.path("s").exists(), "the socket is left behind: {ended:#?}");
        assert!(!ended.stderr.contains("panicked at"), "{ended:#?}");
        assert!(ended.stderr.contains(" 0 lost,"), "{ended:#?}");
        ended
    }
}

/// One request as any HTTP client would write it; the status code and the body.
fn http(socket: &Path, method: &str, path: &str, body: &str) -> (u16, String) {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let length = body.len();
    let head =
        format!("{method} {path} HTTP/1.1\r\nHost: vmm\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n");
    stream.write_all(format!("{head}{body}").as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").expect("a header's end");
    let code = head.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status code");
    (code, body.to_owned())
}

// Catches: a socket that other users may connect to, and commands without their effect.
#[test]
fn every_command() {
    require_kvm!();
    let mut vm = Idle::start("clockevent=kvm-tsc-deadline hz=200", "");
    let mode = fs::metadata(vm.lab.path("s")).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o600);
    vm.ticks_on();
    assert_eq!(vm.status()["state"], "running");

    let _ = vm.ctl("pause").expect(0);
    let [first, second] = [(); 2].map(|()| {
        thread::sleep(Duration::from_millis(30));
        vm.status()
    });
    assert_eq!(first["state"], "paused");
    assert_eq!(first, second, "time passes while it is paused");
    let _ = vm.ctl("pause").expect(0);
    let _ = vm.ctl("resume").expect(0);
    let _ = vm.ctl("resume").expect(0);
    vm.ticks_on();

    let _ = vm.ctl("migrate --tsc-khz 1500000").expect(0);
    assert_eq!((vm.number("tsc_khz"), vm.number("migrations")), (1_500_000, 1));
    vm.ticks_on();
    let _ = vm.ctl("migrate --tsc-khz 5000000 --deadline fire --downtime catch-up").expect(0);
    vm.ticks_on();

    let _ = vm.ctl("snapshot running").expect(0);
    assert_eq!(vm.status()["state"], "running");
    vm.ticks_on();
    let _ = vm.ctl("snapshot still --stay-paused").expect(0);
    let saved = vm.status();
    assert_eq!(saved["state"], "paused");
    let _ = vm.ctl("snapshot still-too").expect(0);
    assert_eq!(vm.status(), saved, "a snapshot of a paused VM leaves it as it was");
    let restored = vm.lab.restore("still", "--save-at 1ms --save-to later");
    assert_eq!(restored.trace().only("restore").tsc(), saved["guest_tsc"].as_u64().unwrap());
    assert_eq!(restored.trace().only("restore").vm_ns(), saved["vm_time_ns"].as_u64().unwrap());
    let _ = vm.ctl("resume").expect(0);
    vm.ticks_on();
    let _ = vm.ctl("quit").expect(0);
    let _ = vm.ends();
}

// Catches: with KVM's LAPIC, whose clock and timers go on when the vCPUs stop: a pause that VM time counts, a timer
// that does not outlive it, a refused migration that takes the VM with it.
#[test]
fn every_command_with_kvms_lapic() {
    require_kvm!();
    let mut vm = Idle::start("clockevent=kvm-tsc-deadline hz=200", "--lapic kvm");
    vm.ticks_on();
    assert_eq!((&vm.status()["lapic"], &vm.status()["tsc_source"]), (&"kvm".into(), &"host".into()));
    let _ = vm.ctl("pause").expect(0);
    let [first, second] = [(); 2].map(|()| {
        thread::sleep(Duration::from_millis(30));
        vm.status()
    });
    assert_eq!(first["state"], "paused");
    assert_eq!(first, second, "time passes while it is paused");
    let _ = vm.ctl("snapshot still").expect(0);
    assert_eq!(vm.status(), first, "a snapshot of a paused VM leaves it as it was");
    let _ = vm.ctl("resume").expect(0);
    vm.ticks_on();
    let restored = vm.lab.restore("still", "--save-at 1ms --save-to later");
    // KVM's clock goes on from the moment at which it is set.
    assert!(restored.trace().only("restore").vm_ns() >= first["vm_time_ns"].as_u64().unwrap());

    let khz = vm.number("tsc_khz");
    let _ = vm.ctl(&format!("migrate --tsc-khz {khz} --deadline keep --downtime catch-up")).expect(0);
    assert_eq!((vm.number("tsc_khz"), vm.number("migrations")), (khz, 1));
    vm.ticks_on();
    vm.ctl(&format!("migrate --tsc-khz {}", khz * 11)).refused(1, &["0.1 to 10 times"]);
    vm.ticks_on();
    let _ = vm.ctl("snapshot running").expect(0);
    vm.ticks_on();
    let _ = vm.ctl("quit").expect(0);
    let _ = vm.ends();
}

// Catches: a pause after which KVM counts a one-shot timer down anew that is over, or that it counts as VM time.
#[test]
fn pauses_keep_a_count_in_kvms_lapic() {
    require_kvm!();
    let mut vm = Idle::start("clockevent=lapic-oneshot hz=200", "--lapic kvm");
    vm.ticks_on();
    for _ in 0..60 {
        let _ = vm.ctl("pause").expect(0);
        let _ = vm.ctl("resume").expect(0);
    }
    vm.ticks_on();
    let _ = vm.ctl("quit").expect(0);
    let ended = vm.ends();
    assert!(ended.stderr.contains(" 0 woken early;"), "{ended:#?}");
}

// Catches: an API that only our own client can speak.
#[test]
fn any_http_client_will_do() {
    require_kvm!();
    let mut vm = Idle::start("hz=100", "");
    vm.ticks_on();
    let socket = vm.lab.path("s");
    let (code, body) = http(&socket, "GET", "/v1/status", "");
    let status: Value = serde_json::from_str(&body).unwrap();
    assert_eq!((code, &status["state"]), (200, &Value::from("running")));
    assert_eq!(http(&socket, "PUT", "/v1/pause", "").0, 204);
    let dir = vm.lab.path("snapshot");
    assert_eq!(http(&socket, "PUT", "/v1/snapshot", &serde_json::json!({ "dir": dir }).to_string()).0, 204);
    assert!(dir.join("state").exists() && dir.join("memory").exists());
    for (method, path, body, code) in [
        ("GET", "/v1/pause", "", 405),
        ("GET", "/v2/status", "", 404),
        ("PUT", "/v1/snapshot", r#"{"dir":"relative"}"#, 400),
        ("PUT", "/v1/snapshot", r#"{"dir":"/x","compress":true}"#, 400),
        ("PUT", "/v1/migrate", r#"{"tsc_khz":0}"#, 400),
        ("PUT", "/v1/migrate", "{", 400),
        ("PUT", "/v1/migrate", r#"{"tsc_khz":99000000}"#, 400),
    ] {
        let (got, answer) = http(&socket, method, path, body);
        assert_eq!(got, code, "{method} {path} {body}: {answer}");
        assert!(serde_json::from_str::<Value>(&answer).unwrap()["error"].is_string(), "{answer}");
    }
    assert_eq!(http(&socket, "PUT", "/v1/resume", "").0, 204);
    assert_eq!(http(&socket, "PUT", "/v1/quit", "").0, 204);
    let _ = vm.ends();
}

// Catches: a command that fails and takes the VM with it, or leaves something half-made.
#[test]
fn a_refused_command_changes_nothing() {
    require_kvm!();
    let mut vm = Idle::start("hz=200", "");
    fs::create_dir(vm.lab.path("occupied")).unwrap();
    fs::write(vm.lab.path("occupied/file"), "mine").unwrap();
    vm.ctl("snapshot occupied").refused(1, &["occupied", "is not empty"]);
    vm.ctl("snapshot absent/snapshot").refused(1, &["absent"]);
    vm.ctl("migrate --tsc-khz 99999999").refused(1, &["0.1 to 10 times"]);
    vm.ctl("migrate --tsc-khz 0").refused(2, &["10000"]);
    assert_eq!(fs::read(vm.lab.path("occupied/file")).unwrap(), b"mine");
    let mut names: Vec<_> = fs::read_dir(vm.lab.path("")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["occupied", "s"]);
    vm.ticks_on();
    let _ = vm.ctl("quit").expect(0);
    let _ = vm.ends();
    let lab = Lab::new();
    lab.run("ctl --api-sock nobody status").refused(2, &["nobody"]);
}

// Catches: a signal that kills the process, leaving the socket, or that is ignored while the VM is paused.
#[test]
fn signals_end_it_in_good_order() {
    require_kvm!();
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        for (flags, paused) in [("", false), ("", true), ("--time virtual", false)] {
            let mut vm = Idle::start("hz=200", flags);
            vm.ticks_on();
            if paused {
                let _ = vm.ctl("pause").expect(0);
            }
            kill(Pid::from_raw(vm.process.id()), signal).unwrap();
            let _ = vm.ends();
        }
    }
}

/// Waits until process `pid` blocks SIGTERM, as a session does from the first: then it is about to enter the guest.
fn until_it_blocks_signals(pid: i32) {
    const SIGTERM: u64 = 1 << 14;
    for _ in 0..LOOKS {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
        let blocked = status.lines().find_map(|line| line.strip_prefix("SigBlk:")).expect("a mask").trim();
        if u64::from_str_radix(blocked, 16).expect("hexadecimal") & SIGTERM != 0 {
            return;
        }
        thread::yield_now();
    }
    panic!("it does not block signals");
}

// Catches: a signal that is lost because the thread that waits for signals starts after the guest.
#[test]
fn a_signal_that_comes_at_once_is_heard() {
    require_kvm!();
    let lab = Lab::new();
    for _ in 0..5 {
        let process = start(&mut lab.guest("scenario=idle hz=200", ""));
        until_it_blocks_signals(process.id());
        kill(Pid::from_raw(process.id()), Signal::SIGTERM).unwrap();
        let ended = process.finish().expect(0);
        assert!(ended.stderr.ends_with("vmm: stopped\n"), "{ended:#?}");
    }
}

// Catches: a VM with --paused that runs before it is resumed.
#[test]
fn it_can_start_paused() {
    require_kvm!();
    let mut vm = Idle::start("hz=200", "--paused");
    let status = vm.status();
    assert_eq!((&status["state"], &status["vm_time_ns"], &status["ticks"]), (&"paused".into(), &0.into(), &0.into()));
    let _ = vm.ctl("resume").expect(0);
    vm.ticks_on();
    let _ = vm.ctl("quit").expect(0);
    let _ = vm.ends();
}

// Catches: a resume that has no policies of its own, one that forgets those of the command line after a migration, and
// a migration that needs the guest's present frequency as a parameter.
#[test]
fn a_resume_and_a_migration_may_leave_out_what_stays() {
    require_kvm!();
    let mut vm = Idle::start("hz=200", "--tsc trapped --trace trace --deadline keep --downtime catch-up");
    vm.ticks_on();
    let khz = vm.number("tsc_khz");
    for (command, khz) in [
        ("resume --deadline fire --downtime freeze", khz),
        ("resume --downtime freeze", khz),
        ("resume", khz),
        ("migrate", khz),
        ("resume", khz),
        ("migrate --tsc-khz 1500000 --deadline keep", 1_500_000),
        ("migrate --downtime catch-up", 1_500_000),
    ] {
        if command.starts_with("resume") {
            let _ = vm.ctl("pause").expect(0);
        }
        let _ = vm.ctl(command).expect(0);
        assert_eq!(vm.number("tsc_khz"), khz, "{command}");
    }
    assert_eq!(http(&vm.lab.path("s"), "PUT", "/v1/resume", r#"{"deadline": "later"}"#).0, 400);
    vm.ticks_on();
    let _ = vm.ctl("quit").expect(0);
    let trace = vm.lab.path("trace");
    let Idle { lab: _lab, process } = vm;
    let _ = process.finish().expect(0);
    let policies: Vec<String> = Trace::read(&trace)
        .all("restore")
        .map(|line| format!("{} {}", line.word("deadline"), line.word("downtime")))
        .collect();
    let expected = ["fire freeze", "keep freeze", "keep catch-up", "rescale freeze", "keep catch-up"];
    assert_eq!(policies, [&expected[..], &["keep freeze", "rescale catch-up"]].concat());
}

// Catches: a frequency asked for at a restore and forgotten, because a migration came before the first resume.
#[test]
fn a_migration_before_the_first_resume_takes_the_restores_frequency() {
    require_kvm!();
    let lab = Lab::new();
    let _ = lab.boot("scenario=idle hz=200", "--time virtual --tsc-khz 2600000 --save-at 50ms --save-to saved");
    let process = start(&mut lab.vmm("restore saved --time real --tsc-khz 1300000 --api-sock s --paused"));
    let mut vm = Idle { lab, process };
    vm.until(|vm| UnixStream::connect(vm.lab.path("s")).is_ok());
    let _ = vm.ctl("migrate").expect(0);
    assert_eq!((vm.number("tsc_khz"), vm.number("migrations")), (1_300_000, 2));
    assert_eq!(vm.number("migrations_here"), 1);
    let _ = vm.ctl("resume").expect(0);
    vm.ticks_on();
    assert_eq!(vm.number("tsc_khz"), 1_300_000);
    let _ = vm.ctl("quit").expect(0);
    let _ = vm.ends();
}
