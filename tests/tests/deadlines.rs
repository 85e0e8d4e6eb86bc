//! A deadline in flight over a migration: when it fires, by each policy, against 128-bit arithmetic on the two pages.
//!
//! Each case arms deadline D, saves at TSC T while the guest is halted, and restores in a new process.

use guest_abi::msr::IA32_TSC_DEADLINE;
use vm_tests::{Lab, Line, Page, Run, Trace, require_kvm};

/// Half and twice, and the ends of what is allowed.
const RATIOS: [(u64, u64); 4] = [(1, 2), (2, 1), (1, 10), (10, 1)];
const OLD_KHZ: u64 = 2_600_000;
const FLAGS: &str = "--time virtual --tsc-khz 2600000 --save-to snapshot --save-at";
/// Ticks of 10 Hz, saved between the fifth and the sixth. The restored run ends by itself.
const SAVED_AT: &str = "533123456ns";
const PERIOD_NS: u64 = 100_000_000;
const COUNT: u64 = 40;

struct Case {
    saved: Saved,
    restored: Run,
}

/// What the first process's trace says at its end.
#[derive(Clone, Copy)]
struct Saved {
    tsc: u64,
    deadline: u64,
    page: Page,
    ticks: u64,
}

fn save(lab: &Lab, conversion: &str) -> Saved {
    let cmdline = format!("clockevent=kvm-tsc-deadline conversion={conversion} hz=10 count={COUNT}");
    let run = lab.boot_traced(&cmdline, &format!("{FLAGS} {SAVED_AT}"));
    assert_eq!(run.summary.word("finish"), "saved");
    let saved = run.trace().only("save");
    let deadline = saved.armed_tsc();
    // The guest sleeps, and D is ahead.
    assert!(last_operation(run.trace()).is("halt") && deadline > saved.tsc());
    Saved { tsc: saved.tsc(), deadline, page: saved.page(), ticks: run.summary.count("ticks/ticks") }
}

fn last_operation(trace: &Trace) -> &Line {
    let all = ["rdtsc", "msr-write", "halt", "inject"].map(|event| trace.all(event).next_back());
    all.into_iter().flatten().max_by_key(|line| line.tsc()).expect("the guest did something")
}

/// Every policy, ratio and conversion: restores and hands over what happened.
fn each(policy: &str, check: impl Fn(&Case)) {
    for conversion in ["split", "mult", "exact"] {
        let lab = Lab::new();
        let saved = save(&lab, conversion);
        for (times, over) in RATIOS {
            let khz = OLD_KHZ * times / over;
            let restored = lab.restore("snapshot", &format!("--tsc-khz {khz} --deadline {policy}"));
            restored.in_order(COUNT - saved.ticks);
            let case = Case { saved, restored };
            let line = case.restored.trace().only("restore");
            assert_eq!(line.field("tsc_khz"), khz);
            // Freeze: both clocks go on from where they stood, VM time to a nanosecond.
            assert_eq!(line.tsc(), saved.tsc);
            let off = line.page().line(saved.tsc) - saved.page.line(saved.tsc);
            assert!(off.abs() < Page::PER_NS && line.page().ns(saved.tsc) >= saved.page.ns(saved.tsc), "{line:?}");
            check(&case);
            on_time_afterwards(&case);
        }
    }
}

impl Case {
    fn page(&self) -> Page {
        self.restored.trace().only("restore").page()
    }

    /// The interrupt that the deadline in flight became.
    fn fired(&self) -> &Line {
        self.restored.trace().first("inject")
    }
}

/// Once a deadline was armed again, interrupts come at its TSC, and the ticks at their expiries.
fn on_time_afterwards(case: &Case) {
    let trace = case.restored.trace();
    let armed: Vec<_> =
        trace.all("msr-write").filter(|line| line.field("index") == u64::from(IA32_TSC_DEADLINE)).collect();
    let injected: Vec<_> = trace.all("inject").skip(1).collect();
    assert_eq!(armed.len(), injected.len(), "{:#?}", case.restored);
    for (arm, inject) in armed.iter().zip(injected) {
        let deadline = arm.field("value");
        // Armed in the past it fires at once, which is when the handler that armed it lets interrupts in.
        let on_time =
            if deadline > arm.tsc() { inject.tsc() == deadline } else { inject.vm_ns() - arm.vm_ns() < 5_000 };
        assert!(on_time, "armed {arm:?}, came {inject:?}");
    }
    let ticks: Vec<&Line> = trace.all("tick").collect();
    let late_until = case.fired().vm_ns();
    for tick in ticks.iter().filter(|tick| tick.field("expires_ns") > late_until + PERIOD_NS) {
        // These conversions lose up to a tick of 128 TSC cycles, and none is ever late.
        let off = i128::from(tick.field("host_ns")) - i128::from(tick.field("expires_ns"));
        assert!((-500..500).contains(&off), "{off} ns off: {tick:?}");
    }
    let expiries: Vec<u64> = ticks.iter().map(|tick| tick.field("expires_ns")).collect();
    assert!(expiries.windows(2).all(|pair| pair[1] - pair[0] == PERIOD_NS), "{expiries:?}");
}

// Catches: a rescaled deadline that is off by a rounding, in either direction, on a slower or a faster TSC.
#[test]
fn rescale_fires_at_the_least_tsc_of_the_same_vm_time() {
    require_kvm!();
    each("rescale", |case| {
        let Saved { deadline, page: old, tsc, .. } = case.saved;
        let (new, fired) = (case.page(), case.fired().tsc());
        // What the new page cannot express, the VMM keeps.
        let kept = old.line(tsc) - new.line(tsc);
        let due = |at: u64| new.ns(at) >= old.ns(deadline) && new.line(at) + kept >= old.line(deadline);
        assert!(due(fired) && !due(fired - 1), "{:#?}", case.restored);
    });
}

// Catches: `keep` helping along, so that the failure of today's VMMs cannot be shown.
#[test]
fn keep_fires_at_the_raw_tsc() {
    require_kvm!();
    each("keep", |case| {
        let Saved { deadline, page: old, .. } = case.saved;
        let (fired, new) = (case.fired(), case.page());
        assert_eq!(fired.tsc(), deadline);
        let off = new.ns(deadline) - old.ns(deadline);
        assert_eq!(i128::from(fired.vm_ns()) - old.ns(deadline), off);
        // A slower TSC gets there later, a faster one sooner.
        let slower = case.restored.trace().only("restore").field("tsc_khz") < OLD_KHZ;
        assert_eq!(off > 0, slower, "off by {off} ns");
        assert_eq!(case.restored.summary.count("ticks/early_wakes") > 0, !slower, "{:#?}", case.restored);
    });
}

// Catches: `fire` waiting for something, or the early interrupt ending a tick before its time.
#[test]
fn fire_injects_at_once_and_the_guest_arms_again() {
    require_kvm!();
    each("fire", |case| {
        assert_eq!(case.fired().tsc(), case.saved.tsc, "{:#?}", case.restored);
        assert_eq!(case.restored.summary.count("ticks/early_wakes"), 1);
        let again = case.restored.trace().all("inject").nth(1).expect("a second interrupt");
        let tick = case.restored.trace().first("tick");
        let due = case.page().least_tsc(i128::from(tick.field("expires_ns")));
        // Rounded down conversions are early by up to 128 cycles of 2.6 GHz, at any new frequency.
        assert!(again.tsc() <= due && due - again.tsc() < 20_000, "{} {due}", again.tsc());
    });
}

// Catches: a saved timer that fires early, late or never when its unit is not TSC cycles.
#[test]
fn timers_in_vm_time_need_no_policy() {
    require_kvm!();
    for clockevent in ["kvm-ns-deadline", "lapic-oneshot"] {
        let lab = Lab::new();
        let first = lab.boot(&format!("clockevent={clockevent} hz=10 count=10"), &format!("{FLAGS} {SAVED_AT}"));
        for khz in [260_000, 1_300_000, 5_200_000] {
            for policy in ["keep", "rescale"] {
                let run = lab.restore("snapshot", &format!("--tsc-khz {khz} --deadline {policy}"));
                run.in_order(10 - first.summary.count("ticks/ticks"));
                let (fired, tick) = (run.trace().first("inject"), run.trace().first("tick"));
                let late = fired.vm_ns().checked_sub(tick.field("expires_ns"));
                // lapic-oneshot arms a length, some operations after the clock was read.
                assert!(late.is_some_and(|late| late < 20_000), "{clockevent} {khz} {policy}: {late:?} {run:#?}");
            }
        }
    }
}
