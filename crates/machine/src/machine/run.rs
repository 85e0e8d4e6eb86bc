//! Runs a machine until the guest ends, a VM time is reached, or another thread posts a request.

use std::sync::Arc;

use vmtime::{Now, TscAdjust, VmTime};

use super::{
    Machine,
    config::LapicKind,
    cpu_index::CpuIndex,
    error::RunError,
    policy::Policies,
    record::trace::Event,
    sched::{mailbox::RequestSource, round_robin::Until},
    shared::{Ram, host_stop::Gap},
    stop::StopReason,
    vcpu::Cpu,
};

impl Machine {
    /// Runs until the guest ends, VM time `stop` is reached or a request waits in `mailbox`. A paused machine is first
    /// resumed without any change.
    ///
    /// # Errors
    /// [`RunError`].
    pub fn run(&mut self, mailbox: &impl RequestSource, stop: Option<VmTime>) -> Result<StopReason, RunError> {
        if self.paused.is_some() {
            self.resume(&Policies::default())?;
        }
        mailbox.set_doorbell(self.shared.vcpus.first().map(|vcpu_shared| Arc::clone(&vcpu_shared.doorbell)));
        let stopped = self.run_and_renew(mailbox, stop);
        mailbox.set_doorbell(None);
        let stopped = stopped?;
        match (stopped, self.take_gap()) {
            (StopReason::Ended(end), _) => {
                let now = self.shared.clock.lock().now(TscAdjust::ZERO);
                let reason = end.message().unwrap_or_else(|| "done".to_owned());
                self.shared.event(CpuIndex::FIRST, now, &Event::End { reason: &reason });
                Ok(StopReason::Ended(end))
            }
            (_, Some(gap)) => Ok(StopReason::HostStopped { length: self.pause_at_gap(gap)? }),
            (stopped, None) => Ok(stopped),
        }
    }

    /// Takes the gap that was found, if one was; the caller makes it a pause.
    pub(crate) fn take_gap(&mut self) -> Option<Gap> {
        if self.shared.has_gap() {
            // Reads the rings while `gap` is still set: a tick that the guest handled before the gap was found may have
            // an instant within the gap.
            self.shared.read_rings();
        }
        self.shared.gap.lock().take()
    }

    /// Runs, and renews the page when that is due. No vCPU runs during the renewal.
    fn run_and_renew(&mut self, mailbox: &impl RequestSource, stop: Option<VmTime>) -> Result<StopReason, RunError> {
        loop {
            let (mode, renewal, until) = {
                let clock = self.shared.clock.lock();
                let renewal = clock.renewal();
                let until =
                    Until { stop: stop.and_then(|stop| clock.least_tsc(stop)), renewal: clock.least_tsc(renewal) };
                (clock.mode(), renewal, until)
            };
            let Self { vcpus, vm, shared, round_robin, .. } = self;
            let stopped = vcpus.run(vm, shared, mailbox, (mode, until), round_robin)?;
            if self.shared.has_gap() {
                return Ok(stopped);
            }
            let now = self.shared.clock.lock().now(TscAdjust::ZERO);
            if stopped == StopReason::Reached && self.vcpus.lapic() == LapicKind::User && now.vm >= renewal {
                self.renew_page(now)?;
            }
            if stopped != StopReason::Reached || stop.is_some_and(|stop| now.vm >= stop) {
                return Ok(stopped);
            }
        }
    }

    /// Rebases the clock's page on the present instant, and publishes it for each vCPU. No vCPU may run meanwhile.
    pub(crate) fn renew_page(&mut self, now: Now) -> Result<(), RunError> {
        let mut clock = self.shared.clock.lock();
        clock.renew();
        let flags = self.shared.page_flags();
        for Cpu { local, .. } in self.vcpus.user_mut() {
            let page = clock.page(local.tsc_adjust);
            local
                .pvclock
                .publish(&Ram(&self.shared.memory), &page, flags, false)
                .map_err(|fault| RunError::BadState(fault.to_string()))?;
        }
        let page = clock.page(TscAdjust::ZERO);
        drop(clock);
        self.shared.event(CpuIndex::FIRST, now, &Event::Renew { page });
        Ok(())
    }
}
