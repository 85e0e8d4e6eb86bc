//! Measures how fast virtual time passes.

use anyhow::{Result, ensure};

use crate::{
    alternate::{Contender, alternate},
    lab::{Lab, number},
    row::{Bound, Measured, Outcome},
    unit::Unit,
};

const S: f64 = 1e9;
const MS: f64 = 1e6;
/// The scenario's first eight waits are one of each kind; the eighth is between 270 s and `max_ms`.
const WAITS: (u32, u32) = (7, 8);

pub(super) fn ticks(lab: &Lab) -> Result<Outcome> {
    let cmdline = format!("clockevent=kvm-tsc-deadline hz=100 count={}", lab.effort(5000));
    let rate = || {
        let run = lab.run(&cmdline, "--time virtual")?;
        Ok(number(&run.summary, "/vm_ns")? / S / run.ended.wall.as_secs_f64())
    };
    let mut contenders = [Contender::new("vmm", rate)];
    let mut measured = Measured::default();
    for (who, samples) in alternate(&mut contenders, 1, lab.rounds(5))? {
        measured = measured.with(who, Unit::PerSecond, samples);
    }
    let median = measured.median_of("vmm");
    Ok(Outcome::Measured(
        measured
            .check("guest seconds a second", Unit::PerSecond, median, Bound::AtLeast(50.0))
            .note("the whole process, its start and end included"),
    ))
}

pub(super) fn sleep(lab: &Lab) -> Result<Outcome> {
    let mut slept = [0.0; 2];
    let [without, with] = &mut slept;
    let mut contenders = [("without", WAITS.0, without), ("with", WAITS.1, with)].map(|(who, count, slept)| {
        Contender::new(format!("process {who} it"), move || {
            let cmdline = format!("clockevent=kvm-tsc-deadline scenario=deltas max_ms=275000 count={count}");
            let run = lab.run(&cmdline, "--time virtual")?;
            *slept = number(&run.summary, "/vm_ns")?;
            Ok(run.ended.wall.as_secs_f64() * S)
        })
    });
    let taken = alternate(&mut contenders, 2, lab.rounds(20))?;
    drop(contenders);
    let [without, with] = slept;
    let length = (with - without) / S;
    ensure!((270.0..276.0).contains(&length), "the last wait took {length} s of VM time");
    let mut measured = Measured::default();
    for (who, samples) in taken {
        measured = measured.with(who, Unit::Ns, samples);
    }
    let whole = measured.median_of("process with it");
    let alone = whole.zip(measured.median_of("process without it")).map(|(with, without)| with - without);
    Ok(Outcome::Measured(
        measured
            .check("the sleep alone", Unit::Ns, alone, Bound::AtMost(5.0 * MS))
            .hope("the whole process, with seven other waits", Unit::Ns, whole, Bound::AtMost(5.0 * MS))
            .note(format!("the sleep is {length:.0} s; alone: the difference of a process with it and one without it")),
    ))
}
