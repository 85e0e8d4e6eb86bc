//! Findings as plain text for a mail: at most 72 columns, in ASCII.

use std::{
    fmt::{self, Write},
    time::Duration,
};

use machine::guest_clock::ClockIoctls;
use vmtime::Length;

use super::{
    account::{Page, Stop, VcpuStop},
    gaps::GapFindings,
    result::{Findings, Setup},
    series::{Bucket, Statistics},
};

/// The most columns of a line.
pub const COLUMNS: usize = 72;
/// The longest bar of a histogram.
const BAR: u64 = 24;

/// The findings as text.
#[must_use]
pub fn text(findings: &Findings) -> String {
    let (mut lines, mut out) = (String::new(), String::new());
    // Writing to a String cannot fail.
    let _ = write_all(&mut lines, findings);
    for line in lines.lines() {
        let _ = wrapped(&mut out, line);
    }
    out
}

fn write_all(out: &mut String, findings: &Findings) -> fmt::Result {
    setup(out, findings)?;
    if let Some(found) = &findings.gaps {
        gaps(out, found)?;
    }
    if let Some(error) = &findings.error {
        writeln!(out, "\nVM time error of a stop (vCPU 0), ns: new page at the resume, minus")?;
        writeln!(out, "old page at the stop, minus the downtime to be counted")?;
        figures(out, error)?;
        histogram(out, &error.histogram)?;
    }
    // The first is above.
    for (row, (name, Statistics { mean_ns, worst_ns, total_ns, .. })) in findings.series().skip(1).enumerate() {
        if row == 0 {
            writeln!(out, "\n{:<30} {:>12} {:>12} {:>14}", "in ns", "mean", "worst", "total")?;
        }
        writeln!(out, "{name:<30} {:>12} {:>12} {:>14}", ns(*mean_ns), ns(*worst_ns), ns(*total_ns))?;
    }
    rest(out, findings)?;
    if let Some(Stop { number, vcpus, .. }) = &findings.worst
        && let Some(VcpuStop { old, new, .. }) = vcpus.first()
    {
        writeln!(out, "\nthe page at stop {number} (the worst), before and after")?;
        page(out, old)?;
        page(out, new)?;
    }
    Ok(())
}

fn gaps(out: &mut String, findings: &GapFindings) -> fmt::Result {
    let GapFindings { asked_ns, made, found, .. } = findings;
    let asked = Length(Duration::from_nanos(*asked_ns));
    writeln!(out, "\nthe VMM found {found} of {made} gaps (SIGSTOP, and SIGCONT after {asked})")?;
    for (row, (name, Statistics { mean_ns, worst_ns, .. })) in findings.series().enumerate() {
        if row == 0 {
            writeln!(out, "{:<36} {:>16} {:>16}", "in ms", "mean", "largest")?;
        }
        writeln!(out, "{name:<36} {:>16.6} {:>16.6}", mean_ns / 1e6, worst_ns / 1e6)?;
    }
    Ok(())
}

fn page(out: &mut String, page: &Page) -> fmt::Result {
    let Page { version, tsc_timestamp, system_time, tsc_to_system_mul, tsc_shift, flags } = page;
    writeln!(out, "  version {version}, tsc_timestamp {tsc_timestamp}, system_time {system_time}")?;
    writeln!(out, "    mul {tsc_to_system_mul}, shift {tsc_shift}, flags {flags:#x}")
}

fn setup(out: &mut String, findings: &Findings) -> fmt::Result {
    let Setup {
        guest: _,
        cmdline,
        cpus,
        lapic,
        time,
        source,
        tsc_khz,
        khz_cycle,
        stops,
        wanted,
        every_ns,
        deadline,
        downtime,
        fault,
        kvm_ioctls,
    } = &findings.setup;
    let incomplete = if findings.complete { String::new() } else { format!(" of {wanted} (interrupted)") };
    let every = Length(Duration::from_nanos(*every_ns));
    let apart = if findings.gaps.is_some() {
        format!("each after {every} of VM time and 1 to 100 ms more")
    } else {
        format!("one every {every} of VM time")
    };
    writeln!(out, "{}{incomplete} {stops}, {apart}", findings.made())?;
    writeln!(out, "LAPIC and kvmclock: {lapic}; {time} time; {cpus} vCPU; TSC source {source}")?;
    let cycle: Vec<String> = khz_cycle.iter().map(|khz| khz.get().to_string()).collect();
    let cycle = if cycle.is_empty() { "unchanged".to_owned() } else { cycle.join(", ") };
    writeln!(out, "TSC {} kHz at boot, then {cycle}", tsc_khz.get())?;
    writeln!(out, "policies: downtime {downtime}, deadline {deadline}")?;
    if let Some(fault) = fault {
        writeln!(out, "fault injected: {fault}")?;
    }
    writeln!(out, "guest: {cmdline}")?;
    if let Some(ClockIoctls { clock_guest, tsc_scale }) = kvm_ioctls {
        let has = |has: &bool| if *has { "offered" } else { "not offered" };
        writeln!(out, "KVM_[GS]ET_CLOCK_GUEST {}, KVM_VCPU_TSC_SCALE {}", has(clock_guest), has(tsc_scale))?;
        let lacking = if *clock_guest { "vmm does not use the first" } else { "without the first" };
        writeln!(out, "  {lacking}: KVM makes a new page from a time in whole")?;
        writeln!(out, "  nanoseconds, and what that loses is in the figures below")?;
    }
    Ok(())
}

/// Writes a line; one that is too long is broken at spaces.
fn wrapped(out: &mut String, line: &str) -> fmt::Result {
    if line.chars().count() <= COLUMNS {
        return writeln!(out, "{line}");
    }
    let mut column = 0;
    for word in line.split_whitespace() {
        let mut word = word.to_owned();
        if word.chars().count() > COLUMNS - 2 {
            // It has no place to break.
            word = word.chars().take(COLUMNS - 5).chain("...".chars()).collect();
        }
        let width = word.chars().count();
        if column > 0 && column + 1 + width > COLUMNS {
            out.write_str("\n ")?;
            column = 1;
        }
        if column > 0 {
            out.write_char(' ')?;
            column += 1;
        }
        out.write_str(&word)?;
        column += width;
    }
    out.write_char('\n')
}

fn figures(out: &mut String, error: &Statistics) -> fmt::Result {
    let Statistics {
        count,
        total_ns,
        mean_ns,
        standard_error_ns,
        median_ns,
        p99_abs_ns,
        worst_ns,
        worst_at,
        nonzero,
        ..
    } = error;
    let exactly = if error.total_is_zero { " (exactly)" } else { "" };
    writeln!(out, "  total   {}{exactly} in {count} stops, {nonzero} of them not exact", ns(*total_ns))?;
    writeln!(out, "  mean    {} a stop, standard error {}", ns(*mean_ns), ns(*standard_error_ns))?;
    writeln!(
        out,
        "  median  {}, 99 % within {}, worst {} (stop {worst_at})",
        ns(*median_ns),
        ns(*p99_abs_ns),
        ns(*worst_ns)
    )
}

fn histogram(out: &mut String, buckets: &[Bucket]) -> fmt::Result {
    // One bucket of zeros shows nothing that the total does not.
    if buckets.iter().all(|bucket| bucket.to_ns == 0.0) {
        return Ok(());
    }
    let most = buckets.iter().map(|bucket| bucket.count).max().unwrap_or(1).max(1);
    for Bucket { from_ns, to_ns, count } in buckets {
        let range = if *to_ns == 0.0 {
            "0".to_owned()
        } else if to_ns.abs() == f64::MAX {
            format!("{} and beyond", ns(*from_ns))
        } else {
            format!("{} to {}", ns(*from_ns), ns(*to_ns))
        };
        let length = (u128::from(*count) * u128::from(BAR)).div_ceil(u128::from(most));
        let bar = "#".repeat(usize::try_from(length).unwrap_or(0));
        writeln!(out, "  {range:>24}  {count:>9}  {bar}")?;
    }
    Ok(())
}

fn rest(out: &mut String, findings: &Findings) -> fmt::Result {
    let Findings { went_back, bases_ahead, remainder_ns, rate_ns, vm_ns, raw, raw_within_ns, .. } = findings;
    writeln!(out)?;
    if raw.is_some() {
        writeln!(out, "MONOTONIC_RAW is read within {raw_within_ns} ns of the TSC")?;
    }
    if findings.gaps.is_some() && findings.deadlines.is_none() {
        writeln!(out, "deadlines: none was still in flight after a gap")?;
    }
    if let Some(ticks) = findings.deadline_ticks {
        writeln!(out, "deadlines: at most {} ticks from the least TSC of their VM time", ticks.unsigned_abs())?;
    }
    if let Some(longest) = findings.longest {
        let (stops, first, last) = (longest.stops, longest.first, longest.last);
        writeln!(out, "  one was in flight at {stops} stops: {first} -> {last}")?;
        writeln!(out, "  it was shifted by {} ns of VM time in all", ns(longest.shift_ns))?;
    }
    writeln!(out, "remainder that the VMM carries at the end: {} ns", ns(*remainder_ns))?;
    writeln!(out, "between stops: pages minus ticks over frequency {} ns", ns(*rate_ns))?;
    writeln!(out, "guest's clock back at {went_back} stops; base ahead of TSC at {bases_ahead}")?;
    if findings.host_stops > 0 {
        writeln!(out, "the host ran no vCPU for a while {} times, unasked", findings.host_stops)?;
    }
    if findings.unaccounted > 0 {
        writeln!(out, "{} stops without an account: KVM had no new page yet", findings.unaccounted)?;
    }
    if let Some(ticks) = &findings.ticks {
        let (count, missing, back) = (ticks.ticks, ticks.missing, ticks.clock_steps_back);
        writeln!(out, "guest's account: {count} ticks, {missing} missing; its clock back {back} times")?;
    }
    writeln!(out, "VM time at the end: {}.{:09} s", vm_ns / 1_000_000_000, vm_ns % 1_000_000_000)
}

/// A number of nanoseconds to some three digits; exact if it is whole and short.
#[must_use]
pub fn ns(value: f64) -> String {
    let size = value.abs();
    if size == 0.0 {
        "0".to_owned()
    } else if !(1e-3..1e9).contains(&size) {
        format!("{value:.2e}")
    } else if value.fract() == 0.0 || size >= 1e4 {
        format!("{value:.0}")
    } else {
        let digits = if size >= 100.0 {
            1
        } else if size >= 1.0 {
            3
        } else {
            5
        };
        format!("{value:.digits$}")
    }
}

#[cfg(test)]
mod tests {
    use machine::{audit::Summary, host::job_control::Stood};
    use vmtime::{ExactSpan, GuestTsc, Khz, VmTime};

    use super::*;
    use crate::clock::{
        account::{Deadline, Kind},
        gaps::{Gaps, Observed},
        raw::RawReading,
        result::Sums,
    };

    #[test]
    fn numbers_are_short() {
        for (value, text) in [
            (0.0, "0"),
            (-3.0, "-3"),
            (0.5, "0.50000"),
            (1.25, "1.250"),
            (-31_415.9, "-31416"),
            (1e-7, "1.00e-7"),
            (2.5e12, "2.50e12"),
            (123.456, "123.5"),
        ] {
            assert_eq!(ns(value), text);
        }
    }

    // Catches: a long command line, or large numbers, that break the mail.
    #[test]
    fn no_line_is_too_long() {
        let khz = |khz| Khz::new(khz).unwrap();
        let most = i64::MAX;
        let page = Page {
            version: u32::MAX,
            tsc_timestamp: u64::MAX,
            system_time: u64::MAX,
            tsc_to_system_mul: u32::MAX,
            tsc_shift: -31,
            flags: u8::MAX,
        };
        let deadline = Deadline {
            before: u64::MAX,
            after: u64::MAX,
            shift_ns: -1.5e18,
            shift_ticks: Some(i64::MIN),
            shift: ExactSpan::of_ns(-most),
        };
        let vcpu = VcpuStop {
            old: page,
            new: page,
            error_ns: -1.5e18,
            reading_ns: Some(-most),
            ahead_of_first_ns: 0.0,
            base_ahead_ticks: 0,
            deadline: Some(deadline),
            error: ExactSpan::of_ns(-most),
            ahead: ExactSpan::ZERO,
        };
        let clock = page.clock(0).unwrap();
        let reading = |raw_ns| RawReading { tsc: GuestTsc(u64::MAX), raw_ns, within_ns: 0 };
        let gap = Observed {
            stood: Stood { from_ns: 0, until_ns: u64::MAX },
            before: reading(0),
            after: reading(u64::MAX),
            found: Some((Duration::MAX, GuestTsc(0))),
        };
        let mut gaps = Gaps::new(Duration::MAX);
        gaps.note(true);
        gaps.add(&gap, &clock, &clock);
        let mut sums = Sums::new(1, Some(gaps));
        for number in 1..=3 {
            sums.add(Stop {
                number,
                kind: Kind::HostStop,
                vm_ns: u64::MAX,
                from_khz: khz(100_000_000),
                to_khz: khz(100_000_000),
                stop_tsc: GuestTsc(u64::MAX),
                resume_tsc: GuestTsc(u64::MAX),
                downtime_ns: u64::MAX,
                remainder_ns: -0.123_456,
                same_tsc_ns: Some(-1.5e18),
                vcpus: vec![vcpu.clone(), vcpu.clone()],
                same_tsc: Some(ExactSpan::of_ns(-most)),
            });
        }
        let findings = sums.findings(
            Setup {
                guest: "x".to_owned(),
                cmdline: format!("{} {}", "clockevent=kvm-tsc-deadline ".repeat(8), "x".repeat(200)),
                cpus: 16,
                lapic: "user",
                time: "virtual",
                source: "trapped",
                tsc_khz: khz(100_000_000),
                khz_cycle: vec![khz(100_000_000); 20],
                stops: "migrations in place",
                wanted: u64::MAX,
                every_ns: u64::MAX,
                deadline: "rescale",
                downtime: "catch-up",
                fault: Some("page-not-republished".to_owned()),
                kvm_ioctls: Some(ClockIoctls { clock_guest: false, tsc_scale: false }),
            },
            VmTime(u64::MAX),
            Some(Summary { ticks: u64::MAX, missing: u64::MAX, clock_steps_back: u64::MAX, ..Summary::default() }),
        );
        let text = text(&findings);
        for line in text.lines() {
            assert!(line.chars().count() <= COLUMNS && line.is_ascii(), "{line:?}");
        }
        assert!(text.contains("xxx...") && text.contains(&u64::MAX.to_string()), "{text}");
    }
}
