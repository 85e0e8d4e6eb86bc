//! Time that the guest did not run: the wall clock, stops by the host without a request, the guest's TSC.

use std::{
    fs,
    path::Path,
    process::Command,
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};
use vm_tests::{Lab, Running, Trace, doctor, raw, require_kvm, start, state_file::change_sections};

/// Number of polls, far more than any start needs, and the time between two of them.
const LOOKS: u32 = 30_000;
const LOOK_AGAIN: Duration = Duration::from_millis(2);

fn unix_ns() -> u64 {
    u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos()).unwrap()
}

/// Both, in memory; kvmclock's page at 0x101000, the wall clock at 0x101040.
const PAGE: u32 = 0x10_1000;
const WALL: u32 = PAGE + 0x40;

/// A guest that requests the wall clock and writes it to COM1, first at once, and again when it finds
/// PVCLOCK_GUEST_STOPPED, which it clears. It ends after the second.
fn asks_again() -> Vec<u8> {
    let word = |value: u32| value.to_le_bytes();
    let wrmsr = |index: u32, value: u32| {
        [&[0xb9][..], &word(index), &[0xb8], &word(value), &[0x31, 0xd2, 0x0f, 0x30]].concat() // MOV ECX; MOV EAX; XOR EDX; WRMSR
    };
    // WRMSR; MOV ESI, WALL; MOV ECX, 12; MOV DX, 0x3f8; CLD; REP OUTSB
    let ask = [
        wrmsr(0x4b56_4d00, WALL),
        [&[0xbe][..], &word(WALL), &[0xb9], &word(12), &[0x66, 0xba, 0xf8, 0x03, 0xfc, 0xf3, 0x6e]].concat(),
    ]
    .concat();
    let flags = word(PAGE + 29);
    // TEST byte [flags], 2; JZ back to it; AND byte [flags], 0xfd
    let wait = [&[0xf6, 0x05][..], &flags, &[2, 0x74, 0xf7, 0x80, 0x25], &flags, &[0xfd]].concat();
    let enable = wrmsr(0x4b56_4d01, PAGE | 1);
    raw::multiboot(&[&raw::INTERRUPTIBLE[..], &enable, &ask, &wait, &ask, &raw::SUCCESS].concat())
}

/// The Unix time of VM time 0 that 12 bytes of a wall clock give, in nanoseconds.
fn wall_ns(bytes: &[u8]) -> u64 {
    let word = |at: usize| u64::from(u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()));
    assert_eq!(word(0) % 2, 0, "an odd version");
    word(4) * 1_000_000_000 + word(8)
}

fn output(command: &mut Command) -> Vec<u8> {
    let output = command.output().expect("vmm runs");
    assert!(output.status.success(), "{output:?}");
    output.stdout
}

// Catches: a wall clock that is computed once, at boot. Linux msr.rst: real time now minus kvmclock now, at each write.
#[test]
fn the_wall_clock_is_right_each_time_that_a_guest_asks() {
    require_kvm!();
    let lab = Lab::new();
    fs::write(lab.path("asks"), asks_again()).unwrap();
    const PAUSE: Duration = Duration::from_millis(1200);
    // Half of it distinguishes a clock that stood from one that did not. The slack is for VMM_TEST_HOST_KHZ, with which
    // VM time may run several times as fast as the wall clock until the VM is saved.
    const SLACK: i128 = 600_000_000;
    for lapic in ["user", "kvm"] {
        let saved = format!("{lapic}-saved");
        let begun = unix_ns();
        let flags = format!("--guest asks --lapic {lapic} --save-at 20ms --save-to {saved}");
        let first = i128::from(wall_ns(&output(&mut lab.vmm(&flags))));
        let (begun, ended) = (i128::from(begun), i128::from(unix_ns()));
        let boot = begun - SLACK..=ended + SLACK;
        assert!(boot.contains(&first), "{lapic}: not the time of the boot: {begun} {first} {ended}");
        thread::sleep(PAUSE);
        // VM time stood still, so that VM time 0 is later by all of the time from the save to the restore.
        let again = i128::from(wall_ns(&output(&mut lab.vmm(&format!("restore {saved} --downtime freeze")))));
        let (least, most) = (PAUSE.as_nanos() as i128 - SLACK, i128::from(unix_ns()) - begun + SLACK);
        let moved = again - first;
        assert!((least..=most).contains(&moved), "{lapic}: moved by {moved} ns, not {least} to {most}");
        // VM time went on: VM time 0 is where it was.
        let caught_up = i128::from(wall_ns(&output(&mut lab.vmm(&format!("restore {saved} --downtime catch-up")))));
        let moved = (caught_up - first).abs();
        assert!(moved < SLACK, "{lapic}: moved by {moved} ns under catch-up");
    }
}

/// A VM that ticks, and its process.
struct Ticking {
    lab: Lab,
    process: Running,
}

impl Ticking {
    /// Started, with a control socket `s`, and seen to have ticked. It ticks until [`Self::end`], however long a busy
    /// machine takes to get there.
    fn start(cmdline: &str, flags: &str) -> Self {
        let lab = Lab::new();
        let flags = format!("{flags} --api-sock s --trace trace --summary summary");
        let process = start(&mut lab.guest(&format!("hz=100 count=1000000 {cmdline}"), &flags));
        let mut ticking = Self { lab, process };
        ticking.tick(20);
        ticking
    }

    /// Waits for so many more ticks.
    fn tick(&mut self, more: u64) {
        let mut first = None;
        self.until(|status| {
            let Some(ticks) = status["ticks"].as_u64() else { return false };
            ticks > *first.get_or_insert(ticks) + more
        });
    }

    fn until(&mut self, mut condition: impl FnMut(&Value) -> bool) {
        for _ in 0..LOOKS {
            let status = self.lab.run("ctl --api-sock s status");
            if status.code() == 0 && condition(&serde_json::from_str(&status.stdout).expect("JSON")) {
                return;
            }
            assert!(!self.process.has_ended(), "the VM ended: {status:?}");
            thread::sleep(LOOK_AGAIN);
        }
        panic!("it did not come");
    }

    /// Stops the process for `length`, in a way that it cannot see.
    fn stop_for(&self, length: Duration) {
        let process = Pid::from_raw(self.process.id());
        kill(process, Signal::SIGSTOP).expect("it runs");
        thread::sleep(length);
        kill(process, Signal::SIGCONT).expect("it is there");
    }

    /// Its summary, its trace, and its messages, after some more ticks.
    fn end(mut self) -> (Value, Trace, String) {
        self.tick(50);
        self.lab.run("ctl --api-sock s quit").expect(0);
        let ended = self.process.finish().expect(0);
        let summary = serde_json::from_slice(&fs::read(self.lab.path("summary")).unwrap()).unwrap();
        (summary, Trace::read(&self.lab.path("trace")), ended.stderr)
    }
}

// Catches: a stop that is missed because a request ends it, before any vCPU reads the clock.
#[test]
fn a_stop_that_ends_with_a_request_is_a_pause() {
    require_kvm!();
    for lapic in ["user", "kvm"] {
        let lab = Lab::new();
        let flags = format!("--lapic {lapic} --api-sock s --summary summary");
        let mut vmm = start(&mut lab.guest("scenario=idle hz=100", &flags));
        const STOPS: u64 = 4;
        for _ in 0..STOPS {
            let ran = (0..LOOKS).any(|_| {
                thread::sleep(LOOK_AGAIN);
                lab.run("ctl --api-sock s resume").code() == 0
            });
            assert!(ran && !vmm.has_ended(), "{lapic}: it is not there");
            let process = Pid::from_raw(vmm.id());
            kill(process, Signal::SIGSTOP).expect("it runs");
            let mut client = lab.vmm("ctl --api-sock s pause").spawn().expect("it can be asked");
            thread::sleep(Duration::from_millis(1200));
            kill(process, Signal::SIGCONT).expect("it is there");
            assert!(client.wait().expect("it ends").success());
        }
        lab.run("ctl --api-sock s quit").expect(0);
        vmm.finish().expect(0);
        let summary: Value = serde_json::from_slice(&fs::read(lab.path("summary")).unwrap()).unwrap();
        assert!(summary["host_stops"].as_u64() >= Some(STOPS), "{lapic}: {summary}");
    }
}

// Catches: VM time that leaps over a stop that was not requested, and a guest without GUEST_STOPPED after it.
#[test]
fn a_stopped_process_is_a_pause() {
    require_kvm!();
    // Longer than any scheduler's delay that the VMM takes for one.
    let stop = Duration::from_millis(1500);
    let stop_ns = u64::try_from(stop.as_nanos()).unwrap();
    for (flags, downtime) in [
        ("--tsc host", "freeze"),
        ("--tsc trapped", "freeze"),
        ("--lapic kvm", "freeze"),
        ("--cpus 2", "freeze"),
        ("--tsc trapped", "catch-up"),
        ("--lapic kvm", "catch-up"),
    ] {
        let what = format!("{flags} {downtime}");
        let scenario = if flags == "--cpus 2" { "scenario=smp" } else { "" };
        let ticking = Ticking::start(scenario, &format!("{flags} --downtime {downtime}"));
        ticking.stop_for(stop);
        let (summary, trace, stderr) = ticking.end();
        // A busy machine may stop the VM once more.
        assert!(summary["host_stops"].as_u64().unwrap() >= 1, "{what}: {summary}");
        assert!(summary["ticks"]["guest_stopped_seen"].as_u64().unwrap() >= 1, "{what}: {summary}");
        assert_eq!(summary["ticks"]["clock_steps_back"], 0, "{what}: {summary}");
        assert!(stderr.contains("no vCPU ran for"), "{what}: {stderr}");
        // The stop itself may be longer than requested, and the VMM takes it to begin a tenth of a second later at
        // most.
        let gap = trace.all("host-stop").max_by_key(|line| line.field("gap_ns")).expect("a stop in the trace");
        assert!(gap.field("gap_ns") >= stop_ns - 110_000_000, "{what}: {gap:?}");
        let counted = trace.all("restore").map(|line| line.field("downtime_ns")).max().expect("a restore");
        let worst = summary["ticks"]["late_by_guest"]["worst_ns"].as_u64().unwrap();
        if downtime == "freeze" {
            assert_eq!(counted, 0, "{what}");
            // A tick in flight is late by the tenth at most, and by what this machine makes of it.
            assert!(worst < stop_ns / 2, "{what}: {summary}");
        } else {
            assert!(counted >= gap.field("gap_ns"), "{what}: {counted}");
            assert!(worst > stop_ns / 2, "{what}: {summary}");
        }
    }
}

// Catches: the end of a requested pause, taken for a stop by the host.
#[test]
fn a_paused_vm_cannot_be_stopped_by_its_host() {
    require_kvm!();
    for lapic in ["user", "kvm"] {
        let ticking = Ticking::start("", &format!("--lapic {lapic}"));
        ticking.lab.run("ctl --api-sock s pause").expect(0);
        ticking.stop_for(Duration::from_millis(800));
        ticking.lab.run("ctl --api-sock s resume").expect(0);
        let (summary, _, stderr) = ticking.end();
        assert_eq!(summary["host_stops"], 0, "{lapic}: {stderr}");
        assert_eq!(summary["ticks"]["guest_stopped_seen"], 1, "{lapic}: {summary}");
    }
}

// Catches: an injected stop after which GUEST_STOPPED is set, or that does not make the guest's timers late.
#[test]
fn a_sweep_shows_what_an_unnoticed_stop_does() {
    require_kvm!();
    let lab = Lab::new();
    let sweep = |flags: &str| lab.run(&format!("sweep --every exit --json sweep.json {flags}"));
    sweep("--inject host-stop=2s").expect(1);
    let found: Value = serde_json::from_slice(&fs::read(lab.path("sweep.json")).unwrap()).unwrap();
    assert_eq!(found["inputs"]["inject"], "host-stop=2s");
    let totals = &found["totals"][0];
    assert_eq!(totals["ratio"], "1");
    let points = found["points"].as_array().unwrap().len();
    assert_eq!(totals["verdicts"], json!([["late", points]]), "{totals}");
    // A stop that is shorter than the rest of the tick has one effect: GUEST_STOPPED is not set.
    sweep("--inject host-stop=1us --tolerance 100us").expect(1);
    let found: Value = serde_json::from_slice(&fs::read(lab.path("sweep.json")).unwrap()).unwrap();
    assert_eq!(found["totals"][0]["verdicts"], json!([["untold", points]]), "{found:#}");
    sweep("--inject host-stop=2s --ratio 0.5").refused(2, &["host-stop", "--ratio 1"]);
    sweep("--inject host-stop=").refused(2, &["host-stop=", "--inject"]);
}

/// Moves a saved machine's TSC, and all values in its units, by `by`.
fn move_tsc(state: &Path, by: i64) {
    let moved =
        |value: &mut Value| *value = json!(value.as_u64().expect("a TSC").checked_add_signed(by).expect("in range"));
    change_sections(state, |name, mut payload| {
        if name == "clock" {
            for pointer in ["/moment/tsc", "/moment/page/tsc_timestamp", "/judge/tsc"] {
                moved(payload.pointer_mut(pointer).expect(pointer));
            }
        }
        Some(payload)
    });
}

/// Whether KVM moves a guest's TSC by an offset here.
fn offset_works() -> bool {
    doctor()["tsc_offset"]["works"].as_bool().unwrap()
}

/// A guest that writes its TSC and succeeds if RDTSC then goes on from there: within 2^32 ticks, at most some seconds.
fn moves_its_tsc() -> Vec<u8> {
    // MOV ECX, 0x10; XOR EAX, EAX; MOV EDX, 0x12345; WRMSR; RDTSC; CMP EDX, 0x12345; JE over HLT
    let code = [
        0xb9, 0x10, 0, 0, 0, 0x31, 0xc0, 0xba, 0x45, 0x23, 0x01, 0, 0x0f, 0x30, 0x0f, 0x31, 0x81, 0xfa, 0x45, 0x23,
        0x01, 0, 0x74, 0x01, 0xf4,
    ];
    raw::multiboot(&[&code[..], &raw::SUCCESS].concat())
}

// Catches: a write of the TSC that is refused where KVM could do it, or taken where nothing happens.
#[test]
fn a_guest_moves_its_tsc_where_kvm_does() {
    require_kvm!();
    let lab = Lab::new();
    fs::write(lab.path("moves"), moves_its_tsc()).unwrap();
    let doctor = doctor();
    let scales = doctor["tsc_scaling"].as_array().unwrap().iter().all(|scaling| scaling["works"] == true);
    let double = doctor["host_tsc_khz"].as_u64().unwrap() * 2;
    let scaled = [format!("--tsc scaled --tsc-khz {double}"), format!("--lapic kvm --tsc-khz {double}")];
    let flags = ["--tsc host".to_owned(), "--lapic kvm".to_owned()];
    for flags in flags.into_iter().chain(scales.then_some(scaled).into_iter().flatten()) {
        let ended = lab.run(&format!("--guest moves {flags}"));
        if doctor["tsc_offset"]["works"] == true {
            ended.expect(0);
        } else {
            // A #GP, which this guest has no handler for.
            assert!(ended.stderr.contains("triple fault"), "{flags}: {ended:#?}");
        }
    }
}

// Catches: a restore that takes the host's TSC because its frequency is right, whatever its value is.
#[test]
fn a_restored_tsc_goes_on_from_its_value() {
    require_kvm!();
    let lab = Lab::new();
    let offset_works = offset_works();
    // One-shot counts are in nanoseconds: the TSC can be moved under them.
    let saved = |dir: &str, lapic: &str| {
        let flags = format!("--tsc host --lapic {lapic} --save-at 100ms --save-to {dir}");
        lab.boot_traced("clockevent=lapic-oneshot hz=100 count=20", &flags).trace().first("save").tsc()
    };
    // As from a host that was up for longer, and from one that was not.
    for dir in ["longer", "shorter"] {
        let here = saved(dir, "user");
        // Half of a host's TSC is more than a second away, which is what clocks may disagree by.
        let by = if dir == "longer" { 1 << 50 } else { -i64::try_from(here / 2).unwrap() };
        let tsc = here.checked_add_signed(by).unwrap();
        move_tsc(&lab.path(dir).join("state"), by);
        let run = lab.restore(dir, "");
        run.in_order(run.summary.count("ticks/ticks"));
        assert_eq!(run.trace().only("restore").tsc(), tsc, "{dir}: {run:#?}");
        let asked = lab.run(&format!("restore {dir} --tsc host"));
        if offset_works {
            asked.expect(0);
        } else {
            asked.refused(3, &["--tsc host", &tsc.to_string(), "another counter", "--tsc trapped"]);
        }
        saved(&format!("{dir}-kvm"), "kvm");
        move_tsc(&lab.path(format!("{dir}-kvm")).join("state"), by);
        let asked = lab.run(&format!("restore {dir}-kvm"));
        if offset_works {
            asked.expect(0);
        } else {
            asked.refused(3, &["--lapic kvm", "another counter", "KVM does not move a guest's TSC"]);
        }
    }
    // Nothing moved: the host's TSC has counted on since the save.
    saved("same", "user");
    let run = lab.restore("same", "");
    assert!(run.ended.stderr.contains("TSC source host"), "{run:#?}");
    // Virtual time's TSC is not the host's either.
    let saved = lab.boot_traced("count=20", "--time virtual --save-at 100ms --save-to virtual");
    let restored = lab.restore("virtual", "--time real");
    restored.in_order(20 - saved.summary.count("ticks/ticks"));
    assert_eq!(restored.trace().only("restore").tsc(), saved.trace().only("save").tsc());
}

// Catches: a guest without trap sites that gets another counter without a message.
#[test]
fn a_guest_whose_tsc_cannot_go_on_is_refused() {
    require_kvm!();
    let lab = Lab::new();
    fs::write(lab.path("asks"), asks_again()).unwrap();
    output(&mut lab.vmm("--guest asks --save-at 50ms --save-to s"));
    move_tsc(&lab.path("s/state"), 1 << 50);
    let restored = lab.run("restore s");
    if offset_works() {
        restored.expect(0);
    } else {
        restored.refused(3, &["cannot go on with asks", "another counter", "no trap sites"]);
    }
}

// Catches: a downtime that 64 bits do not hold, clipped to 584 years.
#[test]
fn downtimes_beyond_the_range_are_refused() {
    require_kvm!();
    let lab = Lab::new();
    lab.boot("count=20", "--time virtual --save-at 100ms --save-to s");
    for length in ["585years", "10000years"] {
        let restored = lab.run(&format!("restore s --downtime catch-up --downtime-length {length}"));
        restored.refused(2, &["downtime", "exceed 64 bits", "--downtime-length"]);
    }
    let run = lab.restore("s", "--downtime catch-up --downtime-length 10years");
    assert_eq!(run.trace().only("restore").field("downtime_ns"), 315_576_000_000_000_000, "{run:#?}");
}
