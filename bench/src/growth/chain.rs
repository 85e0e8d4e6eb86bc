//! Growth with the length of a chain of incremental snapshots.

use std::{thread, time::Duration};

use anyhow::Result;

use super::{Grown, Plot};
use crate::{
    alternate::{Contender, alternate},
    lab::Lab,
    process::first_remark,
    rows::{SnapshotGuest, lacks_incremental},
    unit::Unit,
};

/// Lengths of the chain at which a restore is timed.
const LENGTHS: [usize; 5] = [0, 1, 4, 8, 16];

pub(super) fn measure(lab: &Lab) -> Result<Grown> {
    if let Some(why) = lacks_incremental(lab)? {
        return Ok(Grown::NotThere(why));
    }
    let title = "Restore by number of incremental snapshots on top of a full one, 64 pages each";
    let mut plot =
        Plot::new("chain", title, "incremental snapshots", "process start to a machine about to run", Unit::Ns);
    let mut guest = SnapshotGuest::start_dirty(lab)?;
    let (_, mut last) = guest.snapshot(None)?;
    let mut length = 0;
    for wanted in LENGTHS {
        while length < wanted {
            thread::sleep(Duration::from_millis(50));
            (_, last) = guest.snapshot(Some(&last))?;
            length += 1;
        }
        let sample = || Ok(first_remark(lab.vmm("restore").arg(&last))?.as_secs_f64() * 1e9);
        plot.step(wanted.to_string(), alternate(&mut [Contender::new("vmm", sample)], 2, lab.rounds(12))?);
    }
    Ok(Grown::Plots(vec![plot]))
}
