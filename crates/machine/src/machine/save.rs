//! Taking the state of a machine that stands still.

use std::sync::atomic::Ordering;

use super::{
    Machine,
    config::HostEnvironment,
    error::RunError,
    paused::Paused,
    shared::lock,
    state::{DevicesState, MachineSection, MachineState},
};

impl Machine {
    /// Everything but RAM, of a paused machine.
    ///
    /// # Errors
    /// If the ioctl fails.
    pub fn state(&mut self, env: &HostEnvironment) -> Result<MachineState, RunError> {
        let Some(Paused { moment, .. }) = self.paused else {
            return Err(RunError::Usage("a machine must be paused before it is saved".to_owned()));
        };
        // Before the clock is locked: a traced tick asks it for the time.
        lock(&self.shared.audit).read_rings(&self.shared);
        self.vcpus.drain(&self.shared)?;
        let clock = lock(&self.shared.clock);
        let cpus = self.vcpus.states(&self.cpuid, env, &clock)?;
        let mut clock_state = clock.state();
        clock_state.moment = moment;
        Ok(MachineState {
            machine: MachineSection {
                image: self.image.clone(),
                time: clock.mode(),
                source: clock.source(),
                order: self.round_robin.state(),
                tsc_stable: self.shared.tsc_stable.load(Ordering::SeqCst),
                migrations: self.migrations,
                unlisted: self.unlisted.clone(),
            },
            clock: clock_state,
            cpus,
            devices: {
                let (serial, pic, pit) = lock(&self.shared.devices).state();
                DevicesState { serial, pic, pit, wall: lock(&self.shared.wall).state() }
            },
            sites: self.all_sites.alive(&self.shared.memory).state(),
            audit: lock(&self.shared.audit).state(),
        })
    }
}
