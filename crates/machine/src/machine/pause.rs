//! Stopping TSC and VM time: because somebody asked for it, or as of the beginning of a gap in which no vCPU ran.

use std::time::Duration;

use vlapic::Armed;
use vmtime::{HostTsc, Moment, Now};

use super::{
    Machine,
    config::source::TscSource,
    error::RunError,
    kvm_lapic,
    paused::{BootTime, Paused},
    record::trace::Event,
    resume::{armed, some},
    shared::lock,
    vcpu::{Cpu, ipi},
    wake::host_stop::Gap,
};

impl Machine {
    /// Stops TSC and VM time. A machine that stands still stays as it is.
    ///
    /// # Errors
    /// If a message on its way cannot be delivered.
    pub fn pause(&mut self) -> Result<(), RunError> {
        if self.paused.is_some() {
            return Ok(());
        }
        self.stand_still(BootTime::now(), None)
    }

    /// There was a gap in which no vCPU ran: the machine stands still since it began. Gives its length, up to now.
    ///
    /// # Errors
    /// As [`Self::pause`], or if the TSC cannot be continued.
    pub(crate) fn stopped_by_host(&mut self, gap: Gap) -> Result<Duration, RunError> {
        let Gap { from, tsc_restarted } = gap;
        if tsc_restarted && lock(&self.shared.clock).source() != TscSource::Trapped {
            return Err(RunError::HostLacks(
                "the host's TSC began anew while the VM ran (has the host slept?), and the guest's with it; use --tsc trapped \
                 with a guest that has trap sites"
                    .to_owned(),
            ));
        }
        let length = from.boot.elapsed();
        self.stand_still(from.boot, Some(from.tsc))?;
        if let Some(Paused { moment, .. }) = &self.paused {
            let now = Now::new(moment.tsc, moment.vm);
            let gap_ns = u64::try_from(length.as_nanos()).unwrap_or(u64::MAX);
            self.shared.event(0, now, &Event::HostStop { gap_ns });
        }
        Ok(length)
    }

    /// Stops TSC and VM time at the instant `at`; `since`: no vCPU has run since this host TSC.
    fn stand_still(&mut self, at: BootTime, since: Option<HostTsc>) -> Result<(), RunError> {
        // What was sent has arrived: messages are in no snapshot.
        for cpu in &mut self.cpus {
            ipi::receive(cpu, &self.shared)?;
        }
        let mut clock = lock(&self.shared.clock);
        match &mut self.in_kernel {
            Some(cpus) => kvm_lapic::freeze(cpus, &self.vm, &mut clock, since)?,
            None => clock.stop(),
        }
        let moment = clock.moment();
        for Cpu { local, .. } in &mut self.cpus {
            // What fell due before the stop is an interrupt, not a deadline in flight.
            let now = clock.now(local.tsc_adjust);
            local.advance(&clock, now);
        }
        drop(clock);
        self.paused = Some(Paused::here(moment, at));
        for Cpu { local, .. } in &self.cpus {
            self.trace_save(local.index, &moment, local.pvclock.state().version, armed(local));
        }
        for cpu in self.in_kernel.iter().flatten() {
            let armed = cpu.frozen()?.armed;
            self.trace_save(cpu.index, &moment, cpu.page_version(&self.shared), some(armed));
        }
        Ok(())
    }

    fn trace_save(&self, cpu: u32, moment: &Moment, page_version: u32, armed: Option<Armed>) {
        let event = Event::Save { tsc_khz: moment.khz, page: moment.page, page_version, armed };
        self.shared.event(cpu, Now::new(moment.tsc, moment.vm), &event);
    }
}
