//! Where the guest's RDTSC gets its value, and which instructions are therefore patched.

use std::time::Duration;

use guest_abi::sites::Kind;
use serde::{Deserialize, Serialize};
use vmtime::{HostTsc, Khz};

use super::{TimeMode, first_vm_probe::FirstVmProbe};
use crate::{
    boot::sites::Sites,
    host::clock::HostClock,
    kvm::{Lapics, probe::DeadlineWrite},
    machine::{error::RunError, paused::StoppedTsc},
};

/// The user's choice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SourceChoice {
    /// The best that works here.
    #[default]
    Auto,
    /// Exactly this one.
    Fixed(TscSource),
}

/// The source of the values that the guest's RDTSC returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TscSource {
    /// The host's TSC, unchanged.
    Host,
    /// The host's TSC, scaled by KVM.
    Scaled,
    /// The VMM emulates RDTSC, at trap sites.
    Trapped,
}

impl TscSource {
    /// As on the command line.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Scaled => "scaled",
            Self::Trapped => "trapped",
        }
    }

    /// The choice for a machine that had this source before a migration within the process.
    #[must_use]
    pub const fn choice_after(self) -> SourceChoice {
        match self {
            // Already trapped: a frequency that happens to be the host's is no reason to change the source.
            Self::Trapped => SourceChoice::Fixed(Self::Trapped),
            Self::Host | Self::Scaled => SourceChoice::Auto,
        }
    }
}

/// Frequencies this close count as the same for hardware, in parts per million (QEMU, Firecracker and libvirt do so).
pub(crate) const TOLERANCE_PPM: u64 = 250;

/// A source, and the reason for it.
#[derive(Clone, Debug)]
pub struct Chosen {
    /// The source.
    pub source: TscSource,
    /// The reason, as one line of text.
    pub why: String,
    /// IA32_TSC_DEADLINE works, one way or another.
    pub tsc_deadline: bool,
    /// Whether the VMM or KVM emulates the LAPICs, and how KVM is set up for that.
    pub lapics: Lapics,
    /// The sites to patch.
    pub patched: Sites,
}

/// Whether the two frequencies count as the same for hardware.
pub(crate) fn within_tolerance(a: Khz, b: Khz) -> bool {
    u64::from(a.get().abs_diff(b.get())) * 1_000_000 <= u64::from(b.get()) * TOLERANCE_PPM
}

/// How far the host's TSC and the clock that measured the time since a stop may disagree if the guest's TSC is to count
/// as one that counted on. Between two processes that clock is the wall clock, which may have been set. One part in
/// [`SLEW_PART`] is added, because NTP slews clocks by up to 500 ppm, and KVM's value of the TSC's frequency may be as
/// wrong.
const SAME_COUNTER: Duration = Duration::from_secs(1);
const SLEW_PART: u32 = 1000;

/// Whether the host's TSC now has the value that the guest's TSC would have if it had counted on since the stop. That
/// is so if the guest was stopped on this same boot of this host, and had the host's TSC.
fn host_tsc_counted_on(host: HostClock, stopped: StoppedTsc) -> bool {
    let StoppedTsc { tsc, ago } = stopped;
    let (then, now) = (HostTsc(tsc.0), host.tsc());
    now >= then && host.duration(then, now).abs_diff(ago) <= SAME_COUNTER.saturating_add(ago / SLEW_PART)
}

/// Why a guest whose TSC is to be continued cannot continue with the host's: its TSC would jump ahead or back. None if
/// it can: before its first start, because the host's TSC counted on since, or because KVM moves it by an offset
/// (`offset_works`).
///
/// # Errors
/// Those of `offset_works`.
pub(crate) fn why_not_host<E>(
    host: HostClock,
    stopped: Option<StoppedTsc>,
    offset_works: impl FnOnce() -> Result<bool, E>,
) -> Result<Option<String>, E> {
    let Some(stopped) = stopped.filter(|stopped| !host_tsc_counted_on(host, *stopped)) else { return Ok(None) };
    if offset_works()? {
        return Ok(None);
    }
    Ok(Some(format!(
        "the guest's TSC stopped at {} and the host's is at {}, which is another counter (the host was booted since, \
         or it is another host), and KVM does not move a guest's TSC here (probed)",
        stopped.tsc.0,
        host.tsc().0
    )))
}

/// The facts about a guest on which the choice of the source depends.
#[derive(Clone, Copy)]
pub(crate) struct Guest<'a> {
    /// The name of its image, for messages.
    pub name: &'a str,
    /// Its trap sites.
    pub sites: &'a Sites,
    /// Its vCPUs.
    pub cpus: u32,
    /// Its TSC at the stop, if that is to be continued.
    pub stopped: Option<StoppedTsc>,
}

/// Picks the source for `guest`, which is to see `khz`, on a host with the facts of `probe`.
///
/// # Errors
/// [`RunError::Usage`] if the guest does not allow the choice, [`RunError::HostLacks`] if the host does not.
pub(crate) fn choose(
    probe: &FirstVmProbe<'_>,
    guest: Guest<'_>,
    choice: SourceChoice,
    time: TimeMode,
    khz: Khz,
) -> Result<Chosen, RunError> {
    let Guest { name, sites, cpus, stopped } = guest;
    let host_khz = probe.env.clock.khz();
    let trappable = sites.has(Kind::Rdtsc);
    let need_sites = |what: &str| {
        RunError::Usage(format!(
            "{what} needs a guest with trap sites, and {name} lists none (ELF section {}); use --sites auto to find \
             them in its code, or --time real --tsc host",
            guest_abi::sites::SECTION
        ))
    };
    let (source, why) = match (choice, time) {
        (_, TimeMode::Virtual) if !trappable => return Err(need_sites("--time virtual")),
        (SourceChoice::Fixed(source @ (TscSource::Host | TscSource::Scaled)), TimeMode::Virtual) => {
            return Err(RunError::Usage(format!(
                "--time virtual answers every RDTSC itself: --tsc {} contradicts it; use --tsc trapped or auto",
                source.as_str()
            )));
        }
        (_, TimeMode::Virtual) => (TscSource::Trapped, "virtual time answers every RDTSC at its trap site".to_owned()),
        (SourceChoice::Fixed(TscSource::Trapped), _) if !trappable => return Err(need_sites("--tsc trapped")),
        (SourceChoice::Fixed(TscSource::Trapped), _) => (TscSource::Trapped, "asked for, or trapped before".to_owned()),
        (SourceChoice::Fixed(TscSource::Host), _) => {
            check_host_source(probe, khz, stopped)?;
            (TscSource::Host, format!("asked for, and {}", host_why(khz, host_khz)))
        }
        (SourceChoice::Fixed(TscSource::Scaled), _) => {
            if !probe.env.scales_to(khz)? {
                return Err(RunError::HostLacks(format!(
                    "--tsc scaled: a probe guest's TSC did not run at {khz} on this host; use --tsc trapped"
                )));
            }
            if stopped.is_some() && !probe.tsc_offset()? {
                return Err(RunError::HostLacks(
                    "--tsc scaled: KVM does not move a guest's TSC by an offset here (probed), so that the saved TSC \
                     cannot be continued; use --tsc trapped"
                        .to_owned(),
                ));
            }
            (TscSource::Scaled, "asked for, and a probe saw it work".to_owned())
        }
        (SourceChoice::Auto, TimeMode::Real) => auto(probe, trappable, khz, stopped, name)?,
    };
    let swallowed = probe.facts.deadline_write == DeadlineWrite::Swallowed;
    if time == TimeMode::Virtual && cpus > 1 && !sites.has(Kind::Pause) {
        return Err(RunError::Usage(format!(
            "--time virtual with several vCPUs needs a guest that lists its PAUSE sites, and {name} lists none: one \
             vCPU's spin loop would never let the others run; use --cpus 1 or --time real"
        )));
    }
    // A found PAUSE moves virtual time also on one CPU: its loop can wait for a time, not only for another CPU.
    let yields = time == TimeMode::Virtual && (cpus > 1 || sites.are_found());
    let patched = match source {
        TscSource::Trapped => sites.only(|kind| kind != Kind::Pause || yields),
        _ if swallowed => sites.only(|kind| kind == Kind::DeadlineWrmsr),
        _ => Sites::default(),
    };
    let tsc_deadline = !swallowed || patched.has(Kind::DeadlineWrmsr);
    let deadline = match (swallowed, tsc_deadline) {
        (false, _) => "",
        (true, true) => "; it swallows the TSC deadline, so the guest's deadline sites are patched",
        (true, false) => {
            "; it swallows the TSC deadline and the guest has no deadline sites, so TSC-deadline is hidden (--lapic \
             kvm has it)"
        }
    };
    Ok(Chosen {
        source,
        why: format!("{why} (host {host_khz}, guest {khz}){deadline}"),
        tsc_deadline,
        lapics: Lapics::UserSpace { mwait_in_guest: probe.facts.deadline_write == DeadlineWrite::ExitsWithMwait },
        patched,
    })
}

fn auto(
    probe: &FirstVmProbe<'_>,
    trappable: bool,
    khz: Khz,
    stopped: Option<StoppedTsc>,
    guest: &str,
) -> Result<(TscSource, String), RunError> {
    let host_khz = probe.env.clock.khz();
    // With trap sites the frequency can be exact. Without them it may differ by the hardware's tolerance.
    let host = probe.facts.tsc_equals_host && if trappable { khz == host_khz } else { within_tolerance(khz, host_khz) };
    let another_counter = if host { why_not_host(probe.env.clock, stopped, || probe.tsc_offset())? } else { None };
    let other =
        if khz == host_khz { "a guest's TSC is not the host's here" } else { "another frequency than the host's" };
    match (host, &another_counter) {
        (true, None) => return Ok((TscSource::Host, host_why(khz, host_khz))),
        (true, Some(why)) if trappable => return Ok((TscSource::Trapped, why.clone())),
        (false, _) if trappable => return Ok((TscSource::Trapped, format!("{other}, and the guest has trap sites"))),
        _ => {}
    }
    if probe.env.scales_to(khz)? && (stopped.is_none() || probe.tsc_offset()?) {
        return Ok((TscSource::Scaled, format!("{other}, and a probe saw KVM scale")));
    }
    if let Some(why) = another_counter {
        return Err(RunError::HostLacks(format!(
            "this host cannot go on with {guest}: {why}, and the guest has no trap sites; use a host whose KVM moves \
             a guest's TSC (vmm doctor says), or a guest with trap sites"
        )));
    }
    Err(RunError::HostLacks(format!(
        "this host cannot run {guest} at {khz}: its own TSC has {host_khz}, KVM does not scale it (probed), and the \
         guest has no trap sites; use a host with TSC scaling or a guest with trap sites"
    )))
}

/// Why a guest that is to see `khz` can have the host's TSC.
pub(crate) fn host_why(khz: Khz, host_khz: Khz) -> String {
    if khz == host_khz {
        "the guest's frequency is the host's".to_owned()
    } else {
        format!("the host's frequency is within {TOLERANCE_PPM} ppm of the guest's")
    }
}

fn check_host_source(probe: &FirstVmProbe<'_>, khz: Khz, stopped: Option<StoppedTsc>) -> Result<(), RunError> {
    let host_khz = probe.env.clock.khz();
    if !within_tolerance(khz, host_khz) {
        return Err(RunError::HostLacks(format!(
            "--tsc host: the host's TSC has {host_khz}, not {khz}; use --tsc trapped or auto"
        )));
    }
    if !probe.facts.tsc_equals_host {
        return Err(RunError::HostLacks(
            "--tsc host: a probe guest's TSC was not the host's, although an offset of 0 was set; use --tsc trapped"
                .to_owned(),
        ));
    }
    match why_not_host(probe.env.clock, stopped, || probe.tsc_offset())? {
        None => Ok(()),
        Some(why) => Err(RunError::HostLacks(format!("--tsc host: {why}; use --tsc trapped or auto"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_approximated_frequency_is_not_announced_as_the_hosts() {
        let [host, near, far] = [2_000_000, 2_000_500, 2_000_501].map(|khz| Khz::new(khz).unwrap());
        assert_eq!(host_why(host, host), "the guest's frequency is the host's");
        assert!(within_tolerance(near, host) && !within_tolerance(far, host));
        assert_eq!(host_why(near, host), "the host's frequency is within 250 ppm of the guest's");
    }
}
