//! Starting a paused machine again.
//!
//! A resume, a restore and an in-process migration are one operation ([`Machine::resume`]) on a paused machine: the clock
//! starts again from the saved moment at a frequency, policies decide about downtime and the deadline in flight, and the
//! page is published once with all of it. A real host does this in an order (LAPIC, TSC, deadline, page, GUEST_STOPPED);
//! see the comments in `resume` for what depends on what.

use std::time::Duration;

use serde::Serialize;
use vmtime::{Adjusted, DowntimePolicy, Khz, Now, Stood, VmTime};

use super::{
    Machine,
    config::{TimeMode, source::TscSource},
    cpu_index::CpuIndex,
    error::RunError,
    paused::Paused,
    policy::{Policies, Restart, check_ratio, fault::InjectedFault},
    record::trace::Event,
    vcpu::tsc,
    vcpus::InFlight,
};

/// What a resume did to the clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Migration {
    /// TSC frequency before.
    pub from_khz: Khz,
    /// TSC frequency after.
    pub to_khz: Khz,
    /// VM time at which it stood still.
    pub vm_ns: VmTime,
    /// How far VM time advanced meanwhile, in nanoseconds.
    pub downtime_ns: u64,
    /// The wall clock had gone back; the downtime was taken as zero.
    pub clamped: bool,
}

impl Machine {
    /// Starts a paused machine again, with the TSC frequency that it had, or that [`Self::from_state`] was told.
    ///
    /// # Errors
    /// If the frequency is out of range, or a clock would leave its range.
    pub fn resume(&mut self, policies: &Policies) -> Result<Option<Migration>, RunError> {
        self.paused.map_or(Ok(None), |paused| self.go_on(paused, policies))
    }

    /// Starts a paused machine again with the TSC frequency `khz`: what its guest sees of a migration to another host. A
    /// machine that has not run yet boots with the frequency it was made with.
    ///
    /// # Errors
    /// As [`Self::resume`].
    pub fn resume_at(&mut self, khz: Khz, policies: &Policies) -> Result<Option<Migration>, RunError> {
        self.paused.map_or(Ok(None), |paused| self.go_on(paused.with_khz(khz), policies))
    }

    fn go_on(&mut self, paused: Paused, policies: &Policies) -> Result<Option<Migration>, RunError> {
        let moment = paused.moment;
        // Before its first instruction a machine was neither saved nor down.
        let boot = Policies::default();
        let (policies, khz) = if self.has_run { (policies, paused.khz) } else { (&boot, moment.khz) };
        let mut clock = self.shared.clock.lock();
        let khz = clock.possible(khz);
        check_ratio(moment.khz, khz)?;
        let vcpus = self.vcpus.tscs();
        // Before its first start a TSC may be any; the host's is then the host's own, and what KVM scales is set to the clock's.
        let hold = clock.tsc_moves() && (self.has_run || clock.source() == TscSource::Scaled);
        if !hold {
            tsc::prepare(&vcpus, &mut clock, khz)?;
        }
        let host_stop = policies.fault.and_then(InjectedFault::host_stop);
        // The injected fault leaves the clocks running, as a host does that stops the process: as catch-up.
        let downtime = if host_stop.is_some() { DowntimePolicy::CatchUp } else { policies.downtime };
        let stood = match (host_stop.or(policies.downtime_length), clock.mode()) {
            (Some(length), _) => Stood::For(length),
            (None, TimeMode::Real) => paused.stood(),
            // Virtual time measures nothing.
            (None, TimeMode::Virtual) => Stood::For(Duration::ZERO),
        };
        let mut adjusted = clock.start(&moment, khz, downtime, stood, hold)?;
        if hold {
            tsc::set(&vcpus, &mut clock, &adjusted, khz)?;
        }
        adjusted = self.vcpus.start_clock(&self.vm, &mut clock, adjusted)?;
        if let Some(jump) = policies.fault.map(|fault| fault.tsc_jump(khz)).filter(|jump| *jump != 0) {
            adjusted.tsc = clock.bend(jump);
        }
        drop(clock);
        self.shared.begin_to_run();
        if adjusted.clamped {
            log::warn!("the wall clock went back while the VM was saved: the downtime counts as zero");
        }
        self.paused = None;
        let first_start = !self.has_run;
        self.has_run = true;
        if first_start {
            self.vcpus.publish_routes(&self.shared);
            self.trace_boot(&adjusted, khz);
            return Ok(None);
        }
        self.shared.audit.lock().restored(adjusted.vm);
        let restart = Restart { policies, moment: &moment, adjusted: &adjusted };
        for in_flight in self.vcpus.thaw(&self.vm, &self.shared, restart)? {
            self.trace_restore(policies, &adjusted, khz, &in_flight);
        }
        Ok(Some(Migration {
            from_khz: moment.khz,
            to_khz: khz,
            vm_ns: moment.vm,
            downtime_ns: adjusted.downtime_ns,
            clamped: adjusted.clamped,
        }))
    }

    fn trace_boot(&self, adjusted: &Adjusted, khz: Khz) {
        let source = self.shared.clock.lock().source();
        let now = Now::new(adjusted.tsc, adjusted.vm);
        self.shared.event(CpuIndex::FIRST, now, &Event::Boot { source: source.as_str(), tsc_khz: khz });
    }

    fn trace_restore(&self, policies: &Policies, adjusted: &Adjusted, tsc_khz: Khz, in_flight: &InFlight) {
        let InFlight { cpu, page_version, armed } = *in_flight;
        let event = Event::Restore {
            tsc_khz,
            page: adjusted.page,
            page_version,
            armed,
            deadline: policies.deadline,
            downtime: policies.downtime,
            downtime_ns: adjusted.downtime_ns,
            clamped: adjusted.clamped,
        };
        self.shared.event(cpu, Now::new(adjusted.tsc, adjusted.vm), &event);
    }
}
