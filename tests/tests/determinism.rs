//! Virtual time: the same inputs give the same trace, and long sleeps take no time.

use std::fs;

use vm_tests::{
    CLOCKEVENTS, DOORS, Lab, Run, finish,
    kernel::{self, Kernel, count, expect, store, word},
    require_kvm,
};

const MIGRATING: &str =
    "--time virtual --migrate-every 37ms --tsc-khz-cycle 1300000,3900000 --downtime catch-up --downtime-length 3ms";

#[track_caller]
fn same(first: &Run, second: &Run) {
    let lines = |run: &Run| run.trace().bytes.split(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect::<Vec<_>>();
    let (first, second) = (lines(first), lines(second));
    let differs = first.iter().zip(&second).position(|(a, b)| a != b);
    if let Some(at) = differs {
        let [a, b] = [&first, &second].map(|lines| String::from_utf8_lossy(&lines[at]).into_owned());
        panic!("line {} differs:\n{a}\n{b}", at + 1);
    }
    assert_eq!(first.len(), second.len(), "one trace is the other's beginning");
}

// Catches: anything of the host (a time, an address, an order, an exit that costs) that leaks into virtual time.
#[test]
fn two_runs_write_the_same_trace() {
    require_kvm!();
    for clockevent in CLOCKEVENTS {
        for door in DOORS {
            let lab = Lab::new();
            let flags = format!("{MIGRATING} --tsc-khz 2600000 {door}");
            let [first, second] = [(); 2].map(|()| lab.boot_traced(&format!("{clockevent} hz=250 count=40"), &flags));
            assert!(first.trace().all("inject").count() >= 40 && first.trace().all("restore").count() >= 2);
            same(&first, &second);
        }
    }
}

// Catches: the same leaks over a snapshot file, a process's end and a restore.
#[test]
fn two_restores_write_the_same_trace() {
    require_kvm!();
    let runs = [(); 2].map(|()| {
        let lab = Lab::new();
        let save = "--time virtual --tsc-khz 2600000 --save-at 99ms --save-to snapshot";
        let saved = lab.boot_traced("clockevent=kvm-tsc-deadline conversion=mult hz=250 count=60", save);
        (saved, lab.restore("snapshot", "--tsc-khz 700000"))
    });
    let [(first_saved, first_restored), (second_saved, second_restored)] = &runs;
    same(first_saved, second_saved);
    same(first_restored, second_restored);
}

// Catches: a comparison that would pass whatever is written: another input must give another trace.
#[test]
fn another_seed_writes_another_trace() {
    require_kvm!();
    let lab = Lab::new();
    let trace =
        |seed| lab.boot_traced(&format!("scenario=deltas count=40 seed={seed}"), "--time virtual").trace.unwrap().bytes;
    let [seven, eight] = [7, 8].map(trace);
    assert!(seven != eight);
}

// Catches: a sleep past the posted conversion's cap of 275 s that is lost, cut short, or waited for in real time (which
// the hang guard ends).
#[test]
fn sleeps_beyond_275_s_end() {
    require_kvm!();
    for clockevent in CLOCKEVENTS {
        let lab = Lab::new();
        let cmdline = format!("{clockevent} scenario=deltas count=40 seed=11");
        let [first, second] = [(); 2].map(|()| lab.boot_traced(&cmdline, "--time virtual --tsc-khz 2600000"));
        first.in_order(40);
        assert!(first.summary.count("vm_ns") > 275_000_000_000, "{clockevent}: {first:#?}");
        same(&first, &second);
    }
}

// Catches: a page that is never renewed. As posted, `split` measures its cap of 275 s from the page's base: with an
// older page every wait ends at once, and the guest is woken for ever.
#[test]
fn split_still_waits_after_275_s() {
    require_kvm!();
    let cmdline = "clockevent=kvm-tsc-deadline conversion=split hz=1 count=400";
    let run = Lab::new().boot_traced(cmdline, "--time virtual --tsc-khz 2600000");
    run.in_order(400);
    assert_eq!(run.summary.count("ticks/early_wakes"), 0, "{run:#?}");
    assert!(run.trace().all("renew").count() >= 3);
}

// Catches: a migration in a long sleep that forgets the upper bits of what is left.
#[test]
fn migrations_within_a_long_sleep() {
    require_kvm!();
    let lab = Lab::new();
    let flags = "--time virtual --tsc-khz 2600000 --migrate-every 40s --tsc-khz-cycle 300000,2600000,20000000,2600000";
    let run = lab.boot_traced("clockevent=kvm-tsc-deadline scenario=deltas count=16 seed=5", flags);
    run.in_order(16);
    assert!(run.trace().all("restore").count() >= 6, "{run:#?}");
    // Virtual time: some operations, and one nanosecond for each page's rounding.
    assert!(run.summary.count("timer/late/worst_ns") < 20_000, "{run:#?}");
    // Some waits are over before they begin, by up to a second, and no tick can come before it is armed.
    let [late, armed] =
        ["ticks/late_by_guest/worst_ns", "ticks/worst_armed_late_ns"].map(|name| run.summary.count(name));
    assert!(late.abs_diff(armed) < 20_000, "{run:#?}");
}

// Catches: a limit in host time that cannot be changed, for a host on which even a guest that does not spin is slow.
#[test]
fn a_guest_may_spin_up_to_the_spin_limit() {
    require_kvm!();
    let lab = Lab::new();
    let spins = |flags: &str| finish(&mut lab.guest("load=kernel count=5", &format!("--time virtual {flags}")));
    spins("--spin-limit 100ms").refused(1, &["ran 100ms near 0x", "--time real", "longer --spin-limit"]);
    spins("--spin-limit off --timeout 300ms").refused(1, &["has not ended after 300ms"]);
    // Before its first tick, from which on it spins.
    let _ = spins("--save-at 10us --save-to saved").expect(0);
    lab.run("restore saved --spin-limit 50ms").refused(1, &["ran 50ms near 0x"]);
    lab.run("restore saved --spin-limit never").refused(2, &["--spin-limit"]);
    lab.run("--spin-limit 1s").refused(2, &["--spin-limit is for running a guest"]);
}

// Catches: an instruction that a host runs together with the one before it when the VMM steps, as kvm_pvm 6.18 runs
// what follows a fence: the trap site there is then not performed, and its HLT is taken for the guest's. While an
// interrupt waits behind a clear IF in virtual time, the VMM steps.
#[test]
fn a_site_behind_a_fence_is_performed_while_an_interrupt_waits() {
    require_kvm!();
    const VECTOR: u8 = 0x40;
    let lab = Lab::new();
    let difference =
        [&[0xa1][..], &word(1).to_le_bytes(), &[0x2b, 0x05], &word(0).to_le_bytes(), &[0xa3], &word(2).to_le_bytes()];
    let kernel = Kernel::new(&[
        store(kernel::ICR, 0x4_4000 | u32::from(VECTOR)),
        kernel::read_tsc(word(0)),
        kernel::read_tsc(word(1)),
        difference.concat(),
        // One operation: a listed PAUSE is none with one vCPU.
        expect(word(2), 2600),
        expect(count(VECTOR), 0),
        kernel::STI.to_vec(),
        kernel::PASS.to_vec(),
        expect(count(VECTOR), 1),
    ])
    .counting_apic(VECTOR);
    fs::write(lab.path("image"), kernel.image()).unwrap();
    lab.run("--guest image --time virtual --tsc-khz 2600000 --x2apic off --timeout 60s").expect(0);
}
