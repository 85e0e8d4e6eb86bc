//! Stops of the machine by its host: counts them, and reports the first. There can be thousands.

use std::time::Duration;

use super::{SessionError, worker::Worker};
use crate::machine::policy::Policies;

impl Worker<'_, '_, '_> {
    /// Pauses the machine. If the host had stopped it before, that stop counts, and its time belongs to the pause.
    pub(super) fn pause(&mut self) -> Result<(), SessionError> {
        if let Some(length) = self.machine()?.pause()? {
            self.host_stops = self.host_stops.saturating_add(1);
            if self.host_stops == 1 {
                log::warn!("no vCPU ran for {length:.1?} before this pause: taken for a part of it");
            }
        }
        Ok(())
    }

    /// Resumes after a gap of `length` in which no vCPU ran and from whose beginning on the machine is paused.
    pub(super) fn resume_after_host_stop(&mut self, length: Duration) -> Result<(), SessionError> {
        self.host_stops = self.host_stops.saturating_add(1);
        // The length of this stop was measured. A length given for a restore's downtime does not apply.
        let policies = Policies { downtime_length: None, ..self.options.policies.clone() };
        let resumed = self.machine()?.resume(&policies)?;
        if self.host_stops == 1 {
            log::warn!(
                "no vCPU ran for {length:.1?}, although the VM was not paused (a stopped process, a frozen cgroup, a \
                 host that slept): taken for a pause under --downtime {}, by which VM time advanced {:?}",
                policies.downtime.as_str(),
                Duration::from_nanos(resumed.map_or(0, |resumed| resumed.downtime_ns)),
            );
        }
        Ok(())
    }
}
