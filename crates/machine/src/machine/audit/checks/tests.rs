use super::{
    super::{Lateness, WatchdogSummary},
    *,
};

fn ticks() -> Summary {
    let late = Some(Lateness { p50_ns: 5_000_000, p99_ns: 5_000_000, worst_ns: 5_000_001 });
    Summary { ticks: 50, expected: 50, next_seq: 50, late_by_guest: late, ..Summary::default() }
}

fn evidence(ticks: Option<&Summary>) -> Evidence<'_> {
    Evidence {
        ticks,
        timer: None,
        guest_stopped: GuestStopped::default(),
        wall_error_ns: None,
        vmclock_error_ns: None,
        no_ring: "no ring",
        ended: true,
        failed: None,
    }
}

fn reasons(checks: &str, ticks: &Summary) -> Vec<String> {
    checks.parse::<Checks>().unwrap().verdict(&evidence(Some(ticks))).reasons
}

// A run all of whose ticks were 5 ms late could not fail.
#[test]
fn lateness_fails_if_it_is_asked_for_and_above_the_limit() {
    assert!(Checks::default().verdict(&evidence(Some(&ticks()))).pass);
    assert_eq!(reasons("late=5000001ns", &ticks()), [""; 0]);
    let [reason] = &reasons("late=5ms", &ticks())[..] else { panic!() };
    assert_eq!(reason, "the latest tick, by the guest's clock, was 5ms 1ns late, the limit is 5ms");
    let by_host = Summary { late_by_host: Some(Lateness { worst_ns: 7_000_000, ..Lateness::default() }), ..ticks() };
    assert!(reasons("late=6ms", &by_host)[0].contains("by the host's clock, was 7ms late"));
}

#[test]
fn each_check_fails_on_its_own_count_alone() {
    let cases = [
        ("early", Summary { early_wakes: 1, ..ticks() }),
        ("early", Summary { taken_early: 1, ..ticks() }),
        ("early", Summary { early_by_host: 1, ..ticks() }),
        ("lost", Summary { missing: 1, ..ticks() }),
        ("lost", Summary { next_seq: 49, ..ticks() }),
        ("clock", Summary { clock_steps_back: 1, worst_step_back_ns: 7, ..ticks() }),
        ("accounts", Summary { clock_errors: 1, worst_clock_error_ns: -7_000, ..ticks() }),
        ("accounts", Summary { malformed: 1, ..ticks() }),
    ];
    for (name, bad) in cases {
        for check in ["early", "lost", "clock", "accounts"] {
            assert_eq!(reasons(check, &bad).len(), usize::from(check == name), "{check} {bad:?}");
        }
        assert_eq!(Checks::default().verdict(&evidence(Some(&bad))).pass, name == "early", "{bad:?}");
        assert_eq!(reasons("none", &bad), [""; 0]);
    }
}

// Catches: a check of the flag that needs ticks, which foreign guests have not; one that passes where nothing was set.
#[test]
fn a_flag_that_is_never_cleared_fails_the_check_of_it_alone() {
    let judge = |checks: &str, guest_stopped: GuestStopped| {
        let evidence = Evidence { guest_stopped, ..evidence(None) };
        checks.parse::<Checks>().unwrap().verdict(&evidence).reasons
    };
    let kept = GuestStopped { set: 8, cleared: 0, never_cleared: 2, in_resumes: 4 };
    assert_eq!(judge("stopped", kept), ["PVCLOCK_GUEST_STOPPED was never cleared: vCPUs 2, resumes 4"]);
    assert_eq!(judge("none", kept), [""; 0]);
    assert_eq!(judge("stopped", GuestStopped { set: 8, cleared: 1, ..GuestStopped::default() }), [""; 0]);
    let [reason] = &judge("stopped", GuestStopped::default())[..] else { panic!("one reason") };
    assert!(reason.starts_with("stopped cannot be judged: PVCLOCK_GUEST_STOPPED was not set"), "{reason}");
}

// Catches: an error of the time of day that passes because it is negative, or for want of ticks.
#[test]
fn the_time_of_day_may_be_off_by_the_limit_either_way() {
    let judge = |error_ns: i64| {
        let evidence = Evidence { wall_error_ns: Some(error_ns), ..evidence(None) };
        "wall=1ms".parse::<Checks>().unwrap().verdict(&evidence).reasons
    };
    assert_eq!([-1_000_000, 0, 1_000_000].map(judge), [(); 3].map(|()| Vec::<String>::new()));
    assert_eq!(judge(-1_000_001), ["the guest's time of day is 1ms 1ns behind the host's, the limit is 1ms"]);
    assert_eq!(judge(2_000_000), ["the guest's time of day is 2ms ahead of the host's, the limit is 1ms"]);
    let [reason] = &reasons("wall=1h", &ticks())[..] else { panic!("one reason") };
    assert!(reason.starts_with("wall=1h cannot be judged: the guest has not asked"), "{reason}");
}

// Catches: a VMClock that the guest found wrong and the host did not look at, the other way round, and a check of one
// that is not there.
#[test]
fn vmclock_may_be_wrong_neither_for_the_guest_nor_beside_the_host() {
    let judge = |error_ns: Option<i64>, wrong: u64| {
        let ticks = Summary { vmclock_wrong: wrong, ..ticks() };
        let evidence = Evidence { vmclock_error_ns: error_ns, ..evidence(Some(&ticks)) };
        "vmclock=1us".parse::<Checks>().unwrap().verdict(&evidence).reasons
    };
    assert_eq!(judge(Some(-1_000), 0), [""; 0]);
    assert_eq!(judge(Some(1_001), 0), ["UTC by VMClock is 1us 1ns ahead of the host's, the limit is 1us"]);
    for error_ns in [None, Some(0)] {
        let [reason] = &judge(error_ns, 3)[..] else { panic!("one reason") };
        assert_eq!(
            reason,
            "intervals that VMClock and kvmclock measured differently, without a new disruption marker: 3"
        );
    }
    let [reason] = &judge(None, 0)[..] else { panic!("one reason") };
    assert!(reason.starts_with("vmclock=1us cannot be judged: the guest has no VMClock page"), "{reason}");
}

// Catches: a watchdog that marks a clocksource and fails nothing, and one that never checked and passes.
#[test]
fn a_marked_clocksource_fails_the_check_of_it_alone() {
    let found = WatchdogSummary { checks: 9, worst_skew_ns: -5, worst_interval_ns: 500_000_000, ..Default::default() };
    let quiet = Summary { watchdog: Some(found.clone()), ..ticks() };
    assert_eq!(reasons("watchdog", &quiet), [""; 0]);
    let marked = WatchdogSummary { unstable: vec!["tsc".to_owned()], ..found };
    let marked = Summary { watchdog: Some(marked), ..ticks() };
    let [reason] = &reasons("watchdog", &marked)[..] else { panic!("one reason") };
    assert_eq!(reason, "the guest's watchdog marked clocksources unstable: tsc, at worst -5 ns in 500ms of 9 checks");
    assert!(Checks::default().verdict(&evidence(Some(&marked))).pass, "a right migration can do that");
    let [reason] = &reasons("watchdog", &ticks())[..] else { panic!("one reason") };
    assert!(reason.starts_with("watchdog cannot be judged: the guest has no clocksource watchdog"), "{reason}");
}

#[test]
fn a_run_that_was_ended_from_outside_loses_no_tick() {
    let half = Summary { next_seq: 25, ..ticks() };
    assert!(!Checks::default().verdict(&evidence(Some(&half))).pass);
    assert!(Checks::default().verdict(&Evidence { ended: false, ..evidence(Some(&half)) }).pass);
}

#[test]
fn what_cannot_be_judged_fails_only_if_it_was_asked_for() {
    let verdict = Checks::default().verdict(&evidence(None));
    assert!(verdict.pass);
    let json = serde_json::to_value(&verdict).unwrap();
    assert_eq!(json["checks"]["lost"], "not-judged");
    assert_eq!(json["checks"]["run"], "pass");
    let asked: Checks = "lost,clock".parse().unwrap();
    assert_eq!(
        asked.verdict(&evidence(None)).reasons,
        ["lost cannot be judged: no ring", "clock cannot be judged: no ring"]
    );
    // Without ticks the lateness cannot be judged.
    let none = Summary { ticks: 0, late_by_guest: None, ..ticks() };
    assert_eq!(reasons("late=1ms", &none), ["late=1ms cannot be judged: there was no tick"]);
}

#[test]
fn interrupts_are_judged_where_there_are_no_ticks() {
    let late = Some(Lateness { worst_ns: 2_000, ..Lateness::default() });
    let timer = TimerSummary { interrupts: 3, early: 0, late };
    let passes = |checks: &str, timer: &TimerSummary| {
        let evidence = Evidence { timer: Some(timer), ..evidence(None) };
        checks.parse::<Checks>().unwrap().verdict(&evidence).pass
    };
    assert!(passes("late=2us,early", &timer));
    assert!(!passes("late=1us", &timer));
    assert!(!passes("early", &TimerSummary { early: 1, ..timer }));
    assert!(!passes("lost", &timer));
}

#[test]
fn a_run_that_failed_fails_whatever_is_checked() {
    let none: Checks = "none".parse().unwrap();
    let verdict = none.verdict(&Evidence { failed: Some("it crashed"), ..evidence(Some(&ticks())) });
    assert_eq!((verdict.pass, verdict.reasons), (false, vec!["it crashed".to_owned()]));
}

#[test]
fn lists_that_are_none_are_refused_with_what_there_is() {
    for (text, word) in [
        ("late", "late=TIME"),
        ("late=", "late="),
        ("late=5", "late=5"),
        ("wall", "wall=TIME"),
        ("wall=-1s", "wall=-1s"),
        ("lose", "accounts"),
        ("", "accounts"),
        ("lost,", "accounts"),
        ("lost,none", "alone"),
        ("lost,lost", "twice"),
        ("late=1ms,late=2ms", "twice"),
        ("lost=1", "accounts"),
    ] {
        let error = text.parse::<Checks>().unwrap_err();
        assert!(error.to_string().contains(word), "{text}: {error}");
    }
}
