//! What of a machine survives a migration, as plain data.
//!
//! RAM is not here: in process it stays where it is, and a snapshot writes it to a file of its own.

use serde::{Deserialize, Serialize};

use super::{
    LapicKind, TimeMode, clock::ClockState, cpu::Phase, judge::JudgeState, pv_eoi::PvEoiState, source::TscSource,
};
use crate::{
    apic,
    boot::{cpuid::Leaf, sites::SiteState},
    devices::{PicState, PitState, SerialState},
    kvm::state::{LapicPage, MpState, VcpuState},
    pvclock::{RegistrationState, WallState},
};

/// A whole machine but its RAM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineState {
    /// What it is.
    pub machine: MachineSection,
    /// Its clock.
    pub clock: ClockState,
    /// Its vCPUs, by number.
    pub cpus: CpuStates,
    /// Its devices.
    pub devices: DevicesState,
    /// The guest's trap sites, patched or not.
    pub sites: Vec<SiteState>,
    /// Where reading the tick ring goes on.
    pub judge: JudgeState,
}

/// What a machine is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineSection {
    /// The image it was booted from, for people.
    pub image: String,
    /// How time passed for it.
    pub time: TimeMode,
    /// Where its RDTSC answers came from.
    pub source: TscSource,
    /// Virtual time: the generator that gives vCPUs their turns, as it stood.
    pub order: (u64, u64),
    /// All vCPUs' TSCs were equal.
    pub tsc_stable: bool,
}

/// All vCPUs, by number. They are of one kind: who has the local APICs is the machine's affair.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CpuStates {
    /// We have the LAPICs.
    User(Vec<CpuState>),
    /// KVM has them.
    Kvm(Vec<KvmCpuState>),
}

impl CpuStates {
    /// Who has the LAPICs.
    #[must_use]
    pub const fn lapic(&self) -> LapicKind {
        match self {
            Self::User(_) => LapicKind::User,
            Self::Kvm(_) => LapicKind::Kvm,
        }
    }

    /// How many there are.
    #[must_use]
    pub const fn count(&self) -> usize {
        match self {
            Self::User(cpus) => cpus.len(),
            Self::Kvm(cpus) => cpus.len(),
        }
    }

    /// The CPUID that each of them sees.
    #[must_use]
    pub fn cpuids(&self) -> Vec<Vec<Leaf>> {
        match self {
            Self::User(cpus) => cpus.iter().map(|cpu| cpu.cpuid.clone()).collect(),
            Self::Kvm(cpus) => cpus.iter().map(|cpu| cpu.cpuid.clone()).collect(),
        }
    }
}

/// One vCPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuState {
    /// The CPUID it sees.
    pub cpuid: Vec<Leaf>,
    /// What that says of its LAPIC.
    pub apic_config: apic::Config,
    /// What KVM holds.
    pub kvm: VcpuState,
    /// Its LAPIC.
    pub apic: apic::State,
    /// Its kvmclock page.
    pub pvclock: RegistrationState,
    /// Its PV EOI word, if it was offered one.
    pub pv_eoi: Option<PvEoiState>,
    /// IA32_TSC_ADJUST.
    pub tsc_adjust: u64,
    /// Whether it executes instructions at all.
    pub phase: Phase,
    /// It executed HLT and waits.
    pub halted: bool,
}

/// One vCPU whose LAPIC is KVM's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KvmCpuState {
    /// The CPUID it sees.
    pub cpuid: Vec<Leaf>,
    /// What KVM holds in any case.
    pub kvm: VcpuState,
    /// What it holds with the LAPIC.
    pub lapic: KvmLapicState,
}

/// A LAPIC of KVM's, kvmclock's MSRs, and whether the vCPU executes instructions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KvmLapicState {
    /// The register page. TMCCT says nothing: `armed` does.
    pub page: LapicPage,
    /// What the timer waits for: always an absolute instant.
    pub armed: apic::Armed,
    /// Whether it executes instructions.
    pub mp_state: MpState,
    /// IA32_TSC_ADJUST.
    pub tsc_adjust: u64,
    /// MSR_KVM_SYSTEM_TIME_NEW.
    pub system_time: u64,
    /// MSR_KVM_WALL_CLOCK_NEW.
    pub wall_clock: u64,
}

/// Devices.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DevicesState {
    /// The serial port.
    pub serial: SerialState,
    /// The 8259 pair.
    pub pic: PicState,
    /// The 8254.
    pub pit: PitState,
    /// The wall-clock registration.
    pub wall: WallState,
}
