//! Verdicts on what a check found, each with a sentence that says why.

use std::fmt::Write;

use machine::audit::{Arming, GuestStopped, InFlight};
use vmtime::Khz;

use super::{
    compare::{Answer, Comparison},
    result::{Findings, Migrated, PageFound, Row, Setup, Stretch, Verdict},
};

/// A deadline or a reading of the guest's clock that is off by no more is right, in nanoseconds: a page with a new base
/// rounds twice.
const ROUNDING_NS: u64 = 2;
/// Two accounts of VM time agree if they differ by less than this, in nanoseconds, and a billionth of VM time.
const AGREE_NS: u64 = 1000;

/// The verdicts on `findings`.
#[must_use]
pub fn judge(findings: &Findings) -> Vec<Row> {
    let mut rows = vec![
        ("migrations", migrations(findings)),
        ("deadlines in flight", in_flight(findings)),
        ("intervals", intervals(findings)),
        ("timer interrupts", interrupts(findings)),
        ("kvmclock pages", pages(findings)),
        ("GUEST_STOPPED", guest_stopped(findings)),
    ];
    if findings.setup.linux {
        rows.push(("watchdogs", watchdogs(findings)));
        rows.push(("user space", user_space(findings)));
    }
    if let Some(ended) = &findings.end {
        let verdict = if ended.good { Verdict::Ok } else { Verdict::Failed };
        rows.push(("end", (verdict, format!("the guest ended: {}", ended.how))));
    }
    rows.into_iter().map(|(check, (verdict, seen))| Row { check, verdict, seen }).collect()
}

fn migrations(findings: &Findings) -> (Verdict, String) {
    let Findings { setup: Setup { wanted, .. }, migrations, .. } = findings;
    let made = migrations.len();
    if u64::try_from(made).is_ok_and(|made| made >= *wanted) {
        return (Verdict::Ok, format!("{made} of {wanted}"));
    }
    (Verdict::Failed, format!("{made} of {wanted}, then the guest ended: let it run longer"))
}

fn in_flight(findings: &Findings) -> (Verdict, String) {
    let policy = findings.setup.deadline;
    let mut sum = InFlight::default();
    for InFlight { count, lost, late_ns, early_ns, .. } in findings.timers.iter().map(|timer| timer.in_flight) {
        sum.count += count;
        sum.lost += lost;
        sum.late_ns = sum.late_ns.max(late_ns);
        sum.early_ns = sum.early_ns.max(early_ns);
    }
    let InFlight { count, lost, late_ns, early_ns, .. } = sum;
    let moved = |by: u64, how: &str| {
        format!(
            "of {count} the restore (policy {policy}) left one due {} {how} than the VM time it was armed for",
            time(by)
        )
    };
    match () {
        () if count == 0 => (Verdict::NotJudged, "no timer was armed at a migration".to_owned()),
        () if lost > 0 => (Verdict::Failed, format!("of {count} the restore disarmed {lost}: they never interrupt")),
        () if late_ns > ROUNDING_NS => (Verdict::Failed, moved(late_ns, "later")),
        () if policy == "fire" => (Verdict::Ok, format!("{count}, all due at once, as policy fire has it")),
        () if early_ns > ROUNDING_NS => (Verdict::Failed, moved(early_ns, "earlier")),
        () => (Verdict::Ok, format!("{count}, all due at the VM time they were armed for (policy {policy})")),
    }
}

fn intervals(findings: &Findings) -> (Verdict, String) {
    let Findings { migrations, .. } = findings;
    if migrations.iter().all(|migrated| migrated.from_khz == migrated.to_khz) {
        return (Verdict::NotJudged, "the TSC frequency never changed".to_owned());
    }
    let all = || migrations.iter().flat_map(|migrated| migrated.armings.iter().flatten().map(move |c| (migrated, c)));
    let count = |wanted: Answer| all().filter(|(_, comparison)| comparison.answer == wanted).count();
    let [follows, old, corrected, neither, nothing] =
        [Answer::Follows, Answer::Old, Answer::Corrected, Answer::Neither, Answer::Nothing].map(count);
    let told = follows + old + corrected + neither;
    if told == 0 {
        let why = if nothing == 0 {
            "no LAPIC timer was armed after a migration".to_owned()
        } else {
            format!(
                "the {nothing} intervals that were armed after migrations are too short, or the frequencies too near"
            )
        };
        return (Verdict::CannotTell, why);
    }
    let first = all().find(|(_, comparison)| comparison.answer == Answer::Old);
    match first {
        Some(example) if old > follows => (
            Verdict::Failed,
            format!(
                "does not follow: {old} of {told} timers were armed with as many TSC ticks as before the migration{}. {}",
                if neither > 0 {
                    format!(", {neither} neither with these nor for the VM time of a copy")
                } else {
                    String::new()
                },
                of_example(example)
            ),
        ),
        Some(example) => (
            Verdict::Failed,
            format!(
                "follows, but {old} of {told} timers were armed with as many TSC ticks as before the migration, as by a \
                 guest that computed them before it and wrote them after it. {}",
                of_example(example)
            ),
        ),
        None if (follows + corrected) < neither * 3 => (
            Verdict::CannotTell,
            format!(
                "{neither} of {told} timers were armed for another VM time than in a copy that was not migrated, and not \
                 with as many TSC ticks"
            ),
        ),
        None => {
            let right = follows + corrected;
            let second = if corrected > 0 { format!("; {corrected} of them at the second try") } else { String::new() };
            let seen = "timers were armed for the same VM time as in a copy that was not migrated";
            (Verdict::Ok, format!("follows: {right} of {told} {seen}{second}"))
        }
    }
}

fn of_example((migrated, comparison): (&Migrated, &Comparison)) -> String {
    let Migrated { number, from_khz, to_khz, .. } = migrated;
    let length = |arming: &Arming| time(arming.due.0.saturating_sub(arming.at.0));
    format!(
        "After migration {number}, at {}: for {}; in a copy that stayed at {}: for {}",
        ghz(*to_khz),
        length(&comparison.migrated),
        ghz(*from_khz),
        length(&comparison.copy)
    )
}

fn interrupts(findings: &Findings) -> (Verdict, String) {
    let Findings { interrupts, setup, stretches, .. } = findings;
    let count = interrupts.interrupts;
    if count == 0 {
        return (Verdict::NotJudged, "no LAPIC timer interrupted".to_owned());
    }
    let worst = interrupts.late.map_or(0, |late| late.worst_ns);
    let late = setup.late_ns.is_some_and(|limit| worst > limit);
    let mut seen = match interrupts.early {
        0 => format!("{count}, none before the timer was due, at most {} after", time(worst)),
        early => format!("{early} of {count} came before the timer was due, the latest {} after", time(worst)),
    };
    if let Some((often, stretch)) = more_often(stretches) {
        let _ = write!(seen, "; {often} times as often at {} as before the migrations", ghz(stretch.tsc_khz));
    }
    (if late || interrupts.early > 0 { Verdict::Failed } else { Verdict::Ok }, seen)
}

/// The stretch with the most interrupts in its time, if that is at least twice as many as in the first one.
fn more_often(stretches: &[Stretch]) -> Option<(u128, &Stretch)> {
    let (first, later) = stretches.split_first()?;
    let cross = |a: &Stretch, b: &Stretch| u128::from(a.interrupts) * u128::from(b.vm_ns);
    let most = later.iter().max_by(|a, b| cross(a, b).cmp(&cross(b, a)))?;
    let often = cross(most, first).checked_div(cross(first, most))?;
    (often >= 2).then_some((often, most))
}

fn pages(findings: &Findings) -> (Verdict, String) {
    let all =
        || findings.migrations.iter().flat_map(|migrated| migrated.pages.iter().map(move |page| (migrated, page)));
    let mut worst = 0;
    for (Migrated { number, to_khz, vm_ns, .. }, page) in all() {
        let PageFound { cpu, step_ns, scale, ahead_of_first_ns, off_ns } = *page;
        let wrong = match step_ns {
            None => Some("its base is ahead of the guest's TSC, and the guest's clock reads nonsense".to_owned()),
            Some(step) if step < 0 => Some(format!("the guest's clock went back by {}", time(step.unsigned_abs()))),
            Some(step) if step.unsigned_abs() > ROUNDING_NS => {
                Some(format!("the guest's clock jumped ahead by {}", time(step.unsigned_abs())))
            }
            Some(_) if !scale => Some(format!("it does not have the scale of {}", ghz(*to_khz))),
            #[expect(clippy::cast_precision_loss, reason = "2 is exact")]
            Some(_) if ahead_of_first_ns.abs() > ROUNDING_NS as f64 => {
                Some(format!("it is {ahead_of_first_ns:.1}ns ahead of vCPU 0's"))
            }
            Some(_) if off_ns.unsigned_abs() > AGREE_NS + vm_ns.0 / 1_000_000_000 => {
                Some(format!("before it, the guest's clock was off by {}", time(off_ns.unsigned_abs())))
            }
            Some(step) => {
                worst = worst.max(step);
                None
            }
        };
        if let Some(wrong) = wrong {
            return (Verdict::Failed, format!("migration {number}, vCPU {cpu}: {wrong}"));
        }
    }
    match all().count() {
        0 => (Verdict::NotJudged, "vCPU 0 has no kvmclock page".to_owned()),
        count => (
            Verdict::Ok,
            format!("{count} after migrations have the new frequency; the guest's clock stepped by {worst}ns at most"),
        ),
    }
}

fn guest_stopped(findings: &Findings) -> (Verdict, String) {
    let GuestStopped { set, cleared, never_cleared, in_resumes } = findings.guest_stopped;
    let has_page = findings.migrations.iter().any(|migrated| !migrated.pages.is_empty());
    match () {
        () if set == 0 && has_page => (Verdict::Failed, "the restores did not set it".to_owned()),
        () if set == 0 => (Verdict::NotJudged, "vCPU 0 has no kvmclock page".to_owned()),
        () if never_cleared > 0 => {
            let cpus = if never_cleared == 1 { "vCPU" } else { "vCPUs" };
            (Verdict::Note, format!("{never_cleared} {cpus} did not clear it, in {in_resumes} resumes"))
        }
        () => {
            (Verdict::Ok, format!("set {set} times, found cleared {cleared} times: at the next migration, or the end"))
        }
    }
}

fn watchdogs(findings: &Findings) -> (Verdict, String) {
    let found = &findings.console;
    match found.first_complaints.first() {
        None => (Verdict::Ok, "the console has no message of a lockup, a stall, an unstable clocksource".to_owned()),
        Some((who, line)) => (Verdict::Failed, format!("{} messages; first, {who}: {line}", found.complaints)),
    }
}

fn user_space(findings: &Findings) -> (Verdict, String) {
    let found = &findings.console;
    let Some(worst_us) = found.worst_late_us else {
        let why = match &found.first_error {
            Some(error) => return (Verdict::Failed, error.clone()),
            None => "the console does not have the lines that docs/linux/init.c ends with",
        };
        return (Verdict::NotJudged, why.to_owned());
    };
    let late_ns = worst_us.saturating_mul(1000);
    let late = findings.setup.late_ns.is_some_and(|limit| late_ns > limit);
    let errors = found.errors.unwrap_or(0);
    let mut seen = format!("a sleeping program woke up {} late at worst, by its own clock", time(late_ns));
    if let Some(error) = found.first_error.as_ref().filter(|_| errors > 0) {
        let _ = write!(seen, "; {errors} errors, the first: {error}");
    }
    (if late || errors > 0 { Verdict::Failed } else { Verdict::Ok }, seen)
}

/// A frequency in GHz, with as many digits as kHz need and at least one.
#[must_use]
pub fn ghz(khz: Khz) -> String {
    let (whole, rest) = (khz.get() / 1_000_000, khz.get() % 1_000_000);
    let digits = format!("{rest:06}");
    let digits = digits.trim_end_matches('0');
    format!("{whole}.{} GHz", if digits.is_empty() { "0" } else { digits })
}

fn time(ns: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "three digits for people")]
    let of = |unit: u64, name: &str| format!("{:.2}{name}", ns as f64 / unit as f64);
    match ns {
        0..1_000 => format!("{ns}ns"),
        1_000..1_000_000 => of(1_000, "µs"),
        1_000_000..1_000_000_000 => of(1_000_000, "ms"),
        _ => of(1_000_000_000, "s"),
    }
}

#[cfg(test)]
#[path = "judge_tests.rs"]
mod tests;
