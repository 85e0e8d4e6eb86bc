//! Costs of a tick, counted as the difference between a long run and a short one: start and end cancel out.

use std::fs;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::{
    lab::{Lab, Run, number},
    process,
    programs::on_path,
    row::{Bound, Measured, Outcome},
    unit::Unit,
};

/// Ticks of the short run, and of the long one.
const TICKS: (u32, u32) = (1000, 3000);
/// In real time a run sometimes has a few more of everything: a tick that came while the guest was still working, a
/// signal, a wait that was resumed. One in fifty is far below one more per tick, which is what the bound must catch.
const RARE: f64 = 0.02;
/// A vCPU's exits a tick with x2APIC and the host's TSC: the deadline's write and the HLT, and the EOI where it exits.
const EXITS: f64 = 2.0;

/// The counters of a run, "costs" in its summary.
pub(crate) struct Costs(Value);

/// The counters of `run`.
pub(crate) fn of(run: &Run) -> Result<Costs> {
    run.summary.get("costs").cloned().map(Costs).context("this vmm writes no costs into --summary")
}

impl Costs {
    /// A counter.
    pub(crate) fn count(&self, name: &str) -> Result<f64> {
        number(&self.0, &format!("/{name}"))
    }

    /// The share of VM time that was spent polling.
    pub(crate) fn polled_share(&self, run: &Run) -> Result<f64> {
        Ok(self.count("polled_ns")? / number(&run.summary, "/vm_ns")?)
    }
}

/// A run whose counts are compared with a longer one of the same kind.
struct Short<'a> {
    hz: u32,
    ticks: (u32, u32),
    flags: &'a str,
}

/// The counter `name` per tick, measured `rounds` times; `None` if this `vmm` has no counters.
fn per_tick(lab: &Lab, name: &str, short: &Short<'_>) -> Result<Option<Vec<f64>>> {
    let &Short { hz, ticks: (few, many), flags } = short;
    let mut samples = Vec::new();
    for _ in 0..lab.rounds(3) {
        let mut counts = [0.0; 2];
        for (count, ticks) in counts.iter_mut().zip([few, many]) {
            let run = lab.run(&format!("clockevent=kvm-tsc-deadline hz={hz} count={ticks}"), flags)?;
            let Ok(costs) = of(&run) else { return Ok(None) };
            *count = costs.count(name)?;
        }
        let [short, long] = counts;
        samples.push((long - short) / f64::from(many - few));
    }
    Ok(Some(samples))
}

/// Exits a tick at `hz`, from runs of `count` ticks and of twice as many; `None` if this `vmm` has no counters.
pub(crate) fn exits_per_tick(lab: &Lab, hz: u32, count: u32) -> Result<Option<Vec<f64>>> {
    per_tick(lab, "exits", &Short { hz, ticks: (count, count * 2), flags: "--tsc host" })
}

fn at_1khz(flags: &str) -> Short<'_> {
    Short { hz: 1000, ticks: TICKS, flags }
}

fn not_there() -> Outcome {
    Outcome::NotThere("this vmm writes no costs into --summary".to_owned())
}

pub(super) fn exits(lab: &Lab) -> Result<Outcome> {
    let Some(host) = per_tick(lab, "exits", &at_1khz("--tsc host"))? else { return Ok(not_there()) };
    let without = per_tick(lab, "exits", &at_1khz("--tsc host --pv-eoi off"))?.unwrap_or_default();
    let trapped = per_tick(lab, "exits", &at_1khz("--tsc trapped"))?.unwrap_or_default();
    let measured = Measured::default()
        .with("--tsc host", Unit::PerTick, host)
        .with("--tsc host, --pv-eoi off", Unit::PerTick, without)
        .with("--tsc trapped", Unit::PerTick, trapped);
    let [host, without] = ["--tsc host", "--tsc host, --pv-eoi off"].map(|who| measured.median_of(who));
    Ok(Outcome::Measured(
        measured
            .check("--tsc host, x2APIC, PV EOI", Unit::PerTick, host, Bound::AtMost(EXITS + RARE))
            .check("without PV EOI", Unit::PerTick, without, Bound::AtMost(EXITS + 1.0 + RARE))
            .note("trapped: one more for each RDTSC of the guest"),
    ))
}

pub(super) fn ioctls(lab: &Lab) -> Result<Outcome> {
    let Some(samples) = per_tick(lab, "vcpu_ioctls", &at_1khz("--tsc host"))? else { return Ok(not_there()) };
    let measured = Measured::default().with("--tsc host", Unit::PerTick, samples);
    let median = measured.median_of("--tsc host");
    Ok(Outcome::Measured(measured.check("--tsc host, x2APIC", Unit::PerTick, median, Bound::AtMost(RARE))))
}

pub(super) fn syscalls(lab: &Lab) -> Result<Outcome> {
    let Some(strace) = on_path("strace") else { return Ok(Outcome::NoMeans("strace is not on PATH".to_owned())) };
    let file = lab.path("strace");
    let count = |ticks: u32| -> Result<f64> {
        let vmm = lab.guest(&format!("clockevent=kvm-tsc-deadline hz=100 count={ticks}"), "--tsc host");
        let mut command = std::process::Command::new(&strace);
        command.args(["-f", "-c", "-o"]).arg(&file).arg(vmm.get_program()).args(vmm.get_args());
        process::succeed(&mut command)?;
        total(&fs::read_to_string(&file)?)
    };
    // At 100 Hz, because strace makes every call some hundred microseconds longer.
    let (short, long) = (100, 300);
    let mut samples = Vec::new();
    for _ in 0..lab.rounds(3) {
        samples.push((count(long)? - count(short)?) / f64::from(long - short));
    }
    let measured = Measured::default().with("--tsc host", Unit::PerTick, samples);
    // An entry for each exit, the timer set, the sleep, and the return from the timer's signal.
    let median = measured.median_of("--tsc host");
    Ok(Outcome::Measured(measured.hope("--tsc host, x2APIC", Unit::PerTick, median, Bound::AtMost(EXITS + 3.0 + RARE))))
}

/// The number of calls in the last line that `strace -c` prints: "100.00 0.4 2 1234 5 total".
fn total(text: &str) -> Result<f64> {
    let line = text.lines().rev().find(|line| line.ends_with(" total")).context("strace -c gave no total")?;
    match line.split_whitespace().nth(3).and_then(|calls| calls.parse().ok()) {
        Some(calls) => Ok(calls),
        None => bail!("strace -c: {line}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_total_of_calls_is_in_the_fourth_column() {
        let text = "% time     seconds  usecs/call     calls    errors syscall\n 99.92    0.071404          70      1014           ioctl\n\
                    ------ ----------- ----------- --------- --------- ----------------\n100.00    0.071461          65      1092         4 total\n";
        assert_eq!(total(text).unwrap(), 1092.0);
        assert!(total("").is_err());
    }
}
