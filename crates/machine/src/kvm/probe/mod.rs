//! Probes: what this host does, measured with tiny guests.
//!
//! Return codes are not evidence: some hosts accept a TSC frequency or offset and ignore it. So a few instructions run
//! in a VM that is then thrown away, and the results are compared with the host's own counter. Creating that VM takes
//! as long as creating the guest's. So [`probe_in_place`] first runs a shorter probe on a vCPU of the guest, before the
//! guest runs.

mod cpuid;
mod in_place;
mod kernel_lapic;
mod measure;
mod rate;
mod recorder;
mod syscall;

use std::sync::Arc;

use guest_abi::{
    lapic::{self, x2apic_msr},
    msr::IA32_TSC_DEADLINE,
};
use vm_memory::{Bytes, GuestAddress};

pub(super) use self::{
    rate::{Reading, tightest},
    recorder::Recorder,
};
pub use cpuid::cpuid;
pub use in_place::{can_probe, probe_in_place};
pub use kernel_lapic::{KernelLapic, kernel_lapic};
pub use measure::{Measured, Step, exit_ns, instruction_ns, single_step, tsc_offset};
pub use rate::{TscRate, Verdict, tsc_rate, tsc_scales};
pub use syscall::{UserSyscall, user_syscall};

use super::{Error, Exit, Host, Lapics, Operation, Vcpu, Vm};
use crate::{
    host::tsc::read_tsc,
    mem::ram::GuestRam,
    x86::{EntryState, Leaf},
};

/// How WRMSR IA32_TSC_DEADLINE behaves without an in-kernel LAPIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeadlineWrite {
    /// It exits.
    Exits,
    /// It exits once MWAIT exits are disabled (some Intel hosts).
    ExitsWithMwait,
    /// KVM executes it without an exit and without effect: only trap sites help.
    Swallowed,
}

/// What probes have found out about this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostFacts {
    /// With a TSC offset of 0, a guest's RDTSC returns the host's TSC.
    pub tsc_equals_host: bool,
    /// With another offset, a guest's RDTSC returns the host's TSC plus that offset.
    pub tsc_offset: bool,
    /// See [`DeadlineWrite`].
    pub deadline_write: DeadlineWrite,
    /// RDMSR and WRMSR of x2APIC registers exit.
    pub x2apic_exits: bool,
}

const USER_SPACE: Lapics = Lapics::UserSpace { mwait_in_guest: false };

/// An offset that no host's TSC reaches within a probe: more than an hour at 4 GHz.
pub const PROBE_OFFSET: u64 = 1 << 44;

/// Guest code and data of the probes.
const CODE: u64 = 0x1000;
const RESULT: u64 = 0x2000;
const PROBE_BYTES: usize = 0x4000;
/// The port that the probes write when a TSC is in memory.
const TSC_PORT: u16 = 0x80;

/// 32-bit code: RDTSC to memory; OUT 0x80; WRMSR 0x6e0 of 1; OUT 0x81; RDMSR 0x802; OUT 0x82; HLT.
const PROGRAM: [u8; 42] = [
    0x0f, 0x31, 0xa3, 0x00, 0x20, 0x00, 0x00, 0x89, 0x15, 0x04, 0x20, 0x00, 0x00, 0xe6, 0x80, // RDTSC
    0xb9, 0xe0, 0x06, 0x00, 0x00, 0xb8, 0x01, 0x00, 0x00, 0x00, 0x31, 0xd2, 0x0f, 0x30, 0xe6, 0x81, // WRMSR 0x6e0
    0xb9, 0x02, 0x08, 0x00, 0x00, 0x0f, 0x32, 0xe6, 0x82, 0xf4, // RDMSR 0x802
    0x90,
];

/// An endless loop: RDTSC to memory; OUT 0x80.
const TSC_LOOP: [u8; 17] =
    [0x0f, 0x31, 0xa3, 0x00, 0x20, 0x00, 0x00, 0x89, 0x15, 0x04, 0x20, 0x00, 0x00, 0xe6, 0x80, 0xeb, 0xef];

/// CPUID.1:ECX: TSC-deadline and x2APIC.
const APIC_FEATURES: u32 = 1 << 24 | 1 << 21;

struct Probe {
    vcpu: Vcpu,
    memory: Arc<GuestRam>,
    last: Recorder,
}

impl Probe {
    fn new(host: &Host, leaves: &[Leaf], program: &[u8], lapics: Lapics) -> Result<Self, Error> {
        let no_memory = |_| Error::last("mmap");
        let memory = GuestRam::from_ranges(&[(GuestAddress(0), PROBE_BYTES)]).map_err(no_memory)?;
        memory.write_slice(program, GuestAddress(CODE)).map_err(|_| Error::last("mmap"))?;
        let memory = Arc::new(memory);
        let vm = Vm::new(host, Arc::clone(&memory), lapics)?;
        let mut vcpu = Vcpu::new(&vm, 0, leaves)?;
        vcpu.set_flat_32bit_entry(&EntryState { rip: CODE, ..EntryState::default() })?;
        Ok(Self { vcpu, memory, last: Recorder::default() })
    }

    /// Runs to the next exit.
    fn next(&mut self) -> Result<Exit, Error> {
        self.last = Recorder::default();
        self.vcpu.run(&mut self.last)
    }

    /// Runs to the OUT that follows RDTSC.
    fn read_guest_tsc(&mut self) -> Result<Option<Reading>, Error> {
        let before = read_tsc();
        let exit = self.next()?;
        let after = read_tsc();
        if exit != Exit::Operation(Operation::Port) || self.last.port != Some(TSC_PORT) {
            return Ok(None);
        }
        let guest: u64 = self.memory.read_obj(GuestAddress(RESULT)).map_err(|_| Error::last("mmap"))?;
        Ok(Some(Reading { before, guest, after }))
    }
}

impl HostFacts {
    /// The facts of a host that needs no workaround. The TSC offset is not among them, because only a restore needs it.
    pub const WITHOUT_WORKAROUNDS: Self =
        Self { tsc_equals_host: true, tsc_offset: false, deadline_write: DeadlineWrite::Exits, x2apic_exits: true };

    /// Runs all probes, which takes a few milliseconds.
    ///
    /// # Errors
    /// If KVM fails in a way that says nothing about these facts.
    pub fn probe(host: &Host, supported: &[Leaf]) -> Result<Self, Error> {
        let tsc_offset = tsc_offset(host, supported, PROBE_OFFSET)?.took_effect;
        let leaves = with_apic_features(supported);
        let mut probe = Probe::new(host, &leaves, &PROGRAM, USER_SPACE)?;
        // An error is ignored: only the value that RDTSC returns counts.
        let _ = probe.vcpu.set_tsc_offset(0);
        let tsc_equals_host =
            probe.read_guest_tsc()?.is_some_and(|Reading { before, guest, after }| (before..=after).contains(&guest));
        let deadline_write = match deadline_exits(&mut probe)? {
            true => DeadlineWrite::Exits,
            false => {
                let again = Probe::new(host, &leaves, &PROGRAM, Lapics::UserSpace { mwait_in_guest: true }).and_then(
                    |mut probe| {
                        probe.read_guest_tsc()?;
                        deadline_exits(&mut probe)
                    },
                );
                // On a host that cannot disable MWAIT exits this is an error, which counts as no exit.
                if again.unwrap_or(false) { DeadlineWrite::ExitsWithMwait } else { DeadlineWrite::Swallowed }
            }
        };
        let x2apic_exits =
            probe.next()? == Exit::Operation(Operation::Msr) && probe.last.msr == Some(x2apic_msr(lapic::ID));
        Ok(Self { tsc_equals_host, tsc_offset, deadline_write, x2apic_exits })
    }
}

/// Runs from after the first OUT up to the OUT 0x81; true if the WRMSR exited on the way.
fn deadline_exits(probe: &mut Probe) -> Result<bool, Error> {
    let exited = probe.next()? == Exit::Operation(Operation::Msr) && probe.last.msr == Some(IA32_TSC_DEADLINE);
    if exited {
        probe.next()?;
    }
    Ok(exited)
}

/// The leaves with TSC-deadline and x2APIC on, so that the guest CPU has those MSRs.
pub(super) fn with_apic_features(supported: &[Leaf]) -> Vec<Leaf> {
    let mut leaves = supported.to_vec();
    for leaf in leaves.iter_mut().filter(|leaf| leaf.function == 1) {
        leaf.ecx |= APIC_FEATURES;
    }
    leaves
}
