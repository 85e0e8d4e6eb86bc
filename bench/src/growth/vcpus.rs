//! Growth with the number of vCPUs, from one to four.

use anyhow::Result;

use super::{Grown, Plot};
use crate::{
    alternate::{Contender, alternate},
    lab::Lab,
    process::{BANNER, first_byte},
    rows::late,
    unit::Unit,
};

pub(super) fn measure(lab: &Lab) -> Result<Grown> {
    let mut start = Plot::new("vcpus-start", "Process start to the guest's first byte", "vCPUs", "time", Unit::Ns);
    let title = "Lateness of 100 Hz ticks on every vCPU, each with an IPI (scenario=smp)";
    let mut lateness = Plot::new("vcpus-lateness", title, "vCPUs", "lateness, by the guest", Unit::Ns);
    for cpus in 1..=4 {
        let flags = format!("--cpus {cpus}");
        let sample = || Ok(first_byte(&mut lab.guest("scenario=smp", &flags), BANNER)?.as_secs_f64() * 1e9);
        let taken = alternate(&mut [Contender::new("vmm", sample)], 2, lab.rounds(20))?;
        start.step(cpus.to_string(), taken);
        let measured = late(lab, "scenario=smp", &flags, 100, lab.effort(200), lab.rounds(3))?;
        lateness.step(cpus.to_string(), measured.series.into_iter().map(|series| (series.who, series.samples)));
    }
    Ok(Grown::Plots(vec![start, lateness]))
}
