//! A run fails if its ticks are wrong, and reports checks that it could not make.

use std::{fs, path::Path};

use guest_abi::{
    report::{CAPACITY, HEADER_BYTES, LAYOUT, MAGIC, RECORD_BYTES},
    sites::Kind,
};
use object::{LittleEndian, Object, ObjectSection, read::elf::ElfFile64};
use serde_json::Value;
use vm_tests::{
    Ended, Lab, finish, guest,
    raw::{SUCCESS, pvh_with_ring},
    require_kvm,
};

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// Runs `vmm` with these flags and files for all results; gives how it ended, and the summary.
#[track_caller]
fn judged(lab: &Lab, flags: &str) -> (Ended, Value) {
    let ended = lab.run(&format!("{flags} --summary s.json --report r.html --junit c.xml --tap c.tap"));
    let summary = json(&lab.path("s.json"));
    // All of them say the same.
    let pass = ended.code() == 0;
    assert_eq!(summary["verdict"]["pass"], pass, "{ended:#?}");
    let read = |name: &str| fs::read_to_string(lab.path(name)).unwrap();
    assert_eq!(read("c.xml").contains("failures=\"0\""), pass, "{}", read("c.xml"));
    assert_eq!(!read("c.tap").contains("not ok"), pass, "{}", read("c.tap"));
    assert_eq!(!read("r.html").contains("<span class=\"tone bad\">failed</span>"), pass);
    assert!(!read("r.html").contains("every tick came"));
    (ended, summary)
}

/// The last line on standard error, and the one before.
fn last_lines(ended: &Ended) -> (&str, &str) {
    let mut lines = ended.stderr.lines().rev();
    (lines.next().unwrap_or(""), lines.next().unwrap_or(""))
}

// A restore on a slower TSC had every tick half a period late, the badge "every tick came" and exit code 0.
#[test]
fn a_restore_whose_ticks_are_late_fails_if_lateness_is_asked_for() {
    require_kvm!();
    let lab = Lab::new();
    let saving = "--time virtual --tsc-khz 2600000 --save-at 52500us --save-to snapshot";
    lab.boot("clockevent=lapic-deadline hz=100 count=30", saving);
    let slower = "restore snapshot --tsc-khz 1733334";
    let (ended, summary) = judged(&lab, slower);
    assert!(ended.code() == 0 && last_lines(&ended).0.ends_with("; passed"), "{ended:#?}");
    assert!(summary["ticks"]["late_by_guest"]["worst_ns"].as_u64().unwrap() > 4_000_000, "{summary:#}");
    let (ended, summary) = judged(&lab, &format!("{slower} --fail-on late=1ms"));
    assert_eq!(ended.code(), 1);
    let (reason, closing) = last_lines(&ended);
    assert!(closing.ends_with("; failed") && reason.contains("the limit is 1ms"), "{ended:#?}");
    assert_eq!(summary["verdict"]["reasons"].as_array().unwrap().len(), 1, "{summary:#}");
    assert_eq!(summary["verdict"]["checks"], serde_json::json!({"run": "pass", "late": "fail"}));
    judged(&lab, &format!("{slower} --fail-on late=20ms,early,lost,clock,accounts")).0.expect(0);
    judged(&lab, "restore snapshot --tsc-khz 5200000 --fail-on early").0.expect(1);
    judged(&lab, "restore snapshot --tsc-khz 5200000 --fail-on none").0.expect(0);
}

// Catches: ticks that are still to come taken for lost ones, a save that fails because of them.
#[test]
fn ticks_to_come_after_a_save_a_signal_or_a_timeout_are_not_lost() {
    require_kvm!();
    let lab = Lab::new();
    let guest = guest().display();
    let saving =
        format!("--guest {guest} --time virtual --save-at 55ms --save-to snapshot --fail-on lost,early,late=1ms");
    let (_, summary) = judged(&lab, &saving);
    assert_eq!((&summary["finish"], &summary["lost"]), (&"saved".into(), &0.into()));
    // Before the guest has made its ring there is none, and no tick either.
    let (_, summary) = judged(&lab, &format!("--guest {guest} --time virtual --save-at 10us --save-to sooner"));
    assert_eq!((&summary["judged"], &summary["ticks"]["ticks"]), (&true.into(), &0.into()));
    assert_eq!(summary["ticks"]["late_by_guest"], Value::Null);
    // Idle has no last tick, and this is the guest that a signal or `quit` ends.
    let mut idle = lab.guest("scenario=idle hz=100", "--timeout 300ms --fail-on lost,clock --summary s.json");
    let ended = finish(&mut idle).expect(1);
    assert!(last_lines(&ended).0.starts_with("vmm: the guest has not ended after 300ms"), "{ended:#?}");
    let summary = json(&lab.path("s.json"));
    assert_eq!(summary["verdict"]["checks"], serde_json::json!({"run": "fail", "lost": "pass", "clock": "pass"}));
}

// Catches: a guest's own failure hidden by checks, or by what they found.
#[test]
fn a_guest_that_fails_fails_the_run_with_its_reason_first() {
    require_kvm!();
    let lab = Lab::new();
    let mut wrong = lab.guest("clockevent=none", "--time virtual --fail-on none --junit c.xml");
    finish(&mut wrong).refused(1, &["the guest failed with code 2"]);
    assert!(fs::read_to_string(lab.path("c.xml")).unwrap().contains("the guest failed with code 2"));
    let raw = "--debug-exit-status raw --time virtual --fail-on late=0s";
    assert_eq!(finish(&mut lab.guest("count=3", raw)).code(), 1, "QEMU's for code 0");
    assert_eq!(finish(&mut lab.guest("clockevent=none", raw)).code(), 5, "QEMU's for code 2");
}

// Catches: a check that is misspelt and so not made.
#[test]
fn checks_that_do_not_exist_are_refused() {
    let lab = Lab::new();
    for list in ["late", "late=5", "lates", "lost,none", "lost,,clock"] {
        lab.run(&format!("--guest x --fail-on {list}")).refused(2, &["--fail-on"]);
        lab.run(&format!("restore x --fail-on {list}")).refused(2, &["--fail-on"]);
    }
    lab.run("--fail-on none").refused(2, &["--fail-on", "--guest"]);
}

/// The guest without its table's entry for the RDTSC at each address that `forget` says; gives those.
fn forgetful_guest(lab: &Lab, name: &str, forget: impl Fn(usize) -> bool) -> Vec<u64> {
    let mut bytes = fs::read(guest()).unwrap();
    let elf = ElfFile64::<LittleEndian>::parse(bytes.as_slice()).unwrap();
    let table = elf.section_by_name(".trap_sites").unwrap();
    let (offset, size) = table.file_range().unwrap();
    let (offset, size) = (usize::try_from(offset).unwrap(), usize::try_from(size).unwrap());
    let entry = |at: usize| &bytes[offset + at * 16..][..16];
    let number = |entry: &[u8], at: usize| u64::from_le_bytes(entry[at..at + 8].try_into().unwrap());
    let (mut kept, mut forgotten, mut rdtscs) = (Vec::new(), Vec::new(), 0);
    for at in 0..size / 16 {
        let is_rdtsc = number(entry(at), 8) == Kind::Rdtsc as u64;
        if is_rdtsc && forget(rdtscs) {
            forgotten.push(number(entry(at), 0));
        } else {
            kept.extend_from_slice(entry(at));
        }
        rdtscs += usize::from(is_rdtsc);
    }
    // The size in the section's header (System V ABI, `Elf64_Shdr`).
    let headers = usize::try_from(u64::from_le_bytes(bytes[40..48].try_into().unwrap())).unwrap();
    let header = headers + elf.section_by_name(".trap_sites").unwrap().index().0 * 64;
    let length = kept.len() as u64;
    bytes[offset..offset + kept.len()].copy_from_slice(&kept);
    bytes[header + 32..header + 40].copy_from_slice(&length.to_le_bytes());
    fs::write(lab.path(name), bytes).unwrap();
    forgotten
}

// A single RDTSC that the table forgot put 6,496 s into a record, and the run had 0 lost, clock fine.
#[test]
fn an_rdtsc_that_the_table_forgets_is_named_and_its_record_fails_the_run() {
    require_kvm!();
    let lab = Lab::new();
    let flags = "--time virtual --tsc-khz 2600000 --cmdline count=20";
    let mut caught = 0;
    for number in 0..100 {
        let Some(address) = forgetful_guest(&lab, "forgetful", |at| at == number).pop() else { break };
        let ended = lab.run(&format!("--guest forgetful {flags} --timeout 20s --summary s.json"));
        let warnings: Vec<&str> = ended.stderr.lines().filter(|line| line.contains("trap-site table")).collect();
        let [warning] = warnings[..] else { panic!("{ended:#?}") };
        assert!(warning.ends_with(&format!("RDTSC at {address:#x}")), "{warning}");
        // It may be one that no tick meets.
        let errors = json(&lab.path("s.json"))["ticks"]["clock_errors"].as_u64().unwrap_or(0);
        assert!(errors == 0 || ended.code() == 1, "{ended:#?}");
        caught += u64::from(errors != 0);
    }
    assert!(caught > 0, "no RDTSC of a tick was among them");
    // With the host's TSC there is nothing to be wrong; restored where the VMM answers, there is.
    let all = forgetful_guest(&lab, "forgetful", |at| at % 2 == 1);
    let host = "--guest forgetful --tsc host --cmdline count=10 --save-at 35ms --save-to snapshot";
    let saved = lab.run(host).expect(0);
    assert!(!saved.stderr.contains("trap-site table"), "{saved:#?}");
    let restored = lab.run("restore snapshot --tsc trapped --timeout 5s");
    let named = all.iter().take(16).all(|address| restored.stderr.contains(&format!("RDTSC at {address:#x}")));
    assert!(named && restored.stderr.matches("trap-site table").count() == 1, "{restored:#?}");
}

// Catches: a warning that every user of the embedded guest sees for nothing.
#[test]
fn a_table_that_is_whole_is_not_warned_about() {
    require_kvm!();
    let lab = Lab::new();
    let run = lab.boot("count=3", "--time virtual");
    assert!(!run.ended.stderr.contains("trap-site table"), "{run:#?}");
}

/// A ring as a guest leaves it, whose records stand `stride` bytes from each other: of each tick, number and expiry.
fn ring(magic: u64, layout: u32, stride: usize, ticks: &[(u64, u64)]) -> Vec<u8> {
    let mut bytes = vec![0; HEADER_BYTES];
    bytes[..8].copy_from_slice(&magic.to_le_bytes());
    bytes[8..12].copy_from_slice(&layout.to_le_bytes());
    bytes[12..16].copy_from_slice(&CAPACITY.to_le_bytes());
    bytes[16..24].copy_from_slice(&(ticks.len() as u64).to_le_bytes());
    for (at, (seq, expires_ns)) in ticks.iter().enumerate() {
        bytes.resize(HEADER_BYTES + at * stride, 0);
        bytes.truncate(HEADER_BYTES + at * stride);
        // Armed at 0, fired at its expiry; with the TSC of another boot, which the host cannot convert.
        bytes.extend([*seq, *expires_ns, 0, *expires_ns, *expires_ns, 0, 0, 2, 0].map(u64::to_le_bytes).concat());
    }
    bytes
}

fn run_with_ring(lab: &Lab, ring: &[u8], flags: &str) -> (Ended, Value) {
    fs::write(lab.path("guest"), pvh_with_ring(&SUCCESS, ring)).unwrap();
    judged(lab, &format!("--guest guest --memory 4M {flags}"))
}

/// Ticks at 1, 2, 3 … ns: before the guest can have ended.
fn ticks(count: u64) -> Vec<(u64, u64)> {
    (0..count).map(|seq| (seq, seq + 1)).collect()
}

// A ring of another layout had 0 ticks, 0 lost and no word.
#[test]
fn a_ring_of_another_layout_or_magic_is_named_and_judges_nothing() {
    require_kvm!();
    let lab = Lab::new();
    let (ended, summary) = run_with_ring(&lab, &ring(MAGIC, LAYOUT, RECORD_BYTES, &ticks(50)), "");
    assert_eq!((ended.code(), &summary["judged"], &summary["ticks"]["ticks"]), (0, &true.into(), &50.into()));
    let others = [
        (
            ring(MAGIC, LAYOUT + 1, RECORD_BYTES, &ticks(50)),
            "it has layout 3 and 1024 records; this vmm reads layout 2",
        ),
        (ring(MAGIC, 1, RECORD_BYTES, &ticks(50)), "it has layout 1"),
        (ring(MAGIC.swap_bytes(), LAYOUT, RECORD_BYTES, &ticks(50)), "\"TICKRING\""),
    ];
    for (other, warning) in others {
        let (ended, summary) = run_with_ring(&lab, &other, "");
        let count =
            ended.stderr.lines().filter(|line| line.starts_with("vmm: warn: ") && line.contains(warning)).count();
        assert_eq!((ended.code(), count), (0, 1), "{ended:#?}");
        assert!(last_lines(&ended).0.starts_with("vmm: ticks not judged: "), "{ended:#?}");
        assert_eq!((&summary["judged"], &summary["lost"]), (&false.into(), &Value::Null));
        let ticks = summary["ticks"].as_object().unwrap();
        assert!(ticks.len() > 10 && ticks.values().all(Value::is_null), "{summary:#}");
        assert_eq!(summary["verdict"]["checks"]["lost"], "not-judged");
        // A check that was requested and cannot be made is a message.
        let (ended, _) = run_with_ring(&lab, &other, "--fail-on lost");
        assert_eq!(ended.code(), 1, "{ended:#?}");
    }
}

// Records at another distance had "314134022 lost" and exit code 0.
#[test]
fn records_at_another_distance_are_reported() {
    require_kvm!();
    let lab = Lab::new();
    for stride in [64, 76, 80, 128] {
        let (ended, summary) = run_with_ring(&lab, &ring(MAGIC, LAYOUT, stride, &ticks(50)), "");
        assert_eq!((ended.code(), &summary["lost"]), (1, &0.into()), "{stride}: {ended:#?}");
        let count =
            ended.stderr.lines().filter(|line| line.contains("records are 72 bytes from one to the next")).count();
        assert_eq!(count, 1, "{stride}: {ended:#?}");
        assert!(summary["ticks"]["malformed"].as_u64().unwrap() >= 48, "{stride}: {summary:#}");
        assert_eq!(summary["verdict"]["checks"]["accounts"], "fail");
    }
    // A gap in the numbers is no such thing: those ticks are lost.
    let gap: Vec<_> = ticks(50).into_iter().filter(|(seq, _)| *seq != 7).collect();
    let (_, summary) = run_with_ring(&lab, &ring(MAGIC, LAYOUT, RECORD_BYTES, &gap), "");
    assert_eq!((&summary["lost"], &summary["ticks"]["malformed"]), (&1.into(), &0.into()));
}

// Catches: an instant that lies after the end of the run taken as it stands.
#[test]
fn a_tick_that_has_not_come_yet_fails_the_run() {
    require_kvm!();
    let lab = Lab::new();
    let mut late = ticks(50);
    late[30].1 = 6_496_000_000_000;
    let (ended, summary) = run_with_ring(&lab, &ring(MAGIC, LAYOUT, RECORD_BYTES, &late), "");
    assert_eq!((ended.code(), &summary["ticks"]["clock_errors"]), (1, &1.into()), "{ended:#?}");
    assert!(summary["ticks"]["worst_clock_error_ns"].as_i64().unwrap() > 6_000_000_000_000, "{summary:#}");
}

/// The guest with its tick ring's section under a name that the VMM does not look for.
fn guest_without_ring(lab: &Lab) {
    let mut bytes = fs::read(guest()).unwrap();
    let names = bytes.windows(11).position(|name| name == b".tick_ring\0").unwrap();
    bytes[names..names + 10].copy_from_slice(b".no_record");
    fs::write(lab.path("ringless"), bytes).unwrap();
}

// A guest without a ring had a summary of zeros, which reads as perfect.
#[test]
fn without_a_ring_the_timer_interrupts_are_judged_and_nothing_else() {
    require_kvm!();
    let lab = Lab::new();
    guest_without_ring(&lab);
    let run = "--guest ringless --time virtual --tsc-khz 2600000 --cmdline clockevent=lapic-deadline";
    let (ended, summary) = judged(&lab, run);
    assert!(
        last_lines(&ended).0.starts_with("vmm: ticks not judged: the guest has no tick ring; 100 timer interrupts")
    );
    assert_eq!((&summary["judged"], &summary["ticks"]["ticks"]), (&false.into(), &Value::Null));
    assert_eq!((&summary["timer"]["interrupts"], &summary["timer"]["early"]), (&100.into(), &0.into()));
    assert!(summary["timer"]["late"]["worst_ns"].as_u64().unwrap() < 3_000, "{summary:#}");
    judged(&lab, &format!("{run} --fail-on late=3us,early")).0.expect(0);
    let (ended, _) = judged(&lab, &format!("{run} --fail-on late=3us,lost"));
    assert_eq!(last_lines(&ended).0, "vmm: lost cannot be judged: the guest has no tick ring", "{ended:#?}");
    // With KVM's LAPIC there is nothing at all.
    let (_, summary) = judged(&lab, "--guest ringless --lapic kvm --cmdline count=5");
    assert_eq!((&summary["judged"], &summary["timer"]), (&false.into(), &Value::Null));
}

// A restore at another frequency said "migrations 0".
#[test]
fn migrations_are_those_that_the_vm_lived_through() {
    require_kvm!();
    let lab = Lab::new();
    let saving = "--time virtual --tsc-khz 2600000 --migrate-every 20ms --save-at 50ms --save-to a";
    let counts = |summary: &vm_tests::Summary| [summary.count("migrations"), summary.count("migrations_here")];
    assert_eq!(counts(&lab.boot("count=20", saving).summary), [2, 2]);
    let again = lab.restore("a", "--tsc-khz 1300000 --save-at 100ms --save-to b");
    assert_eq!(counts(&again.summary), [3, 0]);
    assert!(again.ended.stderr.contains("; migrations 3;"), "{again:#?}");
    let last = lab.restore("b", "--migrate-every 50ms --tsc-khz-cycle 2600000");
    assert_eq!(last.summary.count("migrations"), 4 + last.summary.count("migrations_here"));
    assert_eq!(last.summary.count("ticks/guest_stopped_seen"), last.summary.count("migrations"));
}
