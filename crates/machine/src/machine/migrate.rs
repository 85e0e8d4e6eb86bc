//! Migration within the process: a new virtual machine continues from the old one's state.

use std::{io, sync::Arc};

use super::{
    Machine,
    build::Continuation,
    config::{
        HostEnvironment,
        first_vm_probe::FirstVmProbe,
        source::{self, Guest, SourceChoice, TscSource},
    },
    error::RunError,
    instant::HostInstant,
    kvm_lapic,
    outputs::{Outputs, TraceTo},
    paused::Paused,
    policy::{Policies, check_ratio},
    resume::Migration,
    shared::Shared,
    state::{MachineSection, MachineState},
    vcpus::Vcpus,
};
use crate::mem::ram;
use vmtime::Khz;

impl Machine {
    /// The choice of the TSC source after a migration within the process: the user's, or else one that follows from
    /// `source`, the present one.
    fn choice_after(&self, source: TscSource) -> SourceChoice {
        match self.choice {
            SourceChoice::Auto => source.choice_after(),
            fixed @ SourceChoice::Fixed(_) => fixed,
        }
    }

    /// Checks that this machine can migrate to `khz` here. Call it before [`Self::migrate`], which loses the machine if
    /// it fails.
    ///
    /// # Errors
    /// The reason why it cannot.
    pub fn check_migration(&self, env: &HostEnvironment, khz: Khz) -> Result<(), RunError> {
        check_ratio(self.shared.clock.lock().khz(), khz)?;
        self.check_source(env, khz)
    }

    /// Checks that this machine can have the TSC frequency `khz` here.
    ///
    /// # Errors
    /// The reason why it cannot.
    pub fn check_source(&self, env: &HostEnvironment, khz: Khz) -> Result<(), RunError> {
        let clock = self.shared.clock.lock().clone();
        let (source, time, host) = (clock.source(), clock.mode(), clock.host());
        let choice = self.choice_after(source);
        let running = || {
            let now = HostInstant::now(host);
            Paused::here(clock.moment(now), now)
        };
        let stopped = self.has_run.then(|| self.paused.unwrap_or_else(running).stopped_tsc(host));
        match &self.vcpus {
            Vcpus::Kvm(_) => kvm_lapic::choose(env, choice, time, khz, stopped, &self.image),
            Vcpus::User(cpus) => {
                let cpus = u32::try_from(cpus.len()).unwrap_or(u32::MAX);
                let guest = Guest { name: &self.image, sites: &self.all_sites, cpus, stopped };
                source::choose(&FirstVmProbe::measured(env)?, guest, choice, time, khz)
            }
        }
        .map(drop)
    }

    /// Migrates within the process to the TSC frequency `khz`: builds a new virtual machine from the saved state, with
    /// the same RAM.
    ///
    /// # Errors
    /// [`RunError`]; the machine is lost then, as it would be when a restore fails after the source was stopped.
    pub fn migrate(
        mut self,
        env: &HostEnvironment,
        khz: Khz,
        policies: &Policies,
    ) -> Result<(Self, Migration), RunError> {
        self.pause()?;
        let state = self.state(env)?;
        check_ratio(state.clock.moment.khz, khz)?;
        let choice = self.choice_after(state.machine.source);
        // Before the VM is closed: KVM's log of written pages is lost with it.
        let changes = self.take_changes()?;
        // A snapshot's RAM has the guest's own instructions at trap sites, and `restored` checks that.
        drop(self.shared.sites.unpatch(&self.shared.memory));
        let Self { mut vcpus, shared, migrations_here, downtimes, guest_stopped, paused, vm, .. } = self;
        let timers = vcpus.take_timer_audits();
        // The old machine is closed before the new one is built, as on two hosts.
        drop((vcpus, vm));
        let Shared { devices, memory, audit, trace, outlets, costs, assists, start_pages_released, .. } = shared;
        let console = devices.into_inner().into_output();
        let outputs = Outputs { console, trace: TraceTo::Continue(trace), outlets };
        let mut machine = Self::restored(
            env,
            &state,
            memory,
            Continuation { choice, time: state.machine.time, khz, paused },
            outputs,
        )?;
        // These counts are of the process, so they continue. A restore in another process begins with zeros.
        machine.shared.audit = audit;
        machine.shared.costs = costs;
        machine.shared.assists = assists;
        machine.shared.start_pages_released = start_pages_released;
        machine.guest_stopped = guest_stopped;
        machine.vcpus.continue_timer_audits(timers);
        machine.migrations_here = migrations_here.saturating_add(1);
        machine.downtimes = downtimes;
        machine.set_changes(changes)?;
        let migration = machine.resume(policies)?;
        let migration = migration.ok_or_else(|| RunError::BadState("a migrated machine cannot be new".to_owned()))?;
        Ok((machine, migration))
    }

    /// A copy of this paused machine, with RAM of its own and outputs that nobody reads. It is paused, too;
    /// [`Self::resume`] continues it with the TSC frequency `khz`.
    ///
    /// # Errors
    /// [`RunError`].
    pub fn twin(&mut self, env: &HostEnvironment, khz: Khz) -> Result<Self, RunError> {
        let state = self.state(env)?;
        let memory = Arc::new(ram::copy(&self.shared.memory)?);
        drop(self.shared.sites.unpatch(&memory));
        let MachineState { machine: MachineSection { source, time, .. }, clock, .. } = &state;
        check_ratio(clock.moment.khz, khz)?;
        let (choice, time) = (self.choice_after(*source), *time);
        let outputs = Outputs::new(Box::new(io::sink()), None);
        Self::restored(env, &state, memory, Continuation { choice, time, khz, paused: self.paused }, outputs)
    }
}
