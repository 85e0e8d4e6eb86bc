//! Measures the start: from the start of a process to the guest's first byte on its standard output.

use std::process::Command;

use anyhow::Result;

use crate::{
    alternate::{Contender, alternate},
    lab::Lab,
    process::{BANNER, first_byte},
    row::{Bound, Measured, Outcome},
    unit::Unit,
};

pub(super) const VMM: &str = "vmm";
pub(super) const FLOOR: &str = "floor";

pub(super) fn measure(lab: &Lab) -> Result<Outcome> {
    let mib = 128;
    let config = lab.path("firecracker.json");
    let mut contenders = vec![
        timed(VMM, BANNER, move || Ok(lab.guest("", "--memory 128M"))),
        timed(FLOOR, BANNER, move || {
            let mut floor = Command::new(&lab.programs.floor);
            let bytes = BANNER.len().to_string();
            floor.arg("run").arg(&lab.programs.guest).args([mib.to_string(), bytes]);
            Ok(floor)
        }),
    ];
    for peer in &lab.programs.peers {
        let config = &config;
        contenders.push(timed(peer.kind.name(), BANNER, move || peer.boot(&lab.programs.guest, mib, config)));
    }
    let mut measured = Measured::default();
    for (who, samples) in alternate(&mut contenders, 3, lab.rounds(40))? {
        measured = measured.with(who, Unit::Ns, samples);
    }
    let floor = measured.ratio(VMM, FLOOR);
    let peers = lab.programs.peers.iter().map(|peer| peer.kind.name());
    let fastest = peers.filter_map(|who| measured.ratio(VMM, who)).max_by(f64::total_cmp);
    let measured = measured.check("by the floor's", Unit::Ratio, floor, Bound::AtMost(1.3));
    Ok(Outcome::Measured(match fastest {
        Some(ratio) => measured.check("by the fastest peer's", Unit::Ratio, Some(ratio), Bound::AtMost(1.0)),
        None => measured.note("no other VMM is here to be compared with"),
    }))
}

/// A contender whose sample is the time to the first byte of the program that `command` returns. Its output must begin
/// with `text`.
pub(super) fn timed<'a>(who: &str, text: &'a str, command: impl Fn() -> Result<Command> + 'a) -> Contender<'a> {
    Contender::new(who, move || Ok(first_byte(&mut command()?, text)?.as_secs_f64() * 1e9))
}
