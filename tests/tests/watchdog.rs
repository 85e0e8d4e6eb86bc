//! The guest's clocksource watchdog: which faults and which migrations it marks a clocksource for, and which not.

use vm_tests::{Lab, require_kvm};

/// Sweeps the exits of one tick. Returns how many points there are, and at how many the watchdog marked a clocksource.
#[track_caller]
fn marked(reference: &str, flags: &str) -> (usize, usize) {
    // The one-shot timer counts VM time: no fault in TSC or page makes it storm, which would end a run before the
    // check.
    let cmdline = format!("clockevent=lapic-oneshot scenario=watchdog watchdog={reference}");
    let points = Lab::new().sweep_exits(&cmdline, &format!("--ticks 6 {flags}"));
    let marked = points.iter().filter(|point| point["outcomes"][0]["unstable"] == true).count();
    (points.len(), marked)
}

#[track_caller]
fn all(reference: &str, flags: &str) {
    let (points, marked) = marked(reference, flags);
    assert_eq!(points, marked, "watchdog={reference} {flags}");
}

#[track_caller]
fn none(reference: &str, flags: &str) {
    assert_eq!(marked(reference, flags).1, 0, "watchdog={reference} {flags}");
}

// Catches: a policy of ours after which TSC, page and VM time disagree; a watchdog that is alarmed by nothing.
#[test]
fn no_policy_alarms_it_at_the_same_frequency() {
    require_kvm!();
    for reference in ["kvmclock", "acpi_pm"] {
        for deadline in ["keep", "rescale", "fire"] {
            none(reference, &format!("--ratio 1 --deadline {deadline}"));
        }
        none(reference, "--ratio 1 --downtime catch-up --downtime-length 1s");
    }
}

// Catches: a watchdog that takes the frequency from the page after a migration, and so sees nothing; a wrong limit.
#[test]
fn another_frequency_alarms_it_beyond_its_limit() {
    require_kvm!();
    for reference in ["kvmclock", "acpi_pm"] {
        all(reference, "--ratio 0.5");
        all(reference, "--ratio 2");
    }
    none("kvmclock", "--ratio 0.997");
    all("acpi_pm", "--ratio 0.997");
    none("acpi_pm", "--ratio 0.9998");
}

// Catches: a PM timer that is computed from the page or from a TSC that jumped, and so is wrong together with them.
#[test]
fn the_pm_timer_shows_the_faults_that_kvmclock_shares_with_the_tsc() {
    require_kvm!();
    for fault in ["--ratio 1 --inject tsc-jump", "--ratio 0.5 --inject page-not-republished"] {
        none("kvmclock", fault);
        all("acpi_pm", fault);
    }
}

// Catches: a fault that reaches more than the step it is to change.
#[test]
fn faults_of_the_timer_and_the_flag_are_none_of_its_business() {
    require_kvm!();
    for fault in ["deadline-before-lapic", "no-guest-stopped", "zero-to-now", "host-stop=1s"] {
        none("acpi_pm", &format!("--inject {fault} --ratio 1"));
    }
}

// Catches: results that stop at the ring: the console, the summary and the check must say the same.
#[test]
fn a_run_tells_what_was_marked() {
    require_kvm!();
    let lab = Lab::new();
    let flags = "--time virtual --tsc-khz 2000000 --migrate-every 700ms --tsc-khz-cycle 1000000";
    let run = lab.boot("scenario=watchdog count=4", flags);
    let found = run.summary.value("ticks/watchdog");
    assert_eq!(found["unstable"], serde_json::json!(["tsc"]));
    assert!(run.ended.stdout.contains("watchdog: tsc is unstable: off by -150"), "{run:#?}");
    let mut again = lab.guest("scenario=watchdog count=4", &format!("{flags} --fail-on watchdog"));
    vm_tests::finish(&mut again).expect(1);
    // The same without a migration, and with KVM's LAPIC, whose kvmclock is KVM's, in real time.
    for flags in ["--time virtual", "--lapic kvm"] {
        let run = lab.boot("scenario=watchdog watchdog=acpi_pm count=4", &format!("{flags} --fail-on lost,clock"));
        let found = run.summary.value("ticks/watchdog");
        assert_eq!(found["unstable"], serde_json::json!([]), "{flags}: {found}");
    }
}
