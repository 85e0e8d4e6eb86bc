use machine::audit::{ArmingKind, Lateness, TimerAccount, TimerSummary};
use vmtime::VmTime;

use super::*;
use crate::check::{
    console::Found,
    result::{Ended, SCHEMA},
};

fn khz(khz: u64) -> Khz {
    Khz::new(khz).unwrap()
}

fn comparison(answer: Answer, copy_ms: u64, migrated_ms: u64) -> Comparison {
    let arming = |ms: u64| Arming { kind: ArmingKind::Tsc, at: VmTime(0), due: VmTime(ms * 1_000_000) };
    Comparison { copy: arming(copy_ms), migrated: arming(migrated_ms), answer }
}

const PAGE: PageFound = PageFound { cpu: 0, step_ns: Some(0), scale: true, ahead_of_first_ns: 0.0, off_ns: 0 };

/// A guest in good order: two migrations, of which each tells that it follows.
fn good() -> Findings {
    let migrated = |number, from_khz, to_khz| Migrated {
        number,
        vm_ns: VmTime(500_000_000),
        from_khz,
        to_khz,
        armings: vec![vec![comparison(Answer::Follows, 10, 10)]],
        pages: vec![PAGE],
    };
    let stretch = |tsc_khz| Stretch { tsc_khz, vm_ns: 500_000_000, interrupts: 50 };
    let [slow, fast] = [khz(1_000_000), khz(2_000_000)];
    Findings {
        schema: SCHEMA,
        setup: Setup {
            guest: "guest".to_owned(),
            cmdline: String::new(),
            cpus: 1,
            time: "virtual",
            source: "trapped",
            tsc_khz: fast,
            khz_cycle: vec![slow, fast],
            wanted: 2,
            every_ns: 500_000_000,
            deadline: "rescale",
            downtime: "freeze",
            fault: None,
            late_ns: Some(1_000_000),
            linux: true,
        },
        migrations: vec![migrated(1, fast, slow), migrated(2, slow, fast)],
        stretches: vec![stretch(fast), stretch(slow), stretch(fast)],
        timers: vec![TimerAccount {
            in_flight: InFlight { count: 2, ..InFlight::default() },
            ..TimerAccount::default()
        }],
        interrupts: TimerSummary {
            interrupts: 150,
            early: 0,
            late: Some(Lateness { p50_ns: 0, p99_ns: 0, worst_ns: 7_000 }),
        },
        guest_stopped: GuestStopped { set: 2, cleared: 2, never_cleared: 0, in_resumes: 0 },
        console: Found { worst_late_us: Some(70), errors: Some(0), ..Found::default() },
        end: Some(Ended { good: true, how: "reset".to_owned() }),
        vm_ns: VmTime(1_500_000_000),
    }
}

/// The verdicts other than `ok`.
fn verdicts(change: impl FnOnce(&mut Findings)) -> Vec<(&'static str, Verdict)> {
    let mut findings = good();
    change(&mut findings);
    let rows = judge(&findings);
    assert!(rows.iter().all(|row| !row.seen.is_empty()));
    rows.into_iter().filter(|row| row.verdict != Verdict::Ok).map(|row| (row.check, row.verdict)).collect()
}

fn seen(findings: &Findings, check: &str) -> String {
    judge(findings).into_iter().find(|row| row.check == check).unwrap().seen
}

// Catches: a check that fails without a reason, or one that another check's fault fails.
#[test]
fn each_fault_fails_its_own_check() {
    use Verdict::{CannotTell, Failed, Note};
    assert_eq!(verdicts(|_| {}), []);
    let timer = |findings: &mut Findings, in_flight| findings.timers[0].in_flight = in_flight;
    let count = InFlight { count: 2, ..InFlight::default() };
    for bad in [InFlight { lost: 1, ..count }, InFlight { late_ns: 3, ..count }, InFlight { early_ns: 3, ..count }] {
        assert_eq!(verdicts(|found| timer(found, bad)), [("deadlines in flight", Failed)]);
    }
    let fired = |found: &mut Findings| {
        timer(found, InFlight { early_ns: 3_000_000, ..count });
        found.setup.deadline = "fire";
    };
    assert_eq!(verdicts(fired), []);
    for page in [
        PageFound { step_ns: None, ..PAGE },
        PageFound { step_ns: Some(-1), ..PAGE },
        PageFound { step_ns: Some(3), ..PAGE },
        PageFound { scale: false, ..PAGE },
        PageFound { ahead_of_first_ns: -2.5, ..PAGE },
        PageFound { off_ns: 2_000, ..PAGE },
    ] {
        assert_eq!(verdicts(|found| found.migrations[1].pages.push(page)), [("kvmclock pages", Failed)]);
    }
    assert_eq!(verdicts(|found| found.interrupts.early = 1), [("timer interrupts", Failed)]);
    let late = Some(Lateness { worst_ns: 1_000_001, ..Lateness::default() });
    assert_eq!(verdicts(|found| found.interrupts.late = late), [("timer interrupts", Failed)]);
    assert_eq!(verdicts(|found| drop(found.migrations.pop())), [("migrations", Failed)]);
    let none = GuestStopped::default();
    assert_eq!(verdicts(|found| found.guest_stopped = none), [("GUEST_STOPPED", Failed)]);
    let kept = GuestStopped { set: 2, cleared: 0, never_cleared: 1, in_resumes: 2 };
    assert_eq!(verdicts(|found| found.guest_stopped = kept), [("GUEST_STOPPED", Note)]);
    let complaint = ("RCU stall detector".to_owned(), "line".to_owned());
    assert_eq!(verdicts(|found| found.console.first_complaints.push(complaint)), [("watchdogs", Failed)]);
    assert_eq!(verdicts(|found| found.console.worst_late_us = Some(1001)), [("user space", Failed)]);
    assert_eq!(verdicts(|found| found.console.errors = Some(1)), [("user space", Failed)]);
    assert_eq!(verdicts(|found| found.end = Some(Ended { good: false, how: "x".to_owned() })), [("end", Failed)]);
    let untold = |found: &mut Findings| {
        found.migrations.iter_mut().for_each(|migrated| migrated.armings = vec![Vec::new()]);
    };
    assert_eq!(verdicts(untold), [("intervals", CannotTell)]);
}

// Catches: a guest that computes with the old frequency, passed because it sometimes is right; one window's error
// called a guest that never follows; answers that contradict each other, taken for a verdict.
#[test]
fn intervals_are_judged_by_what_most_of_them_say() {
    let with = |answers: &[Answer]| {
        let mut findings = good();
        findings.migrations[0].armings = vec![answers.iter().map(|answer| comparison(*answer, 10, 20)).collect()];
        findings.migrations[1].armings.clear();
        let row = judge(&findings).into_iter().find(|row| row.check == "intervals").unwrap();
        (row.verdict, row.seen)
    };
    use Answer::{Corrected, Follows, Neither, Nothing, Old};
    let (verdict, seen) = with(&[Old, Old, Follows]);
    assert_eq!(verdict, Verdict::Failed);
    assert_eq!(
        seen,
        "does not follow: 2 of 3 timers were armed with as many TSC ticks as before the migration. After migration 1, \
         at 1.0 GHz: for 20.00ms; in a copy that stayed at 2.0 GHz: for 10.00ms"
    );
    let (verdict, seen) = with(&[Old, Follows, Follows, Nothing]);
    assert!(verdict == Verdict::Failed && seen.starts_with("follows, but 1 of 3 timers"), "{seen}");
    let (_, seen) = with(&[Old, Neither]);
    assert!(seen.contains("1 of 2 timers") && seen.contains(", 1 neither with these nor for"), "{seen}");
    assert_eq!(with(&[Follows, Corrected]).0, Verdict::Ok);
    assert_eq!(with(&[Follows, Follows, Follows, Neither]).0, Verdict::Ok);
    assert_eq!(with(&[Follows, Neither]).0, Verdict::CannotTell);
    assert_eq!(with(&[Nothing]).0, Verdict::CannotTell);
}

// Catches: a check that passes although there was nothing to judge.
#[test]
fn what_was_not_there_is_not_judged() {
    let nothing = |found: &mut Findings| {
        found.migrations.iter_mut().for_each(|migrated| {
            migrated.pages.clear();
            migrated.from_khz = migrated.to_khz;
        });
        found.timers = vec![TimerAccount::default()];
        found.interrupts = TimerSummary::default();
        found.guest_stopped = GuestStopped::default();
        found.console = Found::default();
        found.end = None;
    };
    let not_judged =
        ["deadlines in flight", "intervals", "timer interrupts", "kvmclock pages", "GUEST_STOPPED", "user space"];
    assert_eq!(verdicts(nothing), not_judged.map(|check| (check, Verdict::NotJudged)));
}

// Catches: a guest that is woken again and again, of which the table says nothing.
#[test]
fn interrupts_that_come_more_often_are_told() {
    let mut findings = good();
    assert!(!seen(&findings, "timer interrupts").contains("as often"));
    findings.stretches[2].interrupts = 540;
    assert!(seen(&findings, "timer interrupts").ends_with("10 times as often at 2.0 GHz as before the migrations"));
    findings.stretches[0].interrupts = 0;
    assert!(!seen(&findings, "timer interrupts").contains("as often"));
}

// Catches: a frequency that is shortened to another one.
#[test]
fn a_frequency_keeps_its_digits() {
    assert_eq!([2_000_000, 2_596_156, 10_000].map(|of| ghz(khz(of))), ["2.0 GHz", "2.596156 GHz", "0.01 GHz"]);
}
