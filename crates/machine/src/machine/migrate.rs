//! Migration within the process: a new virtual machine that goes on from the old one's state.

use super::{
    Machine,
    build::Onward,
    config::{
        HostEnvironment,
        first_vm_probe::FirstVmProbe,
        source::{self, Guest, SourceChoice, TscSource},
    },
    error::RunError,
    kvm_lapic,
    outputs::{Outputs, TraceTo},
    paused::{BootTime, Paused},
    policy::{Policies, check_ratio},
    resume::Migration,
    shared::Shared,
    vcpus::Vcpus,
};
use vmtime::Khz;

impl Machine {
    /// What to choose after a migration within the process: what was asked for, or else what suits.
    fn choice_after(&self, source: TscSource) -> SourceChoice {
        match self.choice {
            SourceChoice::Auto => source.choice_after(),
            fixed @ SourceChoice::Fixed(_) => fixed,
        }
    }

    /// Whether this machine could migrate to `khz` here; asked before [`Self::migrate`], which cannot go back.
    ///
    /// # Errors
    /// Why not.
    pub fn check_migration(&self, env: &HostEnvironment, khz: Khz) -> Result<(), RunError> {
        check_ratio(self.shared.clock.lock().khz(), khz)?;
        self.check_source(env, khz)
    }

    /// Whether this machine could have the TSC frequency `khz` here.
    ///
    /// # Errors
    /// Why not.
    pub fn check_source(&self, env: &HostEnvironment, khz: Khz) -> Result<(), RunError> {
        let (source, time) = {
            let clock = self.shared.clock.lock();
            (clock.source(), clock.mode())
        };
        let choice = self.choice_after(source);
        let running = || Paused::here(self.shared.clock.lock().moment(), BootTime::now());
        let stopped = self.has_run.then(|| self.paused.unwrap_or_else(running).stopped_tsc());
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

    /// Migrates within the process to the TSC frequency `khz`: a new virtual machine is built from the saved state, RAM stays
    /// where it is.
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
        let changes = self.take_changes()?;
        self.shared.sites.unpatch(&self.shared.memory);
        let Self { vcpus, shared, migrations_here, paused, vm, .. } = self;
        // The old machine is closed before the new one is built, as on two hosts.
        drop((vcpus, vm));
        let Shared { devices, memory, audit, trace, outlets, costs, settled_down, .. } = shared;
        let console = devices.into_inner().into_output();
        let outputs = Outputs { console, trace: TraceTo::On(trace), outlets };
        let mut machine =
            Self::restored(env, &state, memory, Onward { choice, time: state.machine.time, khz, paused }, outputs)?;
        // The tick audit's counts continue, because it is the same process that counts.
        machine.shared.audit = audit;
        machine.shared.costs = costs;
        machine.shared.settled_down = settled_down;
        machine.migrations_here = migrations_here.saturating_add(1);
        machine.set_changes(changes)?;
        let migration = machine.resume(policies)?;
        let migration = migration.ok_or_else(|| RunError::BadState("a migrated machine cannot be new".to_owned()))?;
        Ok((machine, migration))
    }
}
