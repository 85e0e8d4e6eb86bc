//! Resumes a paused machine.
//!
//! A resume, a restore and an in-process migration are one operation ([`Machine::resume`]) on a paused machine. The
//! clock starts again from the saved moment, perhaps at another frequency. Policies decide about the downtime and about
//! an armed deadline. Then the kvmclock page is published once. The order is that of a VMM with KVM's LAPIC: LAPIC
//! registers, TSC, deadline, page, GUEST_STOPPED. `resume_from` and `thaw` document what depends on what.

use std::{sync::atomic::Ordering, time::Duration};

use serde::Serialize;
use vmtime::{Adjusted, DowntimePolicy, Khz, Now, VmTime};

use super::{
    Machine,
    config::{LapicKind, TimeMode, source::TscSource},
    cpu_index::CpuIndex,
    downtime::{self, Downtime, Measured},
    error::RunError,
    guest_clock::ResumedClocks,
    paused::Paused,
    policy::{
        Policies, Restart, check_ratio,
        restorer::{Restorer, Saved},
    },
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
    /// VM time at the stop.
    pub vm_ns: VmTime,
    /// How far the resume advanced VM time, in nanoseconds.
    pub downtime_ns: u64,
    /// The wall clock had been set back; the downtime was taken as zero.
    pub clamped: bool,
    /// How the downtime was measured; none if it was not: under freeze, with a given length and in virtual time.
    #[serde(flatten)]
    pub measured: Option<Measured>,
}

impl Machine {
    /// Resumes a paused machine with the TSC frequency that it had, or that was passed to [`Self::from_state`].
    ///
    /// # Errors
    /// If the frequency is out of range, or a clock would leave its range.
    pub fn resume(&mut self, policies: &Policies) -> Result<Option<Migration>, RunError> {
        self.paused.map_or(Ok(None), |paused| self.resume_from(paused, policies, None))
    }

    /// Resumes a paused machine with the TSC frequency `khz`: its guest sees the same as in a migration to another
    /// host. A machine that has not run yet boots with the frequency that it was created with.
    ///
    /// # Errors
    /// As [`Self::resume`].
    pub fn resume_at(&mut self, khz: Khz, policies: &Policies) -> Result<Option<Migration>, RunError> {
        self.paused.map_or(Ok(None), |paused| self.resume_from(paused.with_khz(khz), policies, None))
    }

    /// As [`Self::resume_at`], but each vCPU continues as `restorer` says. Virtual time and LAPICs in user space only.
    ///
    /// # Errors
    /// As [`Self::resume`].
    pub(crate) fn resume_as(&mut self, khz: Khz, policies: &Policies, restorer: &dyn Restorer) -> Result<(), RunError> {
        let paused = self.paused;
        paused.map_or(Ok(()), |paused| self.resume_from(paused.with_khz(khz), policies, Some(restorer)).map(drop))
    }

    /// Checks that a resume of this machine can follow `policy`.
    ///
    /// # Errors
    /// The reason why it cannot.
    pub fn check_downtime(&self, policy: DowntimePolicy) -> Result<(), RunError> {
        if policy == DowntimePolicy::Steal && self.vcpus.lapic() == LapicKind::Kvm {
            return Err(RunError::Usage(
                "--downtime steal needs the VMM's own LAPICs (--lapic user): with KVM's, the guest is offered no steal \
                 time; use --downtime catch-up"
                    .to_owned(),
            ));
        }
        Ok(())
    }

    fn resume_from(
        &mut self,
        paused: Paused,
        policies: &Policies,
        restorer: Option<&dyn Restorer>,
    ) -> Result<Option<Migration>, RunError> {
        let moment = paused.moment;
        // A machine that has not run yet boots: no policy applies to it, and no frequency changes.
        let boot = Policies::default();
        let (policies, khz) = if self.has_run { (policies, paused.khz) } else { (&boot, moment.khz) };
        let mut clock = self.shared.clock.lock();
        let khz = clock.achievable_khz(khz);
        check_ratio(moment.khz, khz)?;
        let vcpus = self.vcpus.vcpu_tscs();
        // At boot the guest's TSC may begin with any value. So with source `host` it stays the host's own. With
        // `scaled` KVM adds an offset, so that it begins with the clock's value.
        let hold = clock.tsc_is_settable() && (self.has_run || clock.source() == TscSource::Scaled);
        // A TSC that is not held at its value is read before the clock starts, because the clock continues with it. One
        // that is held is set after the clock has started, because its value depends on the downtime.
        if !hold {
            tsc::measure_before_start(&vcpus, &mut clock, khz)?;
        }
        let host = clock.host();
        let downtime = match (policies.downtime_length, clock.mode(), policies.downtime) {
            (Some(length), _, _) => Downtime::given(length, host),
            (None, TimeMode::Real, policy) if policy.advances() => paused.downtime(host),
            // In virtual time a downtime is never measured, and under freeze it does not matter.
            _ => Downtime::given(Duration::ZERO, host),
        };
        let Downtime { stood, until: start, mut measured } = downtime;
        let mut adjusted = clock.start(&moment, khz, policies.downtime, (stood, start), hold)?;
        if hold {
            tsc::set_after_start(&vcpus, &mut clock, &adjusted, start, khz)?;
        }
        // After the TSCs: KVM's kvmclock computes its page from them.
        let off_ns;
        (adjusted, off_ns) = self.vcpus.start_clock(&self.vm, &mut clock, adjusted, start)?;
        if let Some(Measured { error_ns: Some(error_ns), .. }) = &mut measured {
            *error_ns = error_ns.saturating_add(off_ns);
        }
        let restorer = restorer.or(policies.restorer.as_deref());
        let restorer = restorer.filter(|_| self.vcpus.lapic() == LapicKind::User && self.has_run);
        let restored = restorer.map(|restorer| {
            let cpus = self.vcpus.saved(policies, &moment, &adjusted);
            let restored = restorer.restore(&Saved { moment, khz, own: adjusted, cpus });
            clock.continue_as(adjusted.tsc, &restored);
            adjusted = Adjusted {
                tsc: restored.tsc,
                vm: restored.page.vm_time(restored.tsc),
                page: restored.page,
                remainder: restored.remainder,
                ..adjusted
            };
            restored
        });
        let resume_tsc = clock.tsc_at(start);
        drop(clock);
        // Before any vCPU reads the clock. Otherwise the time of the pause would be taken for a gap in which no vCPU
        // ran.
        self.shared.begin_to_run();
        if adjusted.clamped {
            log::warn!("the wall clock went back while the VM was saved: the downtime counts as zero");
        }
        if let Some(measured) = measured {
            self.downtimes = self.downtimes.and(measured);
            downtime::log(&moment, adjusted.downtime_ns, measured);
        }
        self.paused = None;
        let first_start = !self.has_run;
        self.has_run = true;
        if first_start {
            self.vcpus.publish_routes(&self.shared);
            self.trace_boot(&adjusted, khz);
            self.begin_vmclock()?;
            return Ok(None);
        }
        self.shared.audit.lock().restored(adjusted.vm);
        if restored.as_ref().is_some_and(|restored| !restored.stable) {
            self.shared.tsc_stable.store(false, Ordering::SeqCst);
        }
        let pages = self.vcpus.kvmclock_pages();
        self.look_at_guest_stopped(&pages, &adjusted);
        let elapsed_ns = restored.as_ref().map_or(adjusted.downtime_ns, |restored| restored.elapsed_ns);
        if restored.as_ref().is_none_or(|restored| restored.vmclock) {
            self.continue_vmclock(&moment, stood, elapsed_ns, paused.is_here())?;
        }
        let restored = restored.as_ref().map_or(&[][..], |restored| &restored.cpus);
        let restart = Restart { policies, moment: &moment, adjusted: &adjusted, restored };
        let in_flight = self.vcpus.thaw(&self.vm, &self.shared, restart)?;
        for in_flight in &in_flight {
            self.trace_restore(policies, (&adjusted, measured), khz, in_flight);
        }
        let by_kvm = self.vcpus.lapic() == LapicKind::Kvm;
        self.guest_stopped.after_resume(&self.shared.memory, &pages, by_kvm);
        let armed = in_flight.iter().map(|in_flight| in_flight.armed.unwrap_or_default()).collect();
        self.resumed = Some(ResumedClocks { tsc: resume_tsc, adjusted, armed });
        Ok(Some(Migration {
            from_khz: moment.khz,
            to_khz: khz,
            vm_ns: moment.vm,
            downtime_ns: adjusted.downtime_ns,
            clamped: adjusted.clamped,
            measured,
        }))
    }

    /// Looks whether the guest has cleared PVCLOCK_GUEST_STOPPED since the last resume; traces it if not.
    fn look_at_guest_stopped(&mut self, pages: &[Option<u64>], adjusted: &Adjusted) {
        let kept = self.guest_stopped.before_resume(&self.shared.memory, pages);
        let now = Now::new(adjusted.tsc, adjusted.vm);
        for (cpu, resumes) in CpuIndex::all().zip(kept) {
            if let Some(resumes) = resumes {
                self.shared.event(cpu, now, &Event::GuestStoppedKept { resumes });
            }
        }
    }

    fn trace_boot(&self, adjusted: &Adjusted, khz: Khz) {
        let source = self.shared.clock.lock().source();
        let now = Now::new(adjusted.tsc, adjusted.vm);
        self.shared.event(CpuIndex::FIRST, now, &Event::Boot { source: source.as_str(), tsc_khz: khz });
    }

    fn trace_restore(
        &self,
        policies: &Policies,
        (adjusted, measured): (&Adjusted, Option<Measured>),
        tsc_khz: Khz,
        in_flight: &InFlight,
    ) {
        let InFlight { cpu, page_version, armed, steal_ns } = *in_flight;
        let event = Event::Restore {
            tsc_khz,
            page: adjusted.page,
            page_version,
            armed,
            deadline: policies.deadline,
            downtime: policies.downtime,
            downtime_ns: adjusted.downtime_ns,
            clamped: adjusted.clamped,
            steal_ns,
            measured,
        };
        self.shared.event(cpu, Now::new(adjusted.tsc, adjusted.vm), &event);
    }
}
