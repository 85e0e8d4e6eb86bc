//! Starting a paused machine again.
//!
//! A resume, a restore and an in-process migration are one operation ([`Machine::resume`]) on a paused machine: the clock
//! starts again from the saved moment at a frequency, policies decide about downtime and the deadline in flight, and the
//! page is published once with all of it. A real host does this in an order (LAPIC, TSC, deadline, page, GUEST_STOPPED);
//! see the comments in `resume` for what depends on what.

use std::{sync::atomic::Ordering, time::Duration};

use serde::Serialize;
use vlapic::Armed;
use vmtime::{Adjusted, DowntimePolicy, Khz, Moment, Now, Stood, VmTime};

use super::{
    Machine,
    config::{TimeMode, source::TscSource},
    error::RunError,
    kvm_lapic::{self, Thaw},
    policy::{Policies, check_ratio, deadline::rearm, fault::InjectedFault},
    record::trace::Event,
    shared::{Ram, Shared, lock},
    vcpu::{Cpu, Local, ipi, tsc},
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
    /// Starts a paused machine again.
    ///
    /// # Errors
    /// If the frequency is out of range, or a clock would leave its range.
    pub fn resume(&mut self, policies: &Policies) -> Result<Option<Migration>, RunError> {
        let Some(paused) = self.paused else { return Ok(None) };
        let moment = paused.moment;
        // Before its first instruction a machine was neither saved nor down.
        let boot = Policies::default();
        let policies = if self.has_run { policies } else { &boot };
        let mut clock = lock(&self.shared.clock);
        let khz = clock.possible(policies.khz.unwrap_or(moment.khz));
        check_ratio(moment.khz, khz)?;
        let ours = self.cpus.iter().map(|Cpu { vcpu, local }| (vcpu, local.tsc_adjust));
        let kvms = self.in_kernel.iter().flatten().map(|cpu| (&cpu.vcpu, cpu.tsc_adjust()));
        let vcpus: Vec<_> = ours.chain(kvms).collect();
        // Before its first start a TSC may be any; the host's is then the host's own, and what KVM scales is set to the clock's.
        let hold = clock.tsc_moves() && (self.has_run || clock.source() == TscSource::Scaled);
        if !hold {
            tsc::prepare(&vcpus, &mut clock, khz)?;
        }
        let host_stop = policies.fault.and_then(InjectedFault::host_stop);
        // To a guest that nobody stops, its clocks go on as at a catch-up.
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
        if self.in_kernel.is_some() {
            adjusted = kvm_lapic::start_clock(&self.vm, &mut clock, &adjusted)?;
        }
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
            for Cpu { local, .. } in &self.cpus {
                ipi::publish_route(&self.shared, local);
            }
            self.trace_boot(&adjusted, khz);
            return Ok(None);
        }
        lock(&self.shared.audit).restored(adjusted.vm);
        for index in 0..self.cpus.len() {
            self.resume_cpu(index, policies, &moment, &adjusted)?;
        }
        let thaw = Thaw { vm: &self.vm, policies, moment: &moment, adjusted: &adjusted };
        for cpu in self.in_kernel.iter_mut().flatten() {
            let page_version = cpu.page_version(&self.shared);
            let armed = some(thaw.cpu(cpu)?);
            trace_restore(&self.shared, cpu.index, policies, &adjusted, khz, page_version, armed);
        }
        Ok(Some(Migration {
            from_khz: moment.khz,
            to_khz: khz,
            vm_ns: moment.vm,
            downtime_ns: adjusted.downtime_ns,
            clamped: adjusted.clamped,
        }))
    }

    fn resume_cpu(
        &mut self,
        index: usize,
        policies: &Policies,
        moment: &Moment,
        adjusted: &Adjusted,
    ) -> Result<(), RunError> {
        let Some(Cpu { local, .. }) = self.cpus.get_mut(index) else { return Ok(()) };
        let now = Now::new(adjusted.tsc, adjusted.vm).ahead(local.tsc_adjust);
        // LAPIC registers are in place already: writing a deadline before LVTT selects deadline mode would drop it.
        let mut armed_now = rearm(local.apic.armed(), local.tsc_adjust, policies.deadline, moment, adjusted);
        if let Some(fault) = policies.fault {
            armed_now = fault.armed(armed_now, local.apic.in_deadline_mode(), now);
        }
        local.apic.rearm(armed_now, now).map_err(|error| RunError::BadState(error.to_string()))?;
        ipi::publish_route(&self.shared, local);
        if let Some(vcpu_shared) = self.shared.vcpus.get(index) {
            vcpu_shared.page.store(local.pvclock.address().unwrap_or(0), Ordering::Relaxed);
            vcpu_shared.tsc_adjust.store(local.tsc_adjust, Ordering::Relaxed);
        }
        // The page last: from here on the guest computes with the new numbers. GUEST_STOPPED goes with it, at resume and
        // not at save, so that a snapshot taken twice is the same snapshot.
        let (page, khz) = {
            let clock = lock(&self.shared.clock);
            (clock.page(local.tsc_adjust), clock.khz())
        };
        let flags = self.shared.page_flags();
        local.published_flags = flags;
        let page = policies.fault.map_or(Some(page), |fault| fault.page(page, khz));
        if let Some(page) = page {
            local
                .pvclock
                .publish(
                    &Ram(&self.shared.memory),
                    &page,
                    flags,
                    policies.fault.is_none_or(InjectedFault::tells_stopped),
                )
                .map_err(|fault| RunError::BadState(fault.to_string()))?;
        }
        let version = local.pvclock.state().version;
        trace_restore(&self.shared, local.index, policies, adjusted, khz, version, armed(local));
        Ok(())
    }

    fn trace_boot(&self, adjusted: &Adjusted, khz: Khz) {
        let source = lock(&self.shared.clock).source();
        let now = Now::new(adjusted.tsc, adjusted.vm);
        self.shared.event(0, now, &Event::Boot { source: source.as_str(), tsc_khz: khz });
    }
}

fn trace_restore(
    shared: &Shared,
    cpu: u32,
    policies: &Policies,
    adjusted: &Adjusted,
    tsc_khz: Khz,
    page_version: u32,
    armed: Option<Armed>,
) {
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
    shared.event(cpu, Now::new(adjusted.tsc, adjusted.vm), &event);
}

pub(super) fn armed(local: &Local) -> Option<Armed> {
    some(local.apic.armed())
}

pub(super) fn some(armed: Armed) -> Option<Armed> {
    (armed != Armed::Disarmed).then_some(armed)
}
