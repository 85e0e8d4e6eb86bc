//! Growth of a sweep's cost with the length of its stretch.

use anyhow::{Context, Result};
use serde_json::Value;

use super::{Grown, Plot};
use crate::{
    alternate::{Contender, alternate},
    lab::Lab,
    process::succeed,
    rows::SWEEP_CMDLINE,
    unit::Unit,
};

/// Lengths of the stretch, in ticks; it begins at tick 3.
const TICKS: [u32; 5] = [1, 2, 4, 8, 16];

pub(super) fn measure(lab: &Lab) -> Result<Grown> {
    let mut whole = Plot::new("sweep-time", "Time of a sweep by its size", "points × ratios", "time", Unit::Ns);
    let mut each =
        Plot::new("sweep-point", "Time of a point by size of the sweep", "points × ratios", "time", Unit::Ns);
    let json = lab.path("sweep.json");
    for ticks in TICKS {
        let mut points = 0.0;
        let sample = || {
            let mut command = lab.vmm(&format!("sweep --to tick:{} --json", 3 + ticks));
            let ended = succeed(command.arg(&json).arg("--cmdline").arg(SWEEP_CMDLINE))?;
            let found: Value = serde_json::from_slice(&std::fs::read(&json)?)?;
            let count = |at: &str| found.pointer(at).and_then(Value::as_array).map(Vec::len);
            let sizes = count("/points").zip(count("/inputs/ratios")).context("no points in a sweep's JSON")?;
            points = f64::from(u32::try_from(sizes.0.saturating_mul(sizes.1))?);
            Ok(ended.wall.as_secs_f64() * 1e9)
        };
        let taken = alternate(&mut [Contender::new("vmm, two workers", sample)], 1, lab.rounds(4))?;
        let label = format!("{points:.0}");
        let divided =
            taken.iter().map(|(who, samples)| (who.clone(), samples.iter().map(|all| all / points).collect()));
        each.step(label.clone(), divided.collect::<Vec<_>>());
        whole.step(label, taken);
    }
    Ok(Grown::Plots(vec![whole, each]))
}
