//! A machine that runs: vCPUs, their LAPICs, the clock, devices, and the loop that ties them together.
//!
//! What it is: everything between "an image is loaded" and "the guest asked to end", in real and in virtual time, and
//! the state that survives a migration. [`Machine`] is the whole; [`vcpu`] one vCPU, what it does from one entry to the
//! next; [`sched`] whose turn it is. `build`, `run`, `pause`, `resume`, `save` and `migrate` are the machine's verbs.
//!
//! What it is not: it writes no file except a trace, opens no socket and parses no argument.
//!
//! Why the clock is one object: TSC, VM time, the page and the deadline in flight must change together, once, or the
//! guest sees a torn migration. [`clock::Clock`] is that object.

pub mod audit;
pub mod build;
pub mod checkpoint;
pub mod clock;
pub mod config;
pub mod dirty;
pub mod error;
pub mod kvm_lapic;
pub mod migrate;
pub mod outputs;
pub mod pause;
pub mod paused;
pub mod policy;
pub mod record;
pub mod resume;
pub mod run;
pub mod save;
pub mod sched;
pub mod shared;
pub mod state;
pub mod stepper;
pub mod user_lapic;
pub mod vcpu;
pub mod vcpus;
pub mod wake;

use std::sync::Arc;

use guest_abi::report::Header;

use self::{
    config::{
        LapicKind,
        source::{SourceChoice, TscSource},
    },
    dirty::Changes,
    error::RunError,
    paused::Paused,
    sched::round_robin::RoundRobin,
    shared::{Shared, lock},
    vcpu::{Cpu, Phase},
    vcpus::Vcpus,
};
use crate::{
    boot::{sites::Sites, unlisted::Unlisted},
    kvm::Vm,
    mem::ram::GuestRam,
    x86::Leaf,
};

/// The most vCPUs a machine can have: what the guest's tick rings and 8-bit APIC IDs leave room for, and then some.
pub const MAX_CPUS: u32 = 16;

/// A machine.
pub struct Machine {
    pub(crate) vcpus: Vcpus,
    /// Virtual time: who takes the next turn.
    pub(crate) round_robin: RoundRobin,
    pub(crate) shared: Shared,
    /// The guest's trap sites; those in `shared` are the patched ones.
    pub(crate) all_sites: Sites,
    pub(crate) image: String,
    pub(crate) cpuid: Vec<Vec<Leaf>>,
    /// Why this TSC source.
    why: String,
    /// The TSC source that was asked for.
    pub(crate) choice: SourceChoice,
    /// Since when it stands still; none while it runs.
    pub(crate) paused: Option<Paused>,
    /// It ran before: starting it again is a resume, of which the guest is told.
    pub(crate) has_run: bool,
    /// Migrations since it booted, in whatever process.
    pub(crate) migrations: u64,
    /// Those within this process; a restore is none of them.
    pub(crate) migrations_here: u64,
    /// RDTSCs that the guest's trap-site table forgets.
    unlisted: Unlisted,
    /// What has changed since it was saved, if somebody asked for that account.
    pub(crate) changes: Option<Changes>,
    /// Declared last: the vCPUs are closed before the VM whose memory they map.
    pub(crate) vm: Vm,
}

impl Machine {
    /// Where each vCPU is, one line each, for people; nothing of vCPUs whose LAPICs are KVM's.
    ///
    /// # Errors
    /// If the ioctl fails.
    pub fn positions(&mut self) -> Result<Vec<String>, RunError> {
        let mut lines = Vec::new();
        for cpu in self.vcpus.user_mut() {
            cpu.drain(&self.shared)?;
            let Cpu { vcpu, local } = cpu;
            let (index, address) = (local.index, vcpu.registers().linear_rip);
            let interrupts = if vcpu.interrupts_enabled() { "on" } else { "off" };
            lines.push(match local.phase {
                Phase::WaitForSipi => format!("cpu {index} waits for a start-up message"),
                Phase::Running if local.halted => {
                    format!("cpu {index} halted before {address:#x}, interrupts {interrupts}")
                }
                Phase::Running => format!("cpu {index} at {address:#x}, interrupts {interrupts}"),
            });
        }
        Ok(lines)
    }

    /// The guest's RAM.
    #[must_use]
    pub fn memory(&self) -> Arc<GuestRam> {
        Arc::clone(&self.shared.memory)
    }

    /// Puts the guest's own instructions at trap sites, for a save: a snapshot can be restored where nothing is patched. The
    /// machine must be paused, and stay so up to [`Self::memory_is_saved`].
    pub fn show_original_code(&self) {
        self.shared.sites.unpatch(&self.shared.memory);
    }

    /// Timer interrupts that entered vCPU number `cpu` so far, in this process.
    #[must_use]
    pub fn timer_interrupts(&self, cpu: usize) -> u64 {
        self.vcpus.user().get(cpu).map_or(0, |cpu| cpu.local.timer_interrupts)
    }

    /// Whether the timer of vCPU number `cpu` is armed.
    #[must_use]
    pub fn has_timer_armed(&self, cpu: usize) -> bool {
        self.vcpus.user().get(cpu).is_some_and(|cpu| cpu.local.apic.next_deadline().is_some())
    }

    /// The header of the tick ring of vCPU number `cpu`, as the guest has it now; none if there is none.
    #[must_use]
    pub fn ring_header(&self, cpu: usize) -> Option<Header> {
        lock(&self.shared.audit).header(&self.shared.memory, cpu)
    }

    /// Ticks that the guest has handled on vCPU number `cpu`.
    #[must_use]
    pub fn ticks_handled(&self, cpu: usize) -> Option<u64> {
        self.ring_header(cpu).map(|header| header.written)
    }

    /// Ticks that the guest will make on vCPU number `cpu`; 0 = without end.
    #[must_use]
    pub fn ticks_expected(&self, cpu: usize) -> Option<u64> {
        self.ring_header(cpu).map(|header| header.expected)
    }

    /// What the vCPUs share.
    #[must_use]
    pub fn shared(&self) -> &Shared {
        &self.shared
    }

    /// The image it was booted from.
    #[must_use]
    pub fn image(&self) -> &str {
        &self.image
    }

    /// Which TSC source, and why, for people.
    #[must_use]
    pub fn source_and_why(&self) -> (TscSource, &str) {
        (lock(&self.shared.clock).source(), &self.why)
    }

    /// Who has the local APICs.
    #[must_use]
    pub fn lapic(&self) -> LapicKind {
        self.vcpus.lapic()
    }

    /// Whether it stands still.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        self.paused.is_some()
    }

    /// Migrations since it booted, in whatever process; the restore that made it is one.
    #[must_use]
    pub fn migrations(&self) -> u64 {
        self.migrations
    }

    /// Migrations within this process; a restore is none.
    #[must_use]
    pub fn migrations_here(&self) -> u64 {
        self.migrations_here
    }
}
