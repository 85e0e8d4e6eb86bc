//! Measures the rate of a sweep's migrations over the default stretch.

use anyhow::{Context, Result};

use crate::{
    lab::Lab,
    process,
    row::{Bound, Measured, Outcome},
    unit::Unit,
};

/// A clockevent that no migration harms, so that exit code 0 shows that the sweep worked.
pub(crate) const CMDLINE: &str = "clockevent=kvm-tsc-deadline conversion=split recheck=on";

pub(super) fn measure(lab: &Lab) -> Result<Outcome> {
    let mut samples = Vec::new();
    let mut parts = String::new();
    for round in 0..=lab.rounds(8) {
        let said = process::succeed(lab.vmm("sweep --json /dev/null --cmdline").arg(CMDLINE))?.stderr;
        let line = said.lines().find(|line| line.contains(" points/s")).context("vmm sweep tells no points/s")?;
        let rate = line.split(" points/s").next().and_then(|before| before.rsplit(' ').next());
        let rate: f64 = rate.and_then(|rate| rate.parse().ok()).with_context(|| line.to_owned())?;
        // The first warms up.
        if round > 0 {
            samples.push(rate);
        }
        parts = line.split_once("; ").map(|(_, parts)| parts.to_owned()).unwrap_or_default();
    }
    let measured = Measured::default().with("vmm", Unit::PerSecond, samples);
    let median = measured.median_of("vmm");
    Ok(Outcome::Measured(
        measured.check("points a second", Unit::PerSecond, median, Bound::AtLeast(1500.0)).note(parts),
    ))
}
