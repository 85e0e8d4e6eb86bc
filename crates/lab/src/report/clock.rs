//! The page of a measurement of clocks.

use std::time::Duration;

use vmtime::Length;

use super::{
    Cell, Chart, Found, Page, Section, Table,
    chart::{Axis, Look},
    table::Tone,
    units,
};
use crate::clock::{
    account::{Stop, VcpuStop},
    gaps::GapFindings,
    result::Findings,
    series::Statistics,
    text::ns,
};

/// The page. `failed`: what the checks found; empty if they passed.
#[must_use]
pub fn page(findings: &Findings, failed: &[String], command: &str) -> Page {
    let setup = &findings.setup;
    let title = format!("A clock over {} {}", units::grouped(findings.made()), setup.stops);
    let page = Page::new(title, command, found(findings, failed))
        .fact("LAPIC and kvmclock", setup.lapic)
        .fact("time", setup.time)
        .fact("TSC source", setup.source)
        .fact("TSC at boot", setup.tsc_khz.to_string())
        .fact("downtime, deadline", format!("{}, {}", setup.downtime, setup.deadline))
        .fact("guest", &setup.cmdline);
    let page = match &findings.gaps {
        Some(found) => page.section(gaps(found)),
        None => page,
    };
    page.section(figures(findings)).section(by_stop(findings)).section(histogram(findings)).section(worst(findings))
}

fn found(findings: &Findings, failed: &[String]) -> Found {
    let text = findings.error.as_ref().map_or_else(String::new, |error| {
        format!(
            "VM time lost or gained {} ns in {} stops: {} ns a stop, with a standard error of {} ns.",
            ns(error.total_ns),
            units::grouped(error.count),
            ns(error.mean_ns),
            ns(error.standard_error_ns)
        )
    });
    if failed.is_empty() {
        Found { tone: Tone::Good, word: "measured".to_owned(), text }
    } else {
        Found { tone: Tone::Bad, word: "failed".to_owned(), text: format!("{} {text}", failed.join("; ")) }
    }
}

fn gaps(findings: &GapFindings) -> Section {
    let mut table =
        Table::new(["in milliseconds", "gaps", "mean", "standard error", "median", "largest"]).numeric(1..6);
    for (name, series) in findings.series() {
        let Statistics { count, mean_ns, standard_error_ns, median_ns, worst_ns, .. } = series;
        let numbers =
            [mean_ns, standard_error_ns, median_ns, worst_ns].map(|value| Cell::from(format!("{:.6}", value / 1e6)));
        table.row([Cell::from(name), units::grouped(*count).into()].into_iter().chain(numbers));
    }
    let GapFindings { asked_ns, made, found, .. } = findings;
    Section::new("Gaps")
        .text(format!(
            "The VMM found {} of {} gaps. In each the whole process was stopped by SIGSTOP, and SIGCONT was sent after {}.",
            units::grouped(*found),
            units::grouped(*made),
            Length(Duration::from_nanos(*asked_ns))
        ))
        .table(table)
}

fn figures(findings: &Findings) -> Section {
    let mut table =
        Table::new(["in nanoseconds", "stops", "mean", "standard error", "median", "worst", "total"]).numeric(1..7);
    for (name, series) in findings.series() {
        let Statistics { count, mean_ns, standard_error_ns, median_ns, worst_ns, total_ns, .. } = series;
        let numbers =
            [*mean_ns, *standard_error_ns, *median_ns, *worst_ns, *total_ns].map(|value| Cell::from(ns(value)));
        table.row([Cell::from(name), units::grouped(*count).into()].into_iter().chain(numbers));
    }
    Section::new("Figures")
        .text(
            "The error of a stop is the line of the guest's new page at the TSC of the resume, minus that of its old page at \
             the TSC of the stop, minus the downtime that was to be counted.",
        )
        .table(table)
}

fn by_stop(findings: &Findings) -> Section {
    let whole = |value: f64| format!("{value:.0}").parse::<i64>().unwrap_or(0);
    let first = |stop: &Stop| stop.vcpus.first().cloned();
    let errors = findings.stops.iter().filter_map(|stop| Some((stop.number, whole(first(stop)?.error_ns))));
    let readings = findings.stops.iter().filter_map(|stop| Some((stop.number, first(stop)?.reading_ns?)));
    let chart = Chart::new("error by number of the stop", Axis::Number)
        .series("VM time, rounded to nanoseconds", Look::Clock, errors.collect())
        .series("the guest's reading", Look::Guest, readings.collect());
    let section = Section::new("By stop").charts(vec![chart]);
    match findings.every_nth {
        1 => section,
        nth => section.note(format!("Every {nth}th stop is drawn.")),
    }
}

fn histogram(findings: &Findings) -> Section {
    let mut table = Table::new(["from, ns", "to, ns", "stops"]).numeric(0..3);
    for bucket in findings.error.iter().flat_map(|error| &error.histogram) {
        table.row([ns(bucket.from_ns), ns(bucket.to_ns), units::grouped(bucket.count)]);
    }
    Section::new("Histogram of the error of a stop").table(table)
}

fn worst(findings: &Findings) -> Section {
    let mut table =
        Table::new(["page", "version", "tsc_timestamp", "system_time", "mul", "shift", "flags"]).numeric(1..7);
    let section = Section::new("The worst stop");
    let Some(Stop { number, vcpus, stop_tsc, resume_tsc, .. }) = &findings.worst else { return section };
    for (cpu, VcpuStop { old, new, .. }) in vcpus.iter().enumerate() {
        for (name, page) in [("before", old), ("after", new)] {
            table.row([
                format!("vCPU {cpu}, {name}"),
                page.version.to_string(),
                page.tsc_timestamp.to_string(),
                page.system_time.to_string(),
                page.tsc_to_system_mul.to_string(),
                page.tsc_shift.to_string(),
                format!("{:#x}", page.flags),
            ]);
        }
    }
    let text = format!("Stop {number}: the TSC was {} at the stop and {} at the resume.", stop_tsc.0, resume_tsc.0);
    section.text(text).table(table)
}
