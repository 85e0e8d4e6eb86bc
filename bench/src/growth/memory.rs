//! Growth with guest RAM, from 16 MiB to 4 GiB. The guest touches the same part of it.

use std::fs;

use anyhow::Result;

use super::{Grown, Plot};
use crate::{
    alternate::{Contender, alternate},
    lab::Lab,
    process::{BANNER, first_byte},
    rows::{SnapshotGuest, save_in_mid_banner},
    unit::Unit,
};

const MIB: [u32; 6] = [16, 64, 256, 1024, 2048, 4096];

pub(super) fn measure(lab: &Lab) -> Result<Grown> {
    let title = "Start, restore and full snapshot by guest RAM, of which 4 MiB are touched for the snapshot";
    let mut plot = Plot::new("memory", title, "guest RAM, MiB", "time", Unit::Ns);
    for mib in MIB {
        let saved = save_in_mid_banner(lab, mib)?;
        let flags = format!("--memory {mib}M");
        let mut taken = alternate(
            &mut [
                Contender::new("start", || Ok(first_byte(&mut lab.guest("", &flags), BANNER)?.as_secs_f64() * 1e9)),
                Contender::new("restore", || Ok(first_byte(&mut saved.by_vmm(lab), "")?.as_secs_f64() * 1e9)),
            ],
            2,
            lab.rounds(12),
        )?;
        // Measured separately: it needs a VM that keeps running.
        let mut guest = SnapshotGuest::start(lab, mib, "hz=100", "")?;
        let snapshot = Contender::new("full snapshot", || {
            let (took, dir) = guest.snapshot(None)?;
            fs::remove_dir_all(dir)?;
            Ok(took)
        });
        taken.extend(alternate(&mut [snapshot], 2, lab.rounds(12))?);
        plot.step(mib.to_string(), taken);
    }
    Ok(Grown::Plots(vec![plot]))
}
