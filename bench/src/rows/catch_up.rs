//! Measures how far a guest's clock steps over a pause under `--downtime catch-up`, by the guest's own readings: what
//! its kvmclock advanced between its ticks before and after, beyond what its TSC did. With `--tsc host` the TSC counts
//! on.

use std::{
    fs,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::{
    api::Api,
    lab::{Lab, number},
    process,
    row::{Bound, Measured, Outcome},
    unit::Unit,
};

const PAUSE: Duration = Duration::from_millis(50);
/// Time for some ticks between two pauses.
const BETWEEN: Duration = Duration::from_millis(30);
const LAPICS: [(&str, f64); 2] = [("user", 200.0), ("kvm", 500.0)];
const FLOOR: &str = "floor: one KVM_SET_CLOCK";

pub(super) fn measure(lab: &Lab) -> Result<Outcome> {
    let pauses = lab.effort(20);
    let mut steps = LAPICS.map(|_| Vec::new());
    let mut beyond = 0.0_f64;
    let mut floor = Vec::new();
    for _ in 0..lab.rounds(4) {
        for ((lapic, _), steps) in LAPICS.iter().zip(&mut steps) {
            for (step, bound) in vmm(lab, lapic, pauses)? {
                steps.push(step.abs());
                // A page and a reading of it round by up to 2 ns each.
                beyond = beyond.max(step.abs() - bound - 8.0);
            }
        }
        let ms = PAUSE.as_millis().to_string();
        let mut command = Command::new(&lab.programs.floor);
        let printed = process::succeed(command.args(["catch-up", &pauses.to_string(), &ms]))?.stdout;
        let taken: Result<Vec<f64>, _> = printed.lines().map(str::parse::<f64>).collect();
        floor.extend(taken.context("the floor's steps")?.into_iter().map(f64::abs));
    }
    let mut measured = Measured::default();
    for ((lapic, most), steps) in LAPICS.iter().zip(steps) {
        let who = format!("--lapic {lapic}");
        measured = measured.with(&who, Unit::Ns, steps);
        let median = measured.median_of(&who);
        measured = measured.check(format!("{who}, median"), Unit::Ns, median, Bound::AtMost(*most));
    }
    let measured = measured.with(FLOOR, Unit::Ns, floor);
    Ok(Outcome::Measured(measured.check(
        "worst step, beyond the bound that vmm reports",
        Unit::Ns,
        Some(beyond),
        Bound::AtMost(0.0),
    )))
}

/// Each pause's step and the bound that `vmm` reports for it, in nanoseconds.
fn vmm(lab: &Lab, lapic: &str, pauses: u32) -> Result<Vec<(f64, f64)>> {
    let [socket, trace] = ["catch-up.sock", "catch-up.jsonl"].map(|name| lab.path(name));
    let _ = (fs::remove_file(&socket), fs::remove_file(&trace));
    let flags = format!("--lapic {lapic} --tsc host --downtime catch-up");
    let mut command = lab.guest("clockevent=kvm-tsc-deadline hz=200 count=1000000", &flags);
    command.arg("--api-sock").arg(&socket).arg("--trace").arg(&trace).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn()?;
    let done = Api::wait(&socket).and_then(|api| {
        for _ in 0..pauses {
            thread::sleep(BETWEEN);
            let _ = api.put("pause", &json!({}))?;
            thread::sleep(PAUSE);
            let _ = api.put("resume", &json!({}))?;
        }
        thread::sleep(BETWEEN);
        api.put("quit", &json!({}))
    });
    if done.is_err() {
        let _ = child.kill();
    }
    let status = child.wait()?;
    let _ = done?;
    if !status.success() {
        bail!("--lapic {lapic}: {status}");
    }
    let lines: Result<Vec<Value>, _> = fs::read_to_string(&trace)?.lines().map(serde_json::from_str).collect();
    steps(&lines?)
}

/// The steps in a trace.
fn steps(trace: &[Value]) -> Result<Vec<(f64, f64)>> {
    let (mut steps, mut last_tick, mut open) = (Vec::new(), None, None);
    for line in trace {
        match line["event"].as_str() {
            Some("restore") => open = last_tick.map(|tick| (tick, line)),
            Some("tick") => {
                if let Some((before, restore)) = open.take() {
                    steps.push((step(before, restore, line)?, number(restore, "/downtime_error_ns")?));
                }
                last_tick = Some(line);
            }
            _ => {}
        }
    }
    Ok(steps)
}

fn step(before: &Value, restore: &Value, after: &Value) -> Result<f64> {
    let advance = |field| Ok::<_, anyhow::Error>(number(after, field)? - number(before, field)?);
    let rate = number(restore, "/page/scale/mul")? / 2_f64.powi(32) * 2_f64.powf(number(restore, "/page/scale/shift")?);
    // Differences of some 10^8, so that a double has ten digits after the point.
    Ok(advance("/fired_ns")? - advance("/tsc")? * rate)
}

#[cfg(test)]
mod tests {
    use super::*;

    // Catches: a step of which the pause's own length is a part, and a sign that hides one.
    #[test]
    fn a_step_is_what_the_clock_advanced_beyond_the_tsc() {
        let tick = |tsc: u64, ns: u64| json!({"event": "tick", "tsc": tsc, "fired_ns": ns});
        let scale = json!({"mul": 1_u64 << 31, "shift": -1});
        let restore = json!({"event": "restore", "page": {"scale": scale}, "downtime_error_ns": 12});
        let trace = [tick(100, 1000), tick(400, 1075), restore, tick(800, 1185), tick(1200, 1285)];
        assert_eq!(steps(&trace).unwrap(), [(10.0, 12.0)]);
    }
}
