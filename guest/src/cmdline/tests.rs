use std::string::ToString;

use proptest::prelude::*;

use super::*;

#[test]
fn an_empty_line_means_the_defaults() {
    assert_eq!(Options::parse(b"  "), Ok(Options::default()));
}

#[test]
fn every_key_is_read() {
    let line = b"clockevent=lapic-oneshot conversion=mult recheck=off plant=early-check\tscenario=deltas watchdog=acpi_pm hz=10000 count=1000000000 \
                 seed=18446744073709551615 max_ms=0 load=user touch=4096 eoi=apic steal=off vmclock=off pci=off virtio_mmio.device=4K@0xd0000000:5";
    let want = Options {
        clockevent: Some("lapic-oneshot"),
        conversion: Conversion::Mult,
        recheck: false,
        plant_early_check: true,
        scenario: ScenarioName::Deltas,
        watchdog: Clocksource::AcpiPm,
        hz: 10_000,
        count: COUNT_MAX,
        seed: u64::MAX,
        max_ms: 0,
        load: Load::User,
        pv_eoi: false,
        steal: false,
        vmclock: false,
        touch: TOUCH_MAX,
    };
    assert_eq!(Options::parse(line), Ok(want));
}

#[test]
fn the_last_value_counts() {
    assert_eq!(Options::parse(b"hz=1 hz=2").unwrap().hz, 2);
}

#[test]
fn an_unknown_key_or_value_is_an_error_that_names_it() {
    for (line, want) in [
        (&b"hz=0"[..], "command line: hz=0 is not a number from 1 to 10000"),
        (b"hz=10001", "command line: hz=10001 is not a number from 1 to 10000"),
        (b"hz=1x", "command line: hz=1x is not a number from 1 to 10000"),
        (b"hz=-1", "command line: hz=-1 is not a number from 1 to 10000"),
        (b"count=", "command line: count= is not a number from 1 to 1000000000"),
        (b"conversion=round", "command line: conversion=round is not split, mult or exact"),
        (b"recheck=1", "command line: recheck=1 is not on or off"),
        (b"scenario=\x1b", "command line: scenario=\\u{1b} is not ticks, deltas, idle, smp or watchdog"),
        (b"watchdog=hpet", "command line: watchdog=hpet is not kvmclock or acpi_pm"),
        (b"seed=18446744073709551616", "command line: seed=18446744073709551616 is not a number below 2^64"),
        (b"load=idle", "command line: load=idle is not none, kernel or user"),
        (b"eoi=pv", "command line: eoi=pv is not auto or apic"),
        (b"steal=1", "command line: steal=1 is not on or off"),
        (
            b"steal=on touch=1",
            "command line: steal=on is for scenario=ticks, deltas or idle, without load= and touch=; steal=on and vmclock=on exclude each other",
        ),
        (b"vmclock=yes", "command line: vmclock=yes is not on or off"),
        (
            b"vmclock=on scenario=smp",
            "command line: vmclock=on is for scenario=ticks, deltas or idle, without load= and touch=; steal=on and vmclock=on exclude each other",
        ),
        (b"touch=4097", "command line: touch=4097 is not a number up to 4096"),
        (b"touch=1 scenario=smp", "command line: load= and touch= are for one CPU, not for scenario=smp"),
        (b"scenario=smp load=kernel", "command line: load= and touch= are for one CPU, not for scenario=smp"),
        (b"caf\xc3\xa9", "command line is not ASCII"),
    ] {
        assert_eq!(Options::parse(line).unwrap_err().to_string(), want);
    }
    assert_eq!(Options::parse(b"quiet"), Err(CmdlineError::UnknownKey("quiet")));
    assert_eq!(Options::parse(b"hzz=3"), Err(CmdlineError::UnknownKey("hzz")));
    assert_eq!(Options::parse(&[b' '; MAX_BYTES + 1]), Err(CmdlineError::TooLong));
}

// Catches: a watchdog at another pace than Linux's, or a key that is taken and then does nothing.
#[test]
fn the_watchdog_has_its_own_pace() {
    let options = Options::parse(b"count=3 scenario=watchdog").unwrap();
    assert_eq!((options.hz, options.watchdog, options.scenario().expected()), (2, Clocksource::Kvmclock, 3));
    for line in [&b"scenario=watchdog hz=2"[..], b"hz=100 scenario=watchdog", b"scenario=watchdog touch=1"] {
        assert_eq!(Options::parse(line), Err(CmdlineError::NotForWatchdog));
    }
    let said = CmdlineError::NotForWatchdog.to_string();
    assert!(said.contains("hz=, load= and touch= are not for scenario=watchdog"), "{said}");
}

#[test]
fn the_scenario_has_the_numbers() {
    assert_eq!(Options::parse(b"count=7").unwrap().scenario().expected(), 7);
    assert_eq!(Options::parse(b"count=7 scenario=deltas").unwrap().scenario().expected(), 7);
    assert_eq!(Options::parse(b"count=7 scenario=idle").unwrap().scenario().expected(), 0);
    assert_eq!(Options::parse(b"count=7 scenario=smp").unwrap().scenario().expected(), 7);
}

proptest! {
    #[test]
    fn any_bytes_are_parsed_or_refused(line in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = Options::parse(&line).map_err(|e| e.to_string());
    }
}
