//! The guest's time of day: the wall clock that it asked for at boot and its kvmclock, after a stop; a PC's real-time
//! clock.

use std::{fs, thread, time::Duration};

use guest_abi::sites::Kind;
use vm_tests::{Lab, Summary, raw, require, require_kvm, true_tsc_frequency};

/// How long the VM is saved.
const SAVED: Duration = Duration::from_millis(300);
/// By how much a right time of day may be off: wall clock and TSC are read together to within microseconds, but NTP may
/// slew the wall clock, and the TSC's frequency is known to some ppm. What is to be found is 300 ms.
const RIGHT_NS: u64 = 50_000_000;

fn error_ns(summary: &Summary) -> i64 {
    summary.value("wall_error_ns").as_i64().expect("a number")
}

// Catches: a guest whose time of day is behind by the time that it was saved, and nobody says so; one that catches up
// and is said to be behind.
#[test]
fn under_freeze_it_is_behind_by_the_downtime_and_under_catch_up_right() {
    require_kvm!();
    require!(true_tsc_frequency());
    let lab = Lab::new();
    lab.boot("hz=100 count=40", "--save-at 100ms --save-to snap");
    thread::sleep(SAVED);
    let frozen = lab.restore("snap", "--downtime freeze");
    let behind = error_ns(&frozen.summary).saturating_neg();
    assert!(behind >= i64::try_from(SAVED.as_nanos()).unwrap(), "{behind} ns behind");
    let caught_up = lab.restore("snap", "--downtime catch-up");
    assert!(error_ns(&caught_up.summary).unsigned_abs() <= RIGHT_NS, "{:#?}", caught_up.summary);
    let judged = |flags: &str| lab.run(&format!("restore snap --fail-on wall=200ms {flags}"));
    let failed = judged("--downtime freeze").expect(1);
    assert!(failed.stderr.contains("the guest's time of day is "), "{failed:#?}");
    assert!(failed.stderr.contains(" behind the host's, the limit is 200ms"), "{failed:#?}");
    judged("--downtime catch-up").expect(0);
}

// Catches: a verdict about a time of day that there is none of.
#[test]
fn it_is_not_judged_where_nobody_knows_it() {
    require_kvm!();
    let lab = Lab::new();
    for flags in ["--time virtual", "--lapic kvm"] {
        let run = lab.boot("hz=100 count=5", flags);
        assert!(run.summary.value("wall_error_ns").is_null(), "{flags}: {:#?}", run.summary);
    }
    require!(true_tsc_frequency());
    let run = lab.boot("hz=100 count=5", "--time real");
    assert!(error_ns(&run.summary).unsigned_abs() <= RIGHT_NS, "{:#?}", run.summary);
}

/// A guest that selects a register of the real-time clock, waits, reads the register and prints the byte. It has a trap
/// site, which it does not execute, because virtual time needs one.
fn clock_reader(register: u8) -> Vec<u8> {
    let code = [
        // mov al, register; out 0x70, al; mov ecx, 20000; again: in al, 0x80; loop again.
        &[0xb0, register, 0xe6, 0x70, 0xb9, 0x20, 0x4e, 0, 0, 0xe4, 0x80, 0xe2, 0xfc][..],
        // in al, 0x71; mov dx, 0x3f8; out dx, al.
        &[0xe4, 0x71, 0x66, 0xba, 0xf8, 0x03, 0xee],
        &raw::SUCCESS,
    ]
    .concat();
    let site = raw::LOAD + u32::try_from(code.len()).unwrap();
    raw::pvh_with_sites(raw::LOAD, &[&code[..], &[0x0f, 0x31]].concat(), &[(site, Kind::Rdtsc)])
}

// Catches: a real-time clock that shows another time than the VM's, or is not at its ports; a restore that loses which
// register the guest had selected.
#[test]
fn the_real_time_clock_shows_the_vms_wall_clock() {
    const VIRTUAL: &str = "--time virtual --tsc-khz 1000000";
    const CENTURY: u8 = 0x32;
    require_kvm!();
    let lab = Lab::new();
    // In virtual time it is January 2000. The century is "20" in BCD, and in real time, too.
    for (register, flags, shown) in [(CENTURY, VIRTUAL, "\x20"), (8, VIRTUAL, "\x01"), (CENTURY, "--lapic kvm", "\x20")]
    {
        fs::write(lab.path("image"), clock_reader(register)).unwrap();
        assert_eq!(lab.run(&format!("--guest image {flags}")).expect(0).stdout, shown, "{register:#x} {flags}");
    }
    fs::write(lab.path("image"), clock_reader(CENTURY)).unwrap();
    lab.run(&format!("--guest image {VIRTUAL} --save-at 5ms --save-to snap")).expect(0);
    assert_eq!(lab.run("restore snap --tsc-khz 500000").expect(0).stdout, "\x20");
}
