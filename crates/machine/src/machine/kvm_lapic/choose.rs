//! Chooses the TSC source and the CPUID of a machine with KVM's LAPICs.

use guest_abi::pvclock;
use vmtime::Khz;

use crate::{
    boot::{
        cpuid::{self, Offer},
        sites::Sites,
    },
    kvm::Lapics,
    machine::{
        config::{
            BootOptions, HostEnvironment, TimeMode,
            source::{Chosen, SourceChoice, TscSource, host_why, why_not_host, within_tolerance},
        },
        error::RunError,
        paused::StoppedTsc,
        state::KvmCpuState,
    },
    x86::Leaf,
};

/// The features of kvmclock, of which KVM must offer at least one: the two pairs of MSRs.
const KVMCLOCK: u32 = pvclock::FEATURE_CLOCKSOURCE | pvclock::FEATURE_CLOCKSOURCE2;

/// Picks the TSC source for a guest that is to see `khz` and, unless it is to boot, continues the TSC `stopped`.
///
/// # Errors
/// [`RunError::Usage`] for what KVM's LAPIC excludes, [`RunError::HostLacks`] if the host cannot do it.
pub fn choose(
    env: &HostEnvironment,
    choice: SourceChoice,
    time: TimeMode,
    khz: Khz,
    stopped: Option<StoppedTsc>,
    guest: &str,
) -> Result<Chosen, RunError> {
    let excluded = |what: &str| {
        RunError::Usage(format!(
            "{what} needs the guest's instructions trapped, which KVM's LAPIC does not allow: HLT does not exit; boot \
             with --lapic user"
        ))
    };
    if time == TimeMode::Virtual {
        return Err(excluded("--time virtual"));
    }
    if choice == SourceChoice::Fixed(TscSource::Trapped) {
        return Err(excluded("--tsc trapped"));
    }
    if env.emulated.is_some() {
        return Err(RunError::Usage(
            "--emulate-host is about exits that do not come with KVM's LAPIC; boot with --lapic user".to_owned(),
        ));
    }
    if !env.host.has_kernel_lapic() || features(env.supported()?) & KVMCLOCK == 0 {
        return Err(RunError::HostLacks(
            "--lapic kvm: this host's KVM lacks a capability for it, or kvmclock (see vmm doctor); use --lapic user"
                .to_owned(),
        ));
    }
    let clock = env.clock.as_it_is();
    let host_khz = clock.khz();
    let facts = env.facts()?;
    let host = within_tolerance(khz, host_khz) && facts.tsc_equals_host;
    let another_counter = why_not_host(clock, stopped, || Ok::<_, RunError>(facts.tsc_offset))?;
    if let Some(why) = another_counter {
        return Err(RunError::HostLacks(format!(
            "--lapic kvm: this host cannot go on with {guest}: {why}; use a host whose KVM does (vmm doctor says)"
        )));
    }
    let (source, why) = match choice {
        SourceChoice::Auto | SourceChoice::Fixed(TscSource::Host) if host => (TscSource::Host, host_why(khz, host_khz)),
        SourceChoice::Auto | SourceChoice::Fixed(TscSource::Scaled) if env.scales_to(khz)? => {
            (TscSource::Scaled, "a probe saw KVM scale".to_owned())
        }
        _ => {
            let tsc = if choice == SourceChoice::Fixed(TscSource::Host) {
                "--tsc host was asked for"
            } else {
                "KVM does not scale it (probed)"
            };
            return Err(RunError::HostLacks(format!(
                "--lapic kvm: {guest} cannot have a TSC of {khz} here: the host's has {host_khz}, {tsc}, and with \
                 KVM's LAPIC it cannot be trapped; use a host with TSC scaling, or boot a guest that has trap sites \
                 with --lapic user"
            )));
        }
    };
    Ok(Chosen {
        source,
        why: format!("{why} (host {host_khz}, guest {khz}); LAPIC and kvmclock are KVM's"),
        tsc_deadline: true,
        lapics: Lapics::InKernel { tsc_moves: facts.tsc_offset },
        patched: Sites::default(),
    })
}

/// The paravirtual features that KVM has.
fn features(supported: &[Leaf]) -> u32 {
    supported.iter().find(|leaf| leaf.function == pvclock::CPUID_FEATURES_LEAF).map_or(0, |leaf| leaf.eax)
}

/// The features that the guest's CPUs have: what KVM emulates. There is no nanosecond deadline.
pub fn offer(supported: &[Leaf], chosen: &Chosen, options: &BootOptions, khz: Khz) -> Offer {
    Offer {
        x2apic: options.x2apic,
        tsc_deadline: chosen.tsc_deadline,
        ns_deadline: false,
        // KVM has no ioctl that returns whether an EOI is outstanding, so a snapshot could not hold it.
        pv_eoi: false,
        steal_time: false,
        vmclock: options.vmclock,
        tsc_adjust: chosen.lapics == Lapics::InKernel { tsc_moves: true } && cpuid::has_tsc_adjust(supported),
        tsc_khz: khz,
        cpus: options.cpus,
    }
}

/// The leaves that vCPU number `apic_id` sees: of the paravirtual features only those that KVM has.
pub(crate) fn leaves(supported: &[Leaf], offer: &Offer, apic_id: u32) -> Vec<Leaf> {
    let mut leaves = cpuid::leaves(supported, offer, apic_id);
    for leaf in leaves.iter_mut().filter(|leaf| leaf.function == pvclock::CPUID_FEATURES_LEAF) {
        leaf.eax &= features(supported);
    }
    leaves
}

/// Checks that this host has every feature that the guest saw.
pub fn check_features(env: &HostEnvironment, cpu: &KvmCpuState, chosen: &Chosen) -> Result<(), RunError> {
    let mut missing = cpuid::missing(&cpu.cpuid, env.supported()?);
    if cpuid::has_tsc_adjust(&cpu.cpuid) && chosen.lapics != (Lapics::InKernel { tsc_moves: true }) {
        missing.push("tsc_adjust (this host does not move a guest's TSC)".to_owned());
    }
    if features(&cpu.cpuid) & !features(env.supported()?) != 0 {
        missing.push("kvmclock as the guest saw it".to_owned());
    }
    if missing.is_empty() { Ok(()) } else { Err(RunError::MissingFeatures(missing)) }
}
