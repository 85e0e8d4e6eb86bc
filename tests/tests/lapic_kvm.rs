//! `--lapic kvm`: the same guest on KVM's LAPIC and kvmclock, compared with ours and with QEMU's use of them.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    process::Command,
    thread,
    time::Duration,
};

use guest_abi::report::{CAPACITY, HEADER_BYTES, Header, LAYOUT, MAGIC, RECORD_BYTES, Record};
use object::{LittleEndian, Object, ObjectSection, read::elf::ElfFile64};
use vm_tests::{DOORS, Lab, Line, Run, doctor, finish, guest, qemu, require_kvm, skip_part};

/// The clockevents that need nothing but KVM. The nanosecond deadline is ours.
const CLOCKEVENTS: [&str; 5] = [
    "clockevent=lapic-deadline",
    "clockevent=kvm-tsc-deadline conversion=split",
    "clockevent=kvm-tsc-deadline conversion=mult",
    "clockevent=kvm-tsc-deadline conversion=exact",
    "clockevent=lapic-oneshot",
];

// Catches: an interrupt lost or early on the way through KVM, through either door.
#[test]
fn every_clockevent_ticks() {
    require_kvm!();
    let lab = Lab::new();
    for clockevent in CLOCKEVENTS {
        for (door, name) in DOORS.iter().zip(["x2apic", "xapic"]) {
            let run = lab.boot(&format!("{clockevent} hz=100 count=20"), &format!("--lapic kvm {door}"));
            run.in_order(20);
            assert_eq!(run.summary.count("ticks/early_wakes"), 0, "{run:#?}");
            assert!(run.ended.stdout.contains(&format!("guest: {name}, ")), "{door} did not decide the door: {run:#?}");
            // The host converts the same TSC with the page that KVM wrote: the two may differ by their roundings.
            let [by_guest, by_host] =
                ["guest", "host"].map(|who| run.summary.count(&format!("ticks/late_by_{who}/worst_ns")));
            assert!(by_guest.abs_diff(by_host) <= 1000, "{run:#?}");
        }
    }
    let refused = finish(&mut lab.guest("clockevent=kvm-ns-deadline", "--lapic kvm"));
    assert!(refused.stdout.contains("clockevent=kvm-ns-deadline cannot be used"), "{refused:#?}");
}

/// What each wait was to be: from the moment at which the tick before was handled to the expiry.
fn waits(ticks: impl Iterator<Item = (u64, u64)>) -> Vec<u64> {
    let ticks: Vec<_> = ticks.collect();
    ticks.windows(2).map(|pair| pair[1].0.wrapping_sub(pair[0].1)).collect()
}

fn waits_of(run: &Run) -> Vec<u64> {
    waits(run.trace().all("tick").map(|tick| (tick.field("expires_ns"), tick.field("fired_ns"))))
}

/// The ring of the guest's only CPU, in its RAM.
fn ring(ram: &[u8]) -> Vec<Record> {
    let mut headers = ram.chunks_exact(64).enumerate().filter_map(|(number, _)| {
        let bytes = ram.get(number * 64..)?.first_chunk::<HEADER_BYTES>()?;
        let header = Header::from_bytes(bytes);
        // The magic number is also in the guest's code.
        (header.magic == MAGIC && header.layout == LAYOUT && header.capacity == CAPACITY)
            .then_some((number * 64 + HEADER_BYTES, header))
    });
    let (at, header) = headers.next().expect("a tick ring");
    let count = usize::try_from(header.written).expect("a count");
    assert_eq!(header.clock_steps_back, 0);
    let record = |n| Record::from_bytes(ram[at + n * RECORD_BYTES..].first_chunk().expect("in RAM"));
    (0..count).map(record).collect()
}

/// The ticks that QEMU's guest made, from its RAM.
fn under_qemu(mut qemu: Command, lab: &Lab, cmdline: &str) -> Vec<Record> {
    const BYTES: usize = 128 << 20;
    let ram = lab.path("ram");
    File::create(&ram).unwrap().set_len(BYTES as u64).unwrap();
    qemu.args("-M microvm,memory-backend=ram -cpu qemu64,+tsc-deadline -m 128M -accel kvm -nodefaults".split(' '));
    qemu.args("-no-reboot -serial stdio -display none -device isa-debug-exit,iobase=0xf4,iosize=0x4".split(' '));
    qemu.args(["-object", &format!("memory-backend-file,id=ram,size=128M,share=on,mem-path={}", ram.display())]);
    let ended = finish(qemu.arg("-kernel").arg(guest()).args(["-append", cmdline]));
    // QEMU's own status is (code << 1) | 1, and the guest's code for a good end is 0.
    assert_eq!(ended.code(), 1, "{ended:#?}");
    let mut bytes = vec![0; BYTES];
    File::open(&ram).unwrap().read_exact_at(&mut bytes, 0).unwrap();
    ring(&bytes)
}

// Catches: a LAPIC or a clock of ours on which the guest computes, arms or gets something else than on KVM's.
#[test]
fn our_lapic_kvms_and_qemu_agree() {
    require_kvm!();
    let lab = Lab::new();
    const COUNT: u64 = 60;
    if let Err(reason) = qemu() {
        skip_part!("{reason}");
    }
    for clockevent in CLOCKEVENTS {
        let cmdline = format!("{clockevent} scenario=deltas seed=7 max_ms=20 count={COUNT}");
        let [ours, kvms] = ["user", "kvm"].map(|lapic| {
            let run = lab.boot_traced(&cmdline, &format!("--lapic {lapic}"));
            run.in_order(COUNT);
            run
        });
        let expected = waits_of(&ours);
        assert_eq!(expected.len() as u64, COUNT - 1);
        assert_eq!(waits_of(&kvms), expected, "{clockevent}");
        // Rounded conversions may be early by nanoseconds, which no handler is fast enough to see.
        assert_eq!(kvms.summary.count("ticks/early_wakes"), 0, "{kvms:#?}");
        if let Ok(qemu) = qemu() {
            let records = under_qemu(qemu, &lab, &cmdline);
            assert!(records.iter().all(|record| record.early_wakes == 0 && record.fired_ns >= record.expires_ns));
            let ticks = records.iter().map(|record| (record.expires_ns, record.fired_ns));
            assert_eq!(waits(ticks), expected, "{clockevent}");
        }
    }
}

/// How far VM time went from save to restore beyond the downtime, in nanoseconds, by the two pages.
fn beyond_downtime(save: &Line, restore: &Line) -> i128 {
    restore.page().ns(restore.tsc()) - save.page().ns(save.tsc()) - i128::from(restore.field("downtime_ns"))
}

// Catches: a timer or a message lost in one of many restores, VM time that goes on while the VM is down, or back.
#[test]
fn many_migrations_in_process() {
    require_kvm!();
    // On a slow host with one CPU, four vCPUs get nowhere in a few milliseconds: it would migrate for ever.
    for (cmdline, cpus, downtime, every) in [
        ("clockevent=kvm-tsc-deadline", 1, "freeze", "17ms"),
        ("clockevent=kvm-tsc-deadline", 1, "catch-up", "17ms"),
        ("clockevent=lapic-oneshot", 1, "freeze", "17ms"),
        ("scenario=smp", 4, "freeze", "47ms"),
    ] {
        let lab = Lab::new();
        let flags = format!("--lapic kvm --cpus {cpus} --migrate-every {every} --downtime {downtime} --timeout 100s");
        let run = lab.boot_traced(&format!("{cmdline} hz=100 count=60"), &flags);
        run.in_order(60 * cpus);
        let of_cpu_0 = |event| run.trace().all(event).filter(|line| line.field("cpu") == 0);
        let pairs: Vec<_> = of_cpu_0("save").zip(of_cpu_0("restore")).collect();
        // On a busy host each takes so long that under catch-up the guest's 600 ms are over after some.
        assert!(pairs.len() >= 3, "{cmdline} {downtime}: {} migrations", pairs.len());
        let mut steps: Vec<_> = pairs.iter().map(|(save, restore)| beyond_downtime(save, restore)).collect();
        assert!(steps.iter().all(|step| *step >= 0), "VM time went back: {steps:?}");
        // KVM's clock goes on from the moment at which it is set; reading it is the next call. A busy host may come
        // between the two now and then, not always: the migration itself takes some 10 ms.
        steps.sort_unstable();
        assert!(steps[steps.len() / 2] < 1_000_000, "VM time went on while the VM was down: {steps:?}");
        let catches_up = pairs.iter().all(|(_, restore)| restore.field("downtime_ns") > 0);
        assert_eq!(catches_up, downtime == "catch-up");
        let versions: Vec<_> = of_cpu_0("save").map(|save| save.field("page_version")).collect();
        assert!(versions.iter().all(|v| v % 2 == 0) && versions.is_sorted(), "{versions:?}");
        assert!(run.summary.count("ticks/guest_stopped_seen") > 0, "{run:#?}");
        // A one-shot count that was over when the VM was saved is counted down once more: KVM has no way to ask whether
        // it has delivered the interrupt.
        if cmdline != "clockevent=lapic-oneshot" {
            assert_eq!(run.summary.count("ticks/early_wakes"), 0, "{run:#?}");
        }
    }
}

// Catches: what a fresh process does not get back, and policies that do not do what they say.
#[test]
fn a_restore_in_another_process() {
    require_kvm!();
    let lab = Lab::new();
    const DOWN: Duration = Duration::from_millis(300);
    let cmdline = "clockevent=kvm-tsc-deadline hz=10 count=12";
    let before = lab.boot_traced(cmdline, "--lapic kvm --save-at 550ms --save-to s");
    let save = before.trace().only("save");
    thread::sleep(DOWN);
    for (deadline, downtime) in
        [("rescale", "freeze"), ("rescale", "catch-up"), ("keep", "freeze"), ("keep", "catch-up"), ("fire", "freeze")]
    {
        let run = lab.restore("s", &format!("--deadline {deadline} --downtime {downtime}"));
        run.in_order(12 - before.summary.count("ticks/ticks"));
        let restore = run.trace().only("restore");
        let down = restore.field("downtime_ns");
        assert_eq!(downtime == "catch-up", down >= 300_000_000, "{down} ns");
        let step = beyond_downtime(save, restore);
        assert!((0..300_000_000).contains(&step), "{step} ns beyond the downtime");
        let (old, new) = (save.armed_tsc(), restore.armed_tsc());
        let early = run.summary.count("ticks/early_wakes");
        match deadline {
            "keep" => assert_eq!(old, new),
            "fire" => assert_eq!((new, early), (restore.tsc(), 1)),
            _ if downtime == "catch-up" => assert_eq!((new, early), (restore.tsc(), 0), "it is due: {run:#?}"),
            _ => {
                // At its old VM time by the page that we take KVM's to be, and some roundings later.
                let moved = restore.page().ns(new) - save.page().ns(old);
                assert!((0..=8).contains(&moved), "the deadline moved by {moved} ns");
                assert_eq!(early, 0);
            }
        }
        assert_eq!(run.summary.count("ticks/guest_stopped_seen"), 1);
    }
}

// Catches: a guest that is run at a frequency that it does not get, and a refusal without its reason.
#[test]
fn what_cannot_be_done_is_refused() {
    require_kvm!();
    let lab = Lab::new();
    let doctor = doctor();
    let scales = doctor["tsc_scaling"].as_array().unwrap().iter().any(|scaling| scaling["works"] == true);
    let khz = doctor["host_tsc_khz"].as_u64().unwrap() / 2;
    let boot = |flags: &str| finish(&mut lab.guest("count=1", &format!("--lapic kvm {flags}")));
    let _ = lab.boot("count=50", "--lapic kvm --save-at 100ms --save-to s");
    if scales {
        skip_part!("this host scales TSCs, so that another frequency is not refused");
    } else {
        let reason = [&format!("cannot have a TSC of {khz} kHz here"), "does not scale it (probed)", "--lapic user"];
        boot(&format!("--tsc-khz {khz}")).refused(3, &reason);
        lab.run(&format!("restore s --tsc-khz {khz}")).refused(3, &reason);
        boot(&format!("--migrate-every 10ms --tsc-khz-cycle {khz}")).refused(3, &reason);
    }
    for flags in ["--time virtual", "--tsc trapped"] {
        boot(flags).refused(2, &[flags, "HLT does not exit", "--lapic user"]);
        lab.run(&format!("restore s {flags}")).refused(2, &[flags, "HLT does not exit", "--lapic user"]);
    }
    boot("--emulate-host swallow-deadline").refused(2, &["--emulate-host", "--lapic user"]);
    lab.run("restore s --lapic user").refused(2, &["--lapic"]);
}

// Catches: a VM that hangs, because KVM does not report a halt that no interrupt can end.
#[test]
fn a_halt_without_end_is_reported() {
    require_kvm!();
    let lab = Lab::new();
    let mut bytes = fs::read(guest()).unwrap();
    let elf = ElfFile64::<LittleEndian>::parse(bytes.as_slice()).unwrap();
    let (at, _) = elf.section_by_name(".boot32").unwrap().file_range().unwrap();
    let at = usize::try_from(at).unwrap();
    // CLI; HLT; JMP to the HLT.
    bytes[at..at + 4].copy_from_slice(&[0xfa, 0xf4, 0xeb, 0xfd]);
    fs::write(lab.path("halts"), bytes).unwrap();
    lab.run("--guest halts --lapic kvm").refused(1, &["halted at", "nothing can wake it"]);
}
