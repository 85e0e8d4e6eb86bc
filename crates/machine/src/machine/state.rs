//! The state of a machine that survives a migration, as plain data.
//!
//! RAM is not here: in process it stays where it is, and a snapshot writes it to a file of its own.

use kvm_pv::{RegistrationState, WallState, pv_eoi::PvEoiState, steal_time::StealTimeState};
use serde::{Deserialize, Serialize};
use vmtime::{Due, TscAdjust};

use super::{
    audit::TickAuditState,
    clock::ClockState,
    config::{LapicKind, TimeMode, source::TscSource},
    error::RunError,
    limits::MAX_CPUS,
    vcpu::Phase,
};
use crate::{
    boot::{sites::SiteState, unlisted::UnlistedState},
    devices::{IoapicState, PicState, PitState, RtcState, SerialState},
    kvm::state::{LapicPage, MpState, VcpuState},
    x86::Leaf,
};

/// A whole machine without its RAM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineState {
    /// What does not belong to one of the other sections.
    pub machine: MachineSection,
    /// Its clock.
    pub clock: ClockState,
    /// Its vCPUs, by number.
    pub cpus: CpuStates,
    /// Its devices.
    pub devices: DevicesState,
    /// The guest's trap sites, patched or not.
    pub sites: Vec<SiteState>,
    /// Where reading the tick rings continues.
    pub audit: TickAuditState,
}

/// The longest name of an image, in bytes: a path of 4096 bytes, each of which is no UTF-8 and shown as three bytes.
const MAX_IMAGE_BYTES: usize = 3 * 4096;
/// The most leaves of a CPUID, and MSRs of a vCPU: KVM takes no more (KVM_MAX_CPUID_ENTRIES, MAX_IO_MSRS).
const MAX_ENTRIES: usize = 256;

impl MachineState {
    /// Checks that a machine can have this state, as far as that is possible without KVM and RAM.
    ///
    /// # Errors
    /// [`RunError`]: a contradiction, or a list that is too long.
    pub fn check(&self) -> Result<(), RunError> {
        let bad = |reason: String| Err(RunError::BadState(reason));
        let Self { machine, clock, cpus, devices: _, sites: _, audit: _ } = self;
        clock.moment.check()?;
        let (since, now) = (clock.reference.begins(), clock.moment.tsc);
        if since > now {
            return bad(format!("its account of VM time begins at TSC {}, after the saved TSC {}", since.0, now.0));
        }
        if machine.image.len() > MAX_IMAGE_BYTES {
            return bad(format!("the name of its image has {} bytes", machine.image.len()));
        }
        let count = u32::try_from(cpus.count()).unwrap_or(u32::MAX);
        if !(1..=MAX_CPUS).contains(&count) {
            return Err(RunError::Cpus(count));
        }
        let lists: Vec<(usize, usize)> = match cpus {
            CpuStates::User(cpus) => cpus.iter().map(|cpu| (cpu.cpuid.len(), cpu.kvm.msrs.len())).collect(),
            CpuStates::Kvm(cpus) => cpus.iter().map(|cpu| (cpu.cpuid.len(), cpu.kvm.msrs.len())).collect(),
        };
        match lists.iter().position(|(leaves, msrs)| *leaves > MAX_ENTRIES || *msrs > MAX_ENTRIES) {
            Some(cpu) => bad(format!("cpu {cpu}: more than {MAX_ENTRIES} CPUID leaves or MSRs")),
            None => Ok(()),
        }
    }
}

/// The machine as a whole: its image, its time and its order of vCPUs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineSection {
    /// The name of the image it was booted from, for messages.
    pub image: String,
    /// How time passed for it.
    pub time: TimeMode,
    /// The source of the values that its RDTSC returned.
    pub source: TscSource,
    /// Virtual time: the state of the generator that chooses the next vCPU.
    pub order: (u64, u64),
    /// All vCPUs' TSCs were equal.
    pub tsc_stable: bool,
    /// How often it was migrated since it booted.
    pub migrations: u64,
    /// RDTSC instructions that its trap-site table does not list.
    pub unlisted: UnlistedState,
    /// The trap sites were found in the guest's code: it does not list them.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub found_sites: bool,
}

/// All vCPUs, by number. The local APICs of a machine are all emulated by the VMM, or all by KVM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CpuStates {
    /// The VMM emulates the LAPICs.
    User(Vec<CpuState>),
    /// KVM emulates the LAPICs.
    Kvm(Vec<KvmCpuState>),
}

impl CpuStates {
    /// Whether the VMM or KVM emulates the LAPICs.
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
    /// The LAPIC's features, as that CPUID shows them.
    pub apic_config: vlapic::ConfigState,
    /// The state that KVM holds.
    pub kvm: VcpuState,
    /// Its LAPIC.
    pub apic: vlapic::State,
    /// Its kvmclock page.
    pub pvclock: RegistrationState,
    /// Its PV EOI word, if it was offered one.
    pub pv_eoi: Option<PvEoiState>,
    /// Its steal-time area, if it has registered one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub steal_time: Option<StealTimeState>,
    /// IA32_TSC_ADJUST.
    pub tsc_adjust: TscAdjust,
    /// What a TSC deadline was before a restore moved it, if one did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub due: Option<Due>,
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
    /// The state that KVM holds without the LAPIC.
    pub kvm: VcpuState,
    /// The state of KVM's LAPIC.
    pub lapic: KvmLapicState,
}

/// The state of a LAPIC that KVM emulates, kvmclock's MSRs, and whether the vCPU executes instructions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KvmLapicState {
    /// The register page. Its TMCCT is not used: `armed` is what the timer waits for.
    pub page: LapicPage,
    /// What the timer waits for: always an absolute instant.
    pub armed: vlapic::Armed,
    /// What a TSC deadline was before a restore moved it, if one did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub due: Option<Due>,
    /// Whether it executes instructions.
    pub mp_state: MpState,
    /// IA32_TSC_ADJUST.
    pub tsc_adjust: TscAdjust,
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
    /// The I/O APIC, if it is not as after reset.
    #[serde(default, skip_serializing_if = "is_default")]
    pub ioapic: IoapicState,
    /// The real-time clock, if it is not as after reset.
    #[serde(default, skip_serializing_if = "is_default")]
    pub rtc: RtcState,
    /// The wall-clock registration.
    pub wall: WallState,
}

fn is_default<State: Default + PartialEq>(state: &State) -> bool {
    *state == State::default()
}
