//! Growth with the tick rate, from ten to ten thousand ticks a second.

use anyhow::Result;

use super::{Grown, Plot};
use crate::{
    alternate::{Contender, alternate},
    lab::Lab,
    rows::{LAPICS, exits_per_tick, late},
    unit::Unit,
};

const HZ: [u32; 7] = [10, 50, 100, 500, 1000, 5000, 10_000];
/// The length of a run, at every rate.
const SECONDS: u32 = 2;

pub(super) fn measure(lab: &Lab) -> Result<Grown> {
    let x = "ticks a second";
    let mut lateness =
        Plot::new("ticks-lateness", "Lateness of ticks by their rate", x, "lateness, by the guest", Unit::Ns);
    let mut cpu = Plot::new("ticks-cpu", "CPU time of the process by tick rate", x, "of one CPU", Unit::Share);
    let mut exits =
        Plot::new("ticks-exits", "Exits to user space a tick by tick rate", x, "exits a tick", Unit::PerTick);
    for hz in HZ {
        let count = (hz * SECONDS).max(20);
        let measured = late(lab, "", "", hz, count, lab.rounds(3))?;
        lateness.step(hz.to_string(), measured.series.into_iter().map(|series| (series.who, series.samples)));
        let cmdline = format!("clockevent=kvm-tsc-deadline hz={hz} count={count}");
        let mut contenders = LAPICS.map(|(flag, who)| {
            let cmdline = &cmdline;
            Contender::new(who, move || {
                let run = lab.run(cmdline, flag)?;
                Ok(run.ended.cpu.as_secs_f64() / run.ended.wall.as_secs_f64())
            })
        });
        cpu.step(hz.to_string(), alternate(&mut contenders, 0, lab.rounds(3))?);
        if let Some(samples) = exits_per_tick(lab, hz, count)? {
            exits.step(hz.to_string(), [("vmm, --tsc host".to_owned(), samples)]);
        }
    }
    let mut plots = vec![lateness, cpu];
    plots.extend(Some(exits).filter(|exits| !exits.steps.is_empty()));
    Ok(Grown::Plots(plots))
}
