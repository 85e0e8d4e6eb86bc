//! Measures a restore: from the start of the process to the next byte of a guest that was saved while it printed.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Result, bail};

use super::start::{FLOOR, VMM, timed};
use crate::{
    alternate::alternate,
    lab::Lab,
    process,
    row::{Bound, Measured, Outcome},
    unit::Unit,
};

/// Where a guest is saved: inside a string of its first line, so that printing the next byte is all it does. Elsewhere
/// it first formats a number or polls the serial port, which takes longer than some of the restores that are measured.
const LEAST_BYTES: usize = 35;
const MOST_BYTES: usize = 44;
/// Bytes that the floor prints before it saves, so that it saves in the same place.
const FLOOR_BYTES: &str = "40";

/// A VM, saved while it printed.
#[derive(Debug)]
pub(crate) struct Saved {
    /// Saved by `vmm`.
    pub vmm: PathBuf,
    /// Saved by the floor.
    pub floor: PathBuf,
    mib: u32,
}

/// Saves a VM with `mib` MiB by `vmm` and by the floor, both while the guest prints its first lines.
pub(crate) fn save_in_mid_banner(lab: &Lab, mib: u32) -> Result<Saved> {
    let saved = Saved { vmm: lab.path(&format!("saved-{mib}")), floor: lab.path(&format!("floor-{mib}")), mib };
    let mut floor = Command::new(&lab.programs.floor);
    floor.arg("save").arg(&lab.programs.guest).args([&mib.to_string(), FLOOR_BYTES]).arg(&saved.floor);
    process::succeed(&mut floor)?;
    let (mut earliest, mut latest) = (0_u32, 20_000_u32);
    // The guest prints for a millisecond or more: a binary search in 20 ms finds that. If noise spoils it, it is
    // repeated.
    for _ in 0..60 {
        let micros = earliest.midpoint(latest).max(1);
        let _ = fs::remove_dir_all(&saved.vmm);
        let mut vmm = lab.guest("", &format!("--memory {mib}M --save-at {micros}us"));
        let ended = process::succeed(vmm.arg("--save-to").arg(&saved.vmm))?;
        match ended.stdout.len() {
            bytes if bytes < LEAST_BYTES => earliest = micros,
            bytes if bytes > MOST_BYTES => latest = micros,
            _ => return Ok(saved),
        }
        if latest - earliest < 50 {
            (earliest, latest) = (earliest.saturating_sub(1000), latest + 1000);
        }
    }
    bail!("no instant was found at which the guest prints")
}

impl Saved {
    /// The command that restores with `vmm`.
    pub(crate) fn by_vmm(&self, lab: &Lab) -> Command {
        let mut vmm = lab.vmm("restore");
        vmm.arg(&self.vmm);
        vmm
    }

    /// The command that restores with the floor.
    pub(crate) fn by_floor(&self, lab: &Lab) -> Command {
        let mut floor = Command::new(&lab.programs.floor);
        floor.arg("restore").arg(&self.floor).args([self.mib.to_string(), "1".to_owned()]);
        floor
    }
}

impl Drop for Saved {
    fn drop(&mut self) {
        let remove = |dir: &Path| fs::remove_dir_all(dir);
        let _ = (remove(&self.vmm), remove(&self.floor));
    }
}

pub(super) fn measure(lab: &Lab) -> Result<Outcome> {
    let small = save_in_mid_banner(lab, 128)?;
    let large = save_in_mid_banner(lab, 4096)?;
    let [vmm_small, vmm_large, floor_small, floor_large, beside_large] = [
        format!("{VMM} 128 MiB"),
        format!("{VMM} 4 GiB"),
        format!("{FLOOR} 128 MiB"),
        format!("{FLOOR} 4 GiB"),
        format!("{VMM} 128 MiB, beside 4 GiB"),
    ];
    let mut measured = Measured::default();
    // In groups of two and three: after a process with 4 GiB ends, the next process is slowed by the kernel's clean-up,
    // and gets memory that is still in the caches. No text is required: the guest goes on in the middle of a line.
    let mut pair =
        [timed(&vmm_small, "", || Ok(small.by_vmm(lab))), timed(&floor_small, "", || Ok(small.by_floor(lab)))];
    let mut three = [
        timed(&beside_large, "", || Ok(small.by_vmm(lab))),
        timed(&vmm_large, "", || Ok(large.by_vmm(lab))),
        timed(&floor_large, "", || Ok(large.by_floor(lab))),
    ];
    for contenders in [pair.as_mut_slice(), three.as_mut_slice()] {
        for (who, samples) in alternate(contenders, 3, lab.rounds(200))? {
            measured = measured.with(who, Unit::Ns, samples);
        }
    }
    let by_floor = measured.ratio(&vmm_small, &floor_small);
    let by_small = measured.ratio(&vmm_large, &beside_large);
    Ok(Outcome::Measured(measured.check("128 MiB, by the floor's", Unit::Ratio, by_floor, Bound::AtMost(1.5)).check(
        "4 GiB, by 128 MiB's",
        Unit::Ratio,
        by_small,
        Bound::AtMost(1.2),
    )))
}
