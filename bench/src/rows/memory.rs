//! Measures a VMM's resident memory besides its guest's RAM, while the guest makes ticks.

use std::{thread, time::Duration};

use anyhow::Result;

use super::snapshot::{Guest, resident};
use crate::{
    lab::Lab,
    process::Running,
    row::{Bound, Measured, Outcome},
    unit::Unit,
};

const MIB: u32 = 128;
/// The time after which a VMM's start is over.
const SETTLED: Duration = Duration::from_millis(500);

pub(super) fn measure(lab: &Lab) -> Result<Outcome> {
    let mut samples = Vec::new();
    for _ in 0..lab.rounds(3) {
        let guest = Guest::start(lab, MIB, "hz=100", "")?;
        thread::sleep(SETTLED);
        samples.push(guest.resident()?.1 as f64);
    }
    let mut measured = Measured::default().with("vmm", Unit::Bytes, samples);
    let mut notes = Vec::new();
    for peer in &lab.programs.peers {
        // Peers get no command line, so that their guest ends after a hundred ticks, in a second.
        let mut command = peer.boot(&lab.programs.guest, u64::from(MIB), &lab.path("firecracker.json"))?;
        let process = Running::start(&mut command)?;
        thread::sleep(SETTLED);
        match resident(process.id(), u64::from(MIB) << 20) {
            Ok((_, beside)) => measured = measured.with(peer.kind.name(), Unit::Bytes, vec![beside as f64]),
            Err(error) => notes.push(format!("{}: {error:#}", peer.kind.name())),
        }
    }
    let vmm = measured.median_of("vmm");
    measured = measured.check("vmm", Unit::Bytes, vmm, Bound::AtMost(4.0 * 1024.0 * 1024.0));
    measured.notes = notes;
    Ok(Outcome::Measured(measured))
}
