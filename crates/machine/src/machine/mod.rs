//! A machine that runs: vCPUs, their LAPICs, the clock, devices, and the loops that run the vCPUs.
//!
//! What it is: everything from the loading of an image to the guest's end, in real and in virtual time, and the state
//! that survives a migration. [`Machine`] is the whole; [`vcpu`] one vCPU, from one entry to the next; [`sched`]
//! decides which vCPU runs. `build`, `run`, `pause`, `resume`, `save` and `migrate` are the machine's operations.
//!
//! What it is not: it writes no file except a trace, opens no socket and parses no argument.
//!
//! Why the clock is one object ([`clock::Clock`]): TSC, VM time and the kvmclock page must change together, or the
//! guest sees some of them from before a migration and some from after it.

pub mod audit;
mod build;
mod checkpoint;
pub mod clock;
pub mod config;
pub mod cpu_index;
pub mod dirty;
pub mod downtime;
pub mod error;
pub mod guest_clock;
mod inspect;
mod instant;
mod kvm_lapic;
pub mod limits;
mod lock;
mod migrate;
pub mod outputs;
mod pause;
mod paused;
pub mod policy;
pub mod record;
pub mod resume;
mod run;
mod save;
pub mod sched;
mod shared;
pub mod state;
pub mod stepper;
pub mod stop;
mod track;
mod user_lapic;
pub mod vcpu;
mod vcpus;
mod vmclock;
mod wake;

use std::sync::Arc;

use self::{
    audit::GuestStoppedAudit,
    config::{
        LapicKind,
        source::{SourceChoice, TscSource},
    },
    dirty::Changes,
    downtime::Downtimes,
    error::RunError,
    guest_clock::ResumedClocks,
    paused::Paused,
    sched::round_robin::RoundRobin,
    shared::Shared,
    vcpus::Vcpus,
};
use crate::{
    boot::{sites::Sites, unlisted::Unlisted},
    kvm::Vm,
    mem::ram::GuestRam,
    output::FinishLimit,
    x86::Leaf,
};

/// A machine.
pub struct Machine {
    vcpus: Vcpus,
    /// Virtual time: which vCPU runs next.
    round_robin: RoundRobin,
    shared: Shared,
    /// The guest's trap sites; those in `shared` are the patched ones.
    all_sites: Sites,
    /// The sites that were patched before a save, and are not while it lasts.
    unpatched: Sites,
    image: String,
    cpuid: Vec<Vec<Leaf>>,
    /// Why this TSC source.
    why: String,
    /// The user's choice of the TSC source.
    choice: SourceChoice,
    /// When it was paused; none while it runs.
    paused: Option<Paused>,
    /// Where the last resume continued.
    resumed: Option<ResumedClocks>,
    /// It has run: starting it again is a resume, which sets GUEST_STOPPED.
    has_run: bool,
    /// Migrations since it booted, in all processes.
    migrations: u64,
    /// Migrations within this process, without restores.
    migrations_here: u64,
    /// The downtimes that were measured in this process.
    downtimes: Downtimes,
    /// RDTSC instructions that the guest's trap-site table does not list.
    unlisted: Unlisted,
    /// Whether the guest clears PVCLOCK_GUEST_STOPPED; in this process.
    guest_stopped: GuestStoppedAudit,
    /// Which pages have changed since it was saved, if that is recorded.
    changes: Option<Changes>,
    /// Declared last: the vCPUs are closed before the VM whose memory they map.
    vm: Vm,
}

impl Machine {
    /// Types `bytes` at the console; returns how many of them the serial port's buffer took.
    pub fn type_in(&self, bytes: &[u8]) -> usize {
        self.shared.devices.lock().type_in(bytes)
    }

    /// Writes out the buffered rest of the trace.
    ///
    /// # Errors
    /// The first write that failed.
    pub fn finish_trace(&self, limit: FinishLimit) -> Result<(), RunError> {
        self.shared.trace.finish(limit)
    }

    /// The guest's RAM.
    #[must_use]
    pub fn memory(&self) -> Arc<GuestRam> {
        Arc::clone(&self.shared.memory)
    }

    /// Restores the guest's own instructions at trap sites, for a save: a snapshot can also be restored where nothing
    /// is patched. The machine must be paused, and stay so until [`Self::memory_is_saved`].
    pub fn show_original_code(&mut self) {
        self.unpatched = self.shared.sites.unpatch(&self.shared.memory);
    }

    /// Patches trap sites again: the save or migration has come to nothing, and the guest is to run.
    pub fn show_patched_code(&mut self) {
        std::mem::take(&mut self.unpatched).patch(&self.shared.memory);
    }

    /// The image it was booted from.
    #[must_use]
    pub fn image(&self) -> &str {
        &self.image
    }

    /// The TSC source, and the reason for it as text.
    #[must_use]
    pub fn source_and_why(&self) -> (TscSource, &str) {
        (self.tsc_source(), &self.why)
    }

    /// Whether the VMM or KVM emulates the local APICs.
    #[must_use]
    pub fn lapic(&self) -> LapicKind {
        self.vcpus.lapic()
    }

    /// Whether it is paused.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        self.paused.is_some()
    }

    /// Migrations since it booted, in all processes; the restore that created it counts as one.
    #[must_use]
    pub fn migrations(&self) -> u64 {
        self.migrations
    }

    /// Migrations within this process; a restore does not count.
    #[must_use]
    pub fn migrations_here(&self) -> u64 {
        self.migrations_here
    }

    /// The downtimes that were measured in this process, under catch-up and in real time.
    #[must_use]
    pub fn downtimes(&self) -> Downtimes {
        self.downtimes
    }
}
