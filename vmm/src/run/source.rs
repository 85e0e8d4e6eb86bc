//! Where the guest's RDTSC gets its value, and which instructions are therefore patched.

use guest_abi::sites::Kind;
use serde::{Deserialize, Serialize};

use super::{RunError, TimeMode, trial::Trial};
use crate::{
    boot::sites::Sites,
    kvm::{Lapics, probe::DeadlineWrite},
    time::Khz,
};

/// What the user asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SourceChoice {
    /// The best that works here.
    #[default]
    Auto,
    /// Exactly this one.
    Fixed(TscSource),
}

/// Where RDTSC answers come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TscSource {
    /// The host's TSC, unchanged.
    Host,
    /// The host's TSC, scaled by KVM.
    Scaled,
    /// The VMM answers, at trap sites.
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

    /// What to choose for a machine that had this source before a migration within the process.
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
pub(super) const SAME_PPM: u64 = 250;

/// A source, and why it.
#[derive(Clone, Debug)]
pub struct Chosen {
    /// The source.
    pub source: TscSource,
    /// One line for people.
    pub why: String,
    /// IA32_TSC_DEADLINE works, one way or another.
    pub tsc_deadline: bool,
    /// Who has the LAPICs, and what that takes.
    pub lapics: Lapics,
    /// The sites to patch.
    pub patched: Sites,
}

/// Whether hardware takes one frequency for the other.
pub(super) fn same(a: Khz, b: Khz) -> bool {
    u64::from(a.get().abs_diff(b.get())) * 1_000_000 <= u64::from(b.get()) * SAME_PPM
}

/// Picks the source for a guest with these trap `sites` that is to see `khz`, on a host that does what `trial` counts on.
///
/// # Errors
/// [`RunError::Usage`] if the guest cannot do it, [`RunError::HostLacks`] if the host cannot.
pub(super) fn choose(
    trial: &Trial<'_>,
    sites: &Sites,
    choice: SourceChoice,
    time: TimeMode,
    khz: Khz,
    cpus: u32,
    guest: &str,
) -> Result<Chosen, RunError> {
    let host_khz = trial.env.clock.khz();
    let trappable = sites.has(Kind::Rdtsc);
    let need_sites = |what: &str| {
        RunError::Usage(format!(
            "{what} needs a guest with trap sites, and {guest} has none (ELF section {}); use --time real --tsc host, or \
             the embedded guest",
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
            host_works(trial, khz)?;
            (TscSource::Host, "asked for".to_owned())
        }
        (SourceChoice::Fixed(TscSource::Scaled), _) => {
            if !trial.env.scales_to(khz)? {
                return Err(RunError::HostLacks(format!(
                    "--tsc scaled: a probe guest's TSC did not run at {khz} on this host; use --tsc trapped"
                )));
            }
            (TscSource::Scaled, "asked for, and a probe saw it work".to_owned())
        }
        (SourceChoice::Auto, TimeMode::Real) => auto(trial, trappable, khz, guest)?,
    };
    let swallowed = trial.facts.deadline_write == DeadlineWrite::Swallowed;
    if time == TimeMode::Virtual && cpus > 1 && !sites.has(Kind::Pause) {
        return Err(RunError::Usage(format!(
            "--time virtual with several vCPUs needs a guest that lists its PAUSE sites, and {guest} lists none: one vCPU's \
             spin loop would never let the others run; use --cpus 1 or --time real"
        )));
    }
    let yields = time == TimeMode::Virtual && cpus > 1;
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
            "; it swallows the TSC deadline and the guest has no deadline sites, so TSC-deadline is hidden (--lapic kvm \
             has it)"
        }
    };
    Ok(Chosen {
        source,
        why: format!("{why} (host {host_khz}, guest {khz}){deadline}"),
        tsc_deadline,
        lapics: Lapics::Ours { mwait_in_guest: trial.facts.deadline_write == DeadlineWrite::ExitsWithMwait },
        patched,
    })
}

fn auto(trial: &Trial<'_>, trappable: bool, khz: Khz, guest: &str) -> Result<(TscSource, String), RunError> {
    let host_khz = trial.env.clock.khz();
    if khz == host_khz && trial.facts.tsc_equals_host {
        return Ok((TscSource::Host, "the guest's frequency is the host's".to_owned()));
    }
    if trappable {
        return Ok((TscSource::Trapped, "another frequency than the host's, and the guest has trap sites".to_owned()));
    }
    if same(khz, host_khz) && trial.facts.tsc_equals_host {
        return Ok((TscSource::Host, format!("the guest's frequency is the host's to {SAME_PPM} ppm")));
    }
    if trial.env.scales_to(khz)? {
        return Ok((TscSource::Scaled, "another frequency than the host's, and a probe saw KVM scale".to_owned()));
    }
    Err(RunError::HostLacks(format!(
        "this host cannot run {guest} at {khz}: its own TSC has {host_khz}, KVM does not scale it (probed), and the guest \
         has no trap sites; use a host with TSC scaling or a guest with trap sites"
    )))
}

fn host_works(trial: &Trial<'_>, khz: Khz) -> Result<(), RunError> {
    let host_khz = trial.env.clock.khz();
    if !same(khz, host_khz) {
        return Err(RunError::HostLacks(format!(
            "--tsc host: the host's TSC has {host_khz}, not {khz}; use --tsc trapped or auto"
        )));
    }
    if !trial.facts.tsc_equals_host {
        return Err(RunError::HostLacks(
            "--tsc host: a probe guest's TSC was not the host's, although an offset of 0 was set; use --tsc trapped"
                .to_owned(),
        ));
    }
    Ok(())
}
