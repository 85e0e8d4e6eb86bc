//! The report as text for people.

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
            match (scaling.works, scaling.catches_up) {
                (true, _) => "scales",
                (false, true) => "catches up at entries, does not scale",
                (false, false) => "does not scale",
            },
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
        "  SYSCALL in user mode            {}",
        match report.user_syscall {
            "works" => "works",
            "faults" => "page fault at IA32_LSTAR, still in user mode",
            _ => "does not get to IA32_LSTAR",
        },
    )?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::{Capability, Claim, SCHEMA, Scaling, verdicts};

    fn report(scaling: Scaling, exact: bool) -> Report {
        let mut report = Report {
            schema: SCHEMA,
            kernel: "6.12.1".to_owned(),
            kvm_modules: Vec::new(),
            capabilities: vec![Capability { name: "KVM_CAP_TSC_CONTROL", present: scaling.works, purpose: "" }],
            host_tsc_khz: 1_000_000,
            tsc_equals_host: true,
            tsc_scaling: vec![scaling],
            tsc_offset: Claim { accepted: true, works: true },
            deadline_wrmsr: "exits",
            x2apic_exits: true,
            user_syscall: "works",
            kernel_lapic: true,
            kernel_lapic_deadline: true,
            supervisor_instruction_ns: 2.0,
            supervisor_emulated: false,
            single_step_exact: exact,
            single_step_ns: 1,
            exit_ns: 1,
            wake_p50_ns: 1,
            wake_p90_ns: 1,
            verdicts: Vec::new(),
        };
        report.verdicts = verdicts(&report);
        report
    }

    fn scaling(works: bool, catches_up: bool) -> Scaling {
        Scaling { asked_khz: 2_000_000, accepted: true, measured_khz: 2_000_000, works, catches_up }
    }

    // KVM without TSC scaling sets a TSC forward at each entry: that is neither scaling nor ignoring the request.
    #[test]
    fn catching_up_is_not_reported_as_scaling() {
        let caught = render(&report(scaling(false, true), true));
        assert!(caught.contains("measured 2000000 kHz: catches up at entries, does not scale"), "{caught}");
        assert!(caught.contains("no TSC scaling: KVM sets a guest's TSC forward at entries"), "{caught}");
        let scales = render(&report(scaling(true, false), true));
        assert!(scales.contains("measured 2000000 kHz: scales") && !scales.contains("forward"), "{scales}");
        assert!(render(&report(scaling(false, false), true)).contains("ignores it"));
    }

    // Catches: a host whose KVM fails at SYSCALL and that is shown as one where it works.
    #[test]
    fn what_syscall_does_is_told() {
        for (found, measured, works) in
            [("works", "works", true), ("faults", "page fault", true), ("other", "does not get", false)]
        {
            let mut report = Report { user_syscall: found, ..report(scaling(true, false), true) };
            report.verdicts = verdicts(&report);
            let text = render(&report);
            assert!(text.contains(&format!("SYSCALL in user mode            {measured}")), "{text}");
            let verdict = report.verdicts.iter().find(|verdict| verdict.feature == "SYSCALL").unwrap();
            assert_eq!(verdict.works, works);
            assert_eq!(verdict.detail.contains("vmm makes"), found == "faults");
        }
    }

    #[test]
    fn inexact_steps_refuse_sweeps() {
        assert!(render(&report(scaling(true, false), false)).contains("vmm sweep is refused"));
        assert!(!render(&report(scaling(true, false), true)).contains("refused"));
    }
}
