//! A guest that only ticks: every clockevent, xAPIC and x2APIC, real and virtual time.

use vm_tests::{CLOCKEVENTS, DOORS, Lab, finish, require_kvm};

// Catches: a tick that is lost or misplaced in the simplest run.
#[test]
fn a_thousand_ticks_in_real_time() {
    require_kvm!();
    let run = Lab::new().boot("clockevent=kvm-tsc-deadline conversion=mult hz=250 count=1000", "");
    run.in_order(1000);
    assert!(run.ended.stdout.contains("guest: 1000 ticks, "), "{run:#?}");
}

// Catches: a guest that is busy between ticks and loses one, does not come back from user mode, or never ends.
#[test]
fn a_busy_guest_ticks() {
    require_kvm!();
    let lab = Lab::new();
    for load in ["load=kernel", "load=user", "touch=16", "load=user touch=16"] {
        for flags in ["", "--tsc trapped --migrate-every 20ms", "--lapic kvm"] {
            lab.boot(&format!("{load} hz=100 count=20"), flags).in_order(20);
        }
    }
}

// Catches: pages to touch where the machine has no RAM, and touching that costs a tick time.
#[test]
fn touched_pages_are_ram_and_cost_no_virtual_time() {
    require_kvm!();
    let lab = Lab::new();
    let plain = lab.boot("hz=100 count=20", "--time virtual");
    let touching = lab.boot("hz=100 count=20 touch=64", "--time virtual");
    for path in ["vm_ns", "ticks/late_by_guest/worst_ns"] {
        assert_eq!(plain.summary.count(path), touching.summary.count(path), "{path}");
    }
    let ended = finish(&mut lab.guest("touch=4096", "--memory 8M")).expect(1);
    assert!(ended.stdout.contains("touch=4096 needs 16384 KiB of RAM after the kernel"), "{ended:#?}");
}

// Catches: an interrupt whose end exits although nothing waits for it, and a switch that does nothing.
#[test]
fn interrupts_end_without_an_exit() {
    require_kvm!();
    let lab = Lab::new();
    // In virtual time the counts are exact: RDTSC, the arming, the halt; and the EOI if it is written.
    for (more, flags, each) in [("", "", 3), ("eoi=apic", "", 4), ("", "--pv-eoi off", 4)] {
        for door in DOORS {
            // How late the worst tick was follows from the frequency, and with it how many digits the guest prints.
            let flags = format!("--time virtual --tsc-khz 2600000 {flags} {door}");
            let exits = |count: u64| {
                let run = lab.boot(&format!("clockevent=kvm-ns-deadline {more} count={count}"), &flags);
                run.in_order(count);
                run.summary.count("costs/exits")
            };
            let (few, many) = (exits(100), exits(300));
            // The guest prints how many ticks there were: the two have as many digits.
            assert_eq!(many - few, 200 * each, "{more} {flags}");
        }
    }
}

fn every_clockevent(flags: &str, count: u64) {
    let lab = Lab::new();
    for clockevent in CLOCKEVENTS {
        for (door, name) in DOORS.iter().zip(["x2apic", "xapic"]) {
            let run = lab.boot(&format!("{clockevent} hz=100 count={count}"), &format!("{door} {flags}"));
            run.in_order(count);
            assert!(run.ended.stdout.contains(&format!("guest: {name}, ")), "{door} did not decide the door: {run:#?}");
            let chosen = clockevent.split([' ', '=']).nth(1).unwrap();
            assert!(run.ended.stdout.contains(&format!("guest: {chosen} ")), "not {chosen}: {run:#?}");
        }
    }
}

// Catches: a timer mode, a conversion or a door that loses or hastens interrupts when time is the host's.
#[test]
fn every_clockevent_ticks_in_real_time() {
    require_kvm!();
    every_clockevent("--time real", 20);
}

// Catches: the same when halts jump to the next deadline.
#[test]
fn every_clockevent_ticks_in_virtual_time() {
    require_kvm!();
    every_clockevent("--time virtual", 100);
}

// Catches: the same when RDTSC and the deadline's WRMSR are answered at trap sites, at a frequency the host lacks.
#[test]
fn every_clockevent_ticks_at_another_frequency() {
    require_kvm!();
    every_clockevent("--tsc trapped --tsc-khz 1234567", 20);
}

// Catches: `exact` arming a deadline before the expiry, or the others losing the roundings that they are studied for.
#[test]
fn only_rounded_conversions_are_early() {
    require_kvm!();
    let lab = Lab::new();
    for khz in [260_000, 1_500_000, 2_600_000, 25_000_000] {
        // By the page, which is the clock of both; the guest itself reads its clock an operation later.
        let early = |clockevent: &str| {
            let flags = format!("--time virtual --tsc-khz {khz}");
            let run = lab.boot_traced(&format!("{clockevent} hz=1000 count=200"), &flags);
            run.in_order(200);
            let (injected, ticks): (Vec<_>, Vec<_>) =
                (run.trace().all("inject").collect(), run.trace().all("tick").collect());
            assert_eq!([injected.len(), ticks.len()], [200; 2], "{run:#?}");
            injected.iter().zip(ticks).filter(|(inject, tick)| inject.vm_ns() < tick.field("expires_ns")).count()
        };
        assert_eq!(early("clockevent=kvm-ns-deadline"), 0);
        assert_eq!(early("clockevent=kvm-tsc-deadline conversion=exact"), 0);
        if khz == 2_600_000 {
            let rounded = ["split", "mult"].map(|c| early(&format!("clockevent=kvm-tsc-deadline conversion={c}")));
            assert!(rounded.iter().all(|early| *early > 150), "as posted and as reviewed round down: {rounded:?}");
        }
    }
}

// Catches: a guest that quietly takes another timer, or default, than the one that it was asked to test.
#[test]
fn what_the_guest_cannot_do_is_a_message_and_a_failing_exit() {
    require_kvm!();
    let lab = Lab::new();
    for (cmdline, message) in [
        ("clockevent=hpet", "clockevent=hpet is unknown; there are kvm-ns-deadline kvm-tsc-deadline"),
        ("clockevent=", "clockevent= is unknown"),
        ("hz=0", "hz=0 is not a number from 1 to 10000"),
        ("conversion=floor", "conversion=floor is not split, mult or exact"),
        ("nonsense", "nonsense is unknown"),
    ] {
        let ended = finish(&mut lab.guest(cmdline, ""));
        ended.refused(1, &["the guest failed with code 2"]);
        assert!(
            ended.stdout.contains(&format!("guest: error: {message}")) || ended.stdout.contains(message),
            "{ended:#?}"
        );
    }
}

// Catches: a debug-exit status that scripts written for QEMU would misread.
#[test]
fn the_raw_status_is_qemus() {
    require_kvm!();
    let lab = Lab::new();
    let status = |cmdline, flags| finish(&mut lab.guest(cmdline, flags)).code();
    assert_eq!(status("count=1", "--time virtual --debug-exit-status raw"), 1);
    assert_eq!(status("hz=0", "--time virtual --debug-exit-status raw"), (2 << 1) | 1);
    assert_eq!(status("count=1", "--time virtual --debug-exit-status map"), 0);
}
