//! The report for people.

use std::fmt::Write;

use super::Report;

fn yes(value: bool) -> &'static str {
    if value { "yes" } else { "no" }
}

/// The report as text.
#[must_use]
pub fn render(report: &Report) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = write_report(&mut out, report);
    out
}

fn write_report(out: &mut String, report: &Report) -> std::fmt::Result {
    let modules = if report.kvm_modules.is_empty() { "built in".to_owned() } else { report.kvm_modules.join(", ") };
    writeln!(out, "kernel {}, KVM modules: {modules}", report.kernel)?;
    let missing: Vec<_> = report.capabilities.iter().filter(|c| !c.present).map(|c| c.name).collect();
    let present = report.capabilities.len() - missing.len();
    writeln!(
        out,
        "capabilities: {present} of {} that vmm knows{}",
        report.capabilities.len(),
        match missing.len() {
            0 => String::new(),
            _ => format!("; missing {}", missing.join(", ")),
        }
    )?;
    writeln!(out, "\nTime")?;
    writeln!(out, "  host TSC                        {} kHz", report.host_tsc_khz)?;
    writeln!(out, "  guest TSC = host TSC            {}", yes(report.tsc_equals_host))?;
    for scaling in &report.tsc_scaling {
        writeln!(
            out,
            "  asked for {:>9} kHz         KVM says {}, measured {} kHz: {}",
            scaling.asked_khz,
            if scaling.accepted { "ok" } else { "error" },
            scaling.measured_khz,
            if scaling.works { "scales" } else { "does not scale" },
        )?;
    }
    writeln!(
        out,
        "  asked for a TSC offset          KVM says {}, measured: {}",
        if report.tsc_offset.accepted { "ok" } else { "error" },
        if report.tsc_offset.works { "in effect" } else { "no effect" },
    )?;
    writeln!(out, "\nExits")?;
    writeln!(out, "  WRMSR IA32_TSC_DEADLINE         {}", report.deadline_wrmsr)?;
    writeln!(out, "  x2APIC MSRs                     {}", if report.x2apic_exits { "exit" } else { "do not exit" })?;
    writeln!(
        out,
        "  KVM's own LAPIC                 {}",
        match (report.kernel_lapic, report.kernel_lapic_deadline) {
            (true, true) => "yes, and its TSC deadline fires",
            (true, false) => "yes, but its TSC deadline does not fire in time",
            (false, _) => "no",
        },
    )?;
    writeln!(
        out,
        "  supervisor code                 {:.1} ns an instruction: {}",
        report.supervisor_instruction_ns,
        if report.supervisor_emulated { "emulated" } else { "native" },
    )?;
    writeln!(
        out,
        "  single step                     {}, {:.1} µs",
        if report.single_step_exact { "exact" } else { "not exact" },
        micros(report.single_step_ns),
    )?;
    writeln!(out, "  exit to user space and back     {:.1} µs", micros(report.exit_ns))?;
    writeln!(
        out,
        "  a sleeping thread wakes late by {:.0} µs (p50), {:.0} µs (p90)",
        micros(report.wake_p50_ns),
        micros(report.wake_p90_ns),
    )?;
    writeln!(out, "\nWhat this means")?;
    for verdict in &report.verdicts {
        let mark = if verdict.works { "works" } else { "no" };
        writeln!(out, "  {:<14} {:<6} {}", verdict.feature, mark, verdict.detail)?;
    }
    Ok(())
}

#[allow(clippy::cast_precision_loss, reason = "three digits for people")]
fn micros(ns: u64) -> f64 {
    ns as f64 / 1000.0
}
