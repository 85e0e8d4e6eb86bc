//! Measures the CPU time spent polling for a deadline: by the VMM's own counter, and independently as the process's CPU
//! time.

use anyhow::Result;

use super::costs::{self, Costs};
use crate::{
    alternate::{Contender, alternate},
    lab::Lab,
    row::{Bound, Measured, Outcome},
    unit::Unit,
};

/// With one tick a second there must be almost no polling: a thousandth of a CPU is one millisecond a tick.
const IDLE_SHARE: f64 = 0.001;

pub(super) fn measure(lab: &Lab) -> Result<Outcome> {
    if !lab.vmm_takes("", "--poll-ns")? {
        return Ok(Outcome::NotThere("this vmm has no --poll-ns".to_owned()));
    }
    let count = lab.effort(2000);
    let cmdline = format!("clockevent=kvm-tsc-deadline hz=1000 count={count}");
    let mut polled = Vec::new();
    let taken = alternate(
        &mut [
            Contender::new("process, polling", || {
                let run = lab.run(&cmdline, "")?;
                polled.push(costs::of(&run)?.polled_share(&run)?);
                Ok(run.ended.cpu.as_secs_f64() / run.ended.wall.as_secs_f64())
            }),
            Contender::new("process, --poll-ns 0", || {
                let run = lab.run(&cmdline, "--poll-ns 0")?;
                Ok(run.ended.cpu.as_secs_f64() / run.ended.wall.as_secs_f64())
            }),
        ],
        1,
        lab.rounds(5),
    )?;
    let idle = lab.run("clockevent=kvm-tsc-deadline hz=1 count=4", "")?;
    let idle = Costs::polled_share(&costs::of(&idle)?, &idle)?;
    let mut measured = Measured::default().with("polled, by vmm", Unit::Share, polled.into_iter().skip(1).collect());
    for (who, samples) in taken {
        measured = measured.with(who, Unit::Share, samples);
    }
    let by_vmm = measured.median_of("polled, by vmm");
    let more = measured
        .median_of("process, polling")
        .zip(measured.median_of("process, --poll-ns 0"))
        .map(|(with, without)| with - without);
    Ok(Outcome::Measured(
        measured
            .check("of one CPU, polled", Unit::Share, by_vmm, Bound::AtMost(0.10))
            .check("of one CPU, process more than with --poll-ns 0", Unit::Share, more, Bound::AtMost(0.10))
            .check("of one CPU, polled at 1 Hz", Unit::Share, Some(idle), Bound::AtMost(IDLE_SHARE)),
    ))
}
