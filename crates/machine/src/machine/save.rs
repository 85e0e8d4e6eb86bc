//! Collects the state of a paused machine.

use std::sync::atomic::Ordering;

use super::{
    Machine,
    config::HostEnvironment,
    error::RunError,
    paused::Paused,
    state::{DevicesState, MachineSection, MachineState},
};

impl Machine {
    /// The state of a paused machine, without its RAM.
    ///
    /// # Errors
    /// If the ioctl fails.
    pub fn state(&mut self, env: &HostEnvironment) -> Result<MachineState, RunError> {
        let Some(Paused { moment, .. }) = self.paused else {
            return Err(RunError::Usage("a machine must be paused before it is saved".to_owned()));
        };
        self.shared.read_rings();
        let audit = self.shared.audit.lock().state();
        self.vcpus.drain(&self.shared)?;
        let clock = self.shared.clock.lock();
        let cpus = self.vcpus.states(&self.cpuid, env, &clock)?;
        Ok(MachineState {
            machine: MachineSection {
                image: self.image.clone(),
                time: clock.mode(),
                source: clock.source(),
                order: self.round_robin.state(),
                tsc_stable: self.shared.tsc_stable.load(Ordering::SeqCst),
                migrations: self.migrations,
                unlisted: self.unlisted.state(),
                found_sites: self.all_sites.are_found(),
            },
            clock: clock.state(moment),
            cpus,
            devices: {
                let (serial, pic, ioapic, pit, rtc) = self.shared.devices.lock().state();
                DevicesState { serial, pic, pit, ioapic, rtc, wall: self.shared.wall.lock().state() }
            },
            sites: self.all_sites.alive(&self.shared.sites, &self.shared.memory).state(),
            audit,
        })
    }
}
