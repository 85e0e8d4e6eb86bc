//! The configuration of a machine, and the facts about the host that it depends on.

pub(crate) mod changed_cpuid;
pub mod first_vm_probe;
pub mod host_fingerprint;
pub mod source;
pub mod user_syscall;

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use vmtime::Khz;

use self::{
    host_fingerprint::{FactsState, HostFingerprint},
    source::SourceChoice,
    user_syscall::UserSyscallProbe,
};
use super::error::RunError;
use crate::{
    boot::{cpuid, cpuid_changes::CpuidChanges},
    host::{clock::HostClock, tsc::read_tsc},
    kvm::{
        self, Host, HostFacts,
        probe::{DeadlineWrite, Step},
    },
    x86::Leaf,
};

/// How time passes for the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TimeMode {
    /// With the host's clock.
    #[default]
    Real,
    /// By a fixed amount per guest operation; in HLT, VM time advances to the next deadline at once. Needs trap sites.
    Virtual,
}

impl TimeMode {
    /// As on the command line.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Real => "real",
            Self::Virtual => "virtual",
        }
    }
}

/// The emulator of the local APICs and of kvmclock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LapicKind {
    /// The VMM, in user space.
    #[default]
    User,
    /// KVM.
    Kvm,
}

/// How to boot.
#[derive(Clone, Debug)]
pub struct BootOptions {
    /// Guest RAM, in bytes.
    pub memory: u64,
    /// The guest's command line.
    pub cmdline: String,
    /// An initial RAM disk.
    pub initrd: Option<Vec<u8>>,
    /// Whether the VMM or KVM emulates the local APICs.
    pub lapic: LapicKind,
    /// How time passes.
    pub time: TimeMode,
    /// The source of the values that the guest's RDTSC returns.
    pub source: SourceChoice,
    /// The guest's TSC frequency; the host's if none.
    pub khz: Option<Khz>,
    /// Number of vCPUs.
    pub cpus: u32,
    /// Virtual time: the seed of the order in which vCPUs run.
    pub seed: u64,
    /// Features that the guest's CPUID is not to have, or must have.
    pub cpuid: CpuidChanges,
    /// False hides x2APIC even where it works.
    pub x2apic: bool,
    /// False hides paravirtual EOI. KVM's LAPIC never has it here.
    pub pv_eoi: bool,
    /// Whether the guest has a VMClock page.
    pub vmclock: bool,
    /// Whether the guest has ACPI tables.
    pub acpi: AcpiTables,
}

/// Whether a guest has ACPI tables.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AcpiTables {
    /// All guests, except those with a tick ring: such a guest is written for this VMM and finds what there is without.
    /// But those have them too if they have VMClock.
    #[default]
    Auto,
    /// It has.
    On,
    /// It has not.
    Off,
}

impl AcpiTables {
    /// Whether a guest with or without a tick ring and VMClock has them.
    #[must_use]
    pub const fn exist(self, has_ring: bool, vmclock: bool) -> bool {
        match self {
            Self::Auto => !has_ring || vmclock,
            Self::On => true,
            Self::Off => false,
        }
    }
}

/// A host to emulate, so that the workaround for its peculiarity can be tested anywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EmulatedHost {
    /// KVM swallows WRMSR IA32_TSC_DEADLINE, as stock kernels from 6.18 on do without an in-kernel LAPIC.
    SwallowDeadline,
    /// A single step over STI also runs the instruction after it, as some emulated CPUs do.
    CoarseStep,
    /// The CPU has no XSAVE, and so KVM no KVM_CAP_XCRS.
    NoXsave,
}

/// The default of `--poll-ns`: that of KVM's `halt_poll_ns`.
pub const POLL: Duration = Duration::from_micros(200);

/// An environment variable with a TSC frequency in kHz that the VMM assumes for this host, so that tests find results
/// that depend on the frequency. VM time then runs at the wrong rate. It has no effect on KVM's own LAPIC and kvmclock,
/// and so none on machines that use them.
const TAKE_FOR: &str = "VMM_TEST_HOST_KHZ";

fn taken_for(clock: HostClock) -> Result<HostClock, RunError> {
    let Some(wanted) = std::env::var_os(TAKE_FOR) else { return Ok(clock) };
    let khz = wanted.to_str().and_then(|text| text.parse().ok()).and_then(|khz| Khz::new(khz).ok());
    let khz =
        khz.ok_or_else(|| RunError::Usage(format!("{TAKE_FOR}={} is no TSC frequency in kHz", wanted.display())))?;
    Ok(clock.taken_for(khz))
}

/// The default of `--spin-limit`: longer than a guest that does not spin takes between two operations, on all but very
/// busy hosts.
pub const SPIN_LIMIT: Duration = Duration::from_secs(10);

/// The host: `/dev/kvm`, and the results of probes, each of which runs at most once.
pub struct HostEnvironment {
    /// `/dev/kvm`.
    pub host: Arc<Host>,
    /// The host's clock.
    pub clock: HostClock,
    /// How long a vCPU's thread may poll for a deadline that is near, instead of sleeping: see `--poll-ns`.
    pub poll: Duration,
    /// Virtual time: how long a guest may run without an operation before it is ended; none = without limit. Host time.
    pub spin_limit: Option<Duration>,
    /// The host that it emulates.
    pub emulated: Option<EmulatedHost>,
    /// The results of the probes; empty until they are needed, as are the next three.
    facts: OnceLock<HostFacts>,
    /// CPUID leaves that KVM supports.
    supported: OnceLock<Vec<Leaf>>,
    /// MSRs with state.
    msrs: OnceLock<Vec<u32>>,
    /// What KVM does with SYSCALL in user mode.
    pub user_syscall: Arc<UserSyscallProbe>,
    /// How single-stepping works.
    step: OnceLock<Step>,
    /// The features among those leaves, from a snapshot of this same boot.
    saved_features: OnceLock<Vec<Leaf>>,
}

impl HostEnvironment {
    /// Opens this host.
    ///
    /// # Errors
    /// [`RunError::Kvm`]: this host offers no usable KVM.
    pub fn open(emulated: Option<EmulatedHost>) -> Result<Self, RunError> {
        let mut host = Host::open()?;
        if emulated == Some(EmulatedHost::NoXsave) {
            host.hide_xsave();
        }
        let khz = host.tsc_khz()?;
        let khz = Khz::new(u64::from(khz)).map_err(|_| RunError::HostTsc(khz))?;
        let clock = taken_for(HostClock::new(read_tsc, khz))?;
        let host = Arc::new(host);
        Ok(Self {
            user_syscall: Arc::new(UserSyscallProbe::new(Arc::clone(&host))),
            host,
            clock,
            poll: POLL,
            spin_limit: Some(SPIN_LIMIT),
            emulated,
            facts: OnceLock::new(),
            supported: OnceLock::new(),
            msrs: OnceLock::new(),
            step: OnceLock::new(),
            saved_features: OnceLock::new(),
        })
    }

    /// The CPUID leaves that KVM supports.
    ///
    /// # Errors
    /// If the ioctl fails.
    pub fn supported(&self) -> Result<&[Leaf], kvm::Error> {
        if let Some(supported) = self.supported.get() {
            return Ok(supported);
        }
        let read = self.host.supported_cpuid()?;
        Ok(self.supported.get_or_init(|| read))
    }

    /// The MSRs that hold guest state.
    ///
    /// # Errors
    /// If the ioctl fails.
    pub fn msrs(&self) -> Result<&[u32], kvm::Error> {
        if let Some(msrs) = self.msrs.get() {
            return Ok(msrs);
        }
        let read = self.host.msr_index_list()?;
        Ok(self.msrs.get_or_init(|| read))
    }

    /// Those of [`Self::supported`] that [`cpuid::missing`] compares, and perhaps more: from a snapshot, or else from
    /// KVM.
    pub(crate) fn features(&self) -> Result<&[Leaf], kvm::Error> {
        self.saved_features.get().map_or_else(|| self.supported(), |saved| Ok(saved))
    }

    /// Whether the emulated host lacks features that this one has.
    fn hides_features(&self) -> bool {
        self.emulated == Some(EmulatedHost::NoXsave)
    }

    /// The facts for a snapshot; none if the host has no identity.
    ///
    /// # Errors
    /// If the ioctl that lists what KVM supports fails.
    pub fn fingerprint(&self) -> Result<Option<HostFingerprint>, kvm::Error> {
        let Some(host) = self.host.id().filter(|_| !self.hides_features()) else { return Ok(None) };
        let facts = self.facts.get().copied().filter(|_| self.emulated.is_none()).map(Into::into);
        Ok(Some(HostFingerprint { host, facts, features: cpuid::compared(self.features()?) }))
    }

    /// Uses the facts of a snapshot, `saved`, if they are of this host and boot.
    pub fn use_fingerprint(&self, saved: HostFingerprint) {
        if self.host.id().is_some_and(|here| here == saved.host) && !self.hides_features() {
            let _ = self.saved_features.set(saved.features);
            if let Some(facts) = saved.facts.and_then(FactsState::facts) {
                self.set_facts(self.as_emulated(facts));
            }
        }
    }

    /// This host's facts. If they have not been measured, measures them now, in VMs of their own.
    ///
    /// # Errors
    /// If KVM fails in a way that says nothing about the facts.
    pub fn facts(&self) -> Result<HostFacts, RunError> {
        if let Some(facts) = self.facts.get() {
            return Ok(*facts);
        }
        let facts = self.as_emulated(HostFacts::probe(&self.host, self.supported()?)?);
        self.set_facts(facts);
        Ok(facts)
    }

    /// Whether nothing has been measured yet; then the first machine's vCPU executes the probe ([`first_vm_probe`]).
    pub(crate) fn is_unprobed(&self) -> bool {
        self.facts.get().is_none()
    }

    /// Keeps measured facts.
    pub(crate) fn set_facts(&self, facts: HostFacts) {
        // An error means that another thread has measured the same meanwhile.
        let _ = self.facts.set(facts);
    }

    /// `facts` with those of the emulated host in place of its own.
    pub(crate) fn as_emulated(&self, facts: HostFacts) -> HostFacts {
        match self.emulated {
            Some(EmulatedHost::SwallowDeadline) => HostFacts { deadline_write: DeadlineWrite::Swallowed, ..facts },
            Some(EmulatedHost::CoarseStep | EmulatedHost::NoXsave) | None => facts,
        }
    }

    /// How single-stepping works here.
    ///
    /// # Errors
    /// If KVM fails.
    pub fn step(&self) -> Result<Step, kvm::Error> {
        if let Some(step) = self.step.get() {
            return Ok(*step);
        }
        let mut step = kvm::probe::single_step(&self.host, self.supported()?, self.clock.khz().get())?;
        step.exact &= self.emulated != Some(EmulatedHost::CoarseStep);
        Ok(*self.step.get_or_init(|| step))
    }

    /// Whether a guest's TSC follows an offset that is set with KVM: as probed before, or now.
    pub(crate) fn offset_works(&self) -> Result<bool, RunError> {
        if let Some(facts) = self.facts.get() {
            return Ok(facts.tsc_offset);
        }
        let offset = kvm::probe::PROBE_OFFSET;
        Ok(kvm::probe::tsc_offset(&self.host, self.supported()?, offset)?.took_effect)
    }

    /// Whether KVM really scales a guest's TSC to `khz`.
    pub(crate) fn scales_to(&self, khz: Khz) -> Result<bool, RunError> {
        // If the host's frequency is an assumed one (`TAKE_FOR`), scaling cannot be verified.
        if self.clock.is_taken_for_another() {
            return Ok(false);
        }
        Ok(kvm::probe::tsc_scales(&self.host, self.supported()?, self.clock.khz().get(), khz.get())?)
    }
}
