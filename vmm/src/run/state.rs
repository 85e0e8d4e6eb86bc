//! What of a machine survives a migration, as plain data.
//!
//! RAM is not here: in process it stays where it is, and a snapshot writes it to a file of its own.

use serde::{Deserialize, Serialize};

use super::{TimeMode, clock::ClockState, cpu::Phase, judge::JudgeState, source::TscSource};
use crate::{
    apic,
    boot::{cpuid::Leaf, sites::SiteState},
    devices::SerialState,
    kvm::state::VcpuState,
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
    pub cpus: Vec<CpuState>,
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
    /// IA32_TSC_ADJUST.
    pub tsc_adjust: u64,
    /// Whether it executes instructions at all.
    pub phase: Phase,
    /// It executed HLT and waits.
    pub halted: bool,
}

/// Devices.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DevicesState {
    /// The serial port.
    pub serial: SerialState,
    /// The wall-clock registration.
    pub wall: WallState,
}
