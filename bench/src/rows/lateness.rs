//! Measures how late ticks come, by the guest's clock: with the same guest and the same audit for both LAPICs.

use anyhow::Result;

use crate::{
    alternate::{Contender, alternate},
    lab::{Lab, number},
    row::{Bound, Measured, Outcome},
    unit::Unit,
};

/// The LAPICs that are compared: the flag, and the name in the table.
pub(crate) const LAPICS: [(&str, &str); 2] = [("--lapic user", USER), ("--lapic kvm", KVM)];
const USER: &str = "vmm";
const KVM: &str = "--lapic kvm";

/// A percentile of lateness: its name in the table, and in the summary.
const P50: (&str, &str) = ("p50", "/ticks/late_by_guest/p50_ns");
const P99: (&str, &str) = ("p99", "/ticks/late_by_guest/p99_ns");

/// p50 and p99 of the lateness of `count` ticks, `rounds` times each with vmm's LAPIC and with KVM's.
pub(crate) fn late(lab: &Lab, cmdline: &str, flags: &str, hz: u32, count: u32, rounds: usize) -> Result<Measured> {
    let cmdline = format!("clockevent=kvm-tsc-deadline hz={hz} count={count} {cmdline}");
    // One sample is one run. It gives two numbers: p50 is returned, p99 is stored beside it.
    let mut p99 = [(); 2].map(|()| Vec::new());
    let [user, kvm] = &mut p99;
    let mut contenders = [(LAPICS[0], user), (LAPICS[1], kvm)].map(|((flag, who), p99)| {
        let (cmdline, flags) = (&cmdline, format!("{flag} {flags}"));
        Contender::new(who, move || {
            let run = lab.run(cmdline, &flags)?;
            p99.push(number(&run.summary, P99.1)?);
            number(&run.summary, P50.1)
        })
    });
    let taken = alternate(&mut contenders, 1, rounds)?;
    drop(contenders);
    let mut measured = Measured::default();
    for ((who, p50), p99) in taken.into_iter().zip(p99) {
        // The first ones are of the warm-up.
        let p99 = p99.into_iter().skip(1).collect();
        measured =
            measured.with(format!("{who} {}", P50.0), Unit::Ns, p50).with(format!("{who} {}", P99.0), Unit::Ns, p99);
    }
    Ok(measured)
}

/// vmm's lateness divided by KVM's.
fn ratio(measured: &Measured, (name, _): (&str, &str)) -> Option<f64> {
    measured.ratio(&format!("{USER} {name}"), &format!("{KVM} {name}"))
}

fn at_1khz(lab: &Lab, cmdline: &str) -> Result<Measured> {
    late(lab, cmdline, "", 1000, lab.effort(2000), lab.rounds(5))
}

pub(super) fn halted(lab: &Lab) -> Result<Outcome> {
    let measured = at_1khz(lab, "")?;
    let [p50, p99] = [P50, P99].map(|which| ratio(&measured, which));
    Ok(Outcome::Measured(
        measured
            .check("p50 by --lapic kvm's", Unit::Ratio, p50, Bound::AtMost(0.40))
            .hope("p50, stretch", Unit::Ratio, p50, Bound::AtMost(0.20))
            .check("p99 by --lapic kvm's", Unit::Ratio, p99, Bound::AtMost(0.60)),
    ))
}

pub(super) fn busy_user(lab: &Lab) -> Result<Outcome> {
    busy(lab, "load=user")
}

pub(super) fn busy_kernel(lab: &Lab) -> Result<Outcome> {
    busy(lab, "load=kernel")
}

fn busy(lab: &Lab, load: &str) -> Result<Outcome> {
    if !lab.guest_takes(load)? {
        return Ok(Outcome::NotThere(format!("this guest has no {load}")));
    }
    let measured = at_1khz(lab, load)?;
    let p50 = ratio(&measured, P50);
    Ok(Outcome::Measured(measured.check("p50 by --lapic kvm's", Unit::Ratio, p50, Bound::AtMost(0.80))))
}
