//! Pauses a machine: stops TSC and VM time, on request or as of the beginning of a gap in which no vCPU ran.

use std::time::Duration;

use vmtime::Now;

use super::{
    Machine, config::source::TscSource, cpu_index::CpuIndex, error::RunError, instant::HostInstant, paused::Paused,
    record::trace::Event, shared::host_stop::Gap, vcpus::InFlight,
};

impl Machine {
    /// Stops TSC and VM time. A machine that is paused stays as it is. If no vCPU ran for a while before, the machine
    /// is paused as of the beginning of that gap; returns the gap's length, up to now.
    ///
    /// # Errors
    /// If a message in a vCPU's inbox cannot be delivered, or as [`Self::run`] after such a gap.
    pub fn pause(&mut self) -> Result<Option<Duration>, RunError> {
        if self.paused.is_some() {
            return Ok(None);
        }
        // Reading the clock finds a gap. `run` has found one that ended while it ran; the process may have been stopped
        // before.
        drop(self.shared.read_clock());
        match self.take_gap() {
            Some(gap) => self.pause_at_gap(gap).map(Some),
            None => self.stop_clocks(None).map(|()| None),
        }
    }

    /// Pauses the machine as of the beginning of `gap`, in which no vCPU ran. Returns the gap's length, up to now.
    ///
    /// # Errors
    /// As [`Self::pause`], or if the TSC cannot be continued.
    pub(crate) fn pause_at_gap(&mut self, gap: Gap) -> Result<Duration, RunError> {
        let Gap { from, tsc_restarted } = gap;
        if tsc_restarted && self.shared.clock.lock().source() != TscSource::Trapped {
            return Err(RunError::HostLacks(
                "the host's TSC began anew while the VM ran (has the host slept?), and the guest's with it; use --tsc \
                 trapped with a guest that has trap sites"
                    .to_owned(),
            ));
        }
        let length = HostInstant::now(self.shared.clock.lock().host()).boot.since(from.boot);
        self.stop_clocks(Some(from))?;
        if let Some(Paused { moment, .. }) = &self.paused {
            let now = Now::new(moment.tsc, moment.vm);
            let gap_ns = u64::try_from(length.as_nanos()).unwrap_or(u64::MAX);
            self.shared.event(CpuIndex::FIRST, now, &Event::HostStop { gap_ns });
        }
        Ok(length)
    }

    /// Stops TSC and VM time; `since`: no vCPU has run since this instant, as of which they stop.
    fn stop_clocks(&mut self, since: Option<HostInstant>) -> Result<(), RunError> {
        let (moment, at) = self.vcpus.freeze(&self.vm, &self.shared, since)?;
        self.paused = Some(Paused::here(moment, at));
        for in_flight in self.vcpus.in_flight(&self.shared)? {
            let InFlight { cpu, page_version, armed, steal_ns: _ } = in_flight;
            let event = Event::Save { tsc_khz: moment.khz, page: moment.page, page_version, armed };
            self.shared.event(cpu, Now::new(moment.tsc, moment.vm), &event);
        }
        Ok(())
    }
}
