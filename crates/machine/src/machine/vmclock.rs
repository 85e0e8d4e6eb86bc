//! The machine's VMClock page: when it is written, and what is real time.
//!
//! It is written at boot, and in each resume before a vCPU runs. The marker then says that the TSC was disrupted: it
//! stood still, or its value or rate was set. A resume after which the TSC is where it would have been is no exception,
//! because the host's clocks have an error.
//!
//! With vCPUs whose TSCs the guest has set, the page is that of the base TSC. So it is for a guest that leaves its TSCs
//! alone, as Linux does.

use std::hash::{BuildHasher, RandomState};

use guest_abi::vmclock::{Instant, MAGIC, VmClock};
use kvm_pv::{
    RegistrationFault,
    vmclock::{self, Cause, RealTime},
};
use vmtime::{GuestTsc, Moment, Now, Stood};

use super::{
    Machine,
    clock::{Clock, VIRTUAL_EPOCH_NS},
    config::TimeMode,
    cpu_index::CpuIndex,
    error::RunError,
    record::trace::Event,
    shared::Ram,
};
use crate::{boot::cpuid, host::os_clocks::WallReading};

impl Machine {
    /// Guest physical address of the VMClock page; none if the guest was not offered one.
    #[must_use]
    pub(crate) fn vmclock_address(&self) -> Option<u64> {
        self.cpuid.first().and_then(|leaves| cpuid::vmclock_address(leaves))
    }

    /// Writes the page of a machine that boots.
    pub(super) fn begin_vmclock(&self) -> Result<(), RunError> {
        let Some(address) = self.vmclock_address() else { return Ok(()) };
        let clock = self.shared.clock.lock();
        let now = match clock.mode() {
            TimeMode::Real => real_time(&clock),
            TimeMode::Virtual => virtual_time(&clock, Instant::from_ns(VIRTUAL_EPOCH_NS)),
        };
        drop(clock);
        self.publish_vmclock(address, &now, Cause::Boot)
    }

    /// Writes the page of a machine that was resumed from `saved`, where it had stood for `stood`. In virtual time real
    /// time has gone on by that, or by the `elapsed_ns` for which the restore let the TSC go on, if that is longer.
    /// `here`: the machine was stopped in this process, and nobody else continues it.
    pub(super) fn continue_vmclock(
        &self,
        saved: &Moment,
        stood: Stood,
        elapsed_ns: u64,
        here: bool,
    ) -> Result<(), RunError> {
        let Some(address) = self.vmclock_address() else { return Ok(()) };
        let clock = self.shared.clock.lock();
        let mode = clock.mode();
        let now = match mode {
            TimeMode::Real => real_time(&clock),
            TimeMode::Virtual => {
                // The page is where UTC is kept: a snapshot of real time goes on from there, too. It has none if the
                // machine was saved before it ever ran.
                let page = vmclock::read(address, &Ram(&self.shared.memory)).map_err(lost)?;
                let begun = Some(page).filter(|page| page.magic == MAGIC);
                let stopped = begun.map_or(Instant::from_ns(VIRTUAL_EPOCH_NS), |page| page.utc_at(saved.tsc.0));
                let stood_ns = match stood {
                    Stood::For(length) => u64::try_from(length.as_nanos()).unwrap_or(u64::MAX),
                    Stood::UntilWall(_) => 0,
                };
                virtual_time(&clock, stopped.plus(Instant::from_ns(stood_ns.max(elapsed_ns))))
            }
        };
        drop(clock);
        let cause = match (here, mode) {
            (true, _) => Cause::Disrupted,
            // The standard library's hasher has random keys. In virtual time nothing is random.
            (false, TimeMode::Real) => Cause::Restored { generation: Some(RandomState::new().hash_one(now.tsc.0)) },
            (false, TimeMode::Virtual) => Cause::Restored { generation: None },
        };
        self.publish_vmclock(address, &now, cause)
    }

    fn publish_vmclock(&self, address: u64, now: &RealTime, cause: Cause) -> Result<(), RunError> {
        let page = vmclock::publish(address, now, cause, &Ram(&self.shared.memory)).map_err(lost)?;
        let VmClock { disruption_marker: marker, vm_generation_counter: generation, .. } = page;
        let vm = self.shared.clock.lock().vm_time(now.tsc);
        let event = Event::Vmclock { marker, generation, utc_ns: now.utc.ns() };
        self.shared.event(CpuIndex::FIRST, Now::new(now.tsc, vm), &event);
        Ok(())
    }

    /// How far UTC by the VMClock page is ahead of the host's (negative: behind), in nanoseconds. None without a page,
    /// in virtual time, and while the guest's TSC stands still.
    #[must_use]
    pub fn vmclock_error_ns(&self) -> Option<i64> {
        let page = vmclock::read(self.vmclock_address()?, &Ram(&self.shared.memory)).ok()?;
        let clock = self.shared.clock.lock();
        if clock.mode() == TimeMode::Virtual || clock.is_stopped() {
            return None;
        }
        let RealTime { tsc: GuestTsc(tsc), utc, .. } = real_time(&clock);
        Some(page.utc_at(tsc).ns().wrapping_sub(utc.ns()).cast_signed())
    }
}

/// The guest's TSC and the host's wall clock, read together.
fn real_time(clock: &Clock) -> RealTime {
    let host = clock.host();
    let WallReading { real, tai_offset_s } = WallReading::now(host);
    let (tsc, khz, utc) = (clock.tsc_at(real.tsc), clock.khz(), Instant::from_ns(real.ns));
    let sync_error_ns = (host.os_clocks().sync_error_ns)();
    let error_ns = sync_error_ns.zip(real.error_ns).map(|(sync, reading)| sync.saturating_add(reading));
    RealTime { tsc, khz, utc, error_ns, tai_offset_s }
}

/// In virtual time UTC is `utc`, exactly, and nobody knows of leap seconds.
fn virtual_time(clock: &Clock, utc: Instant) -> RealTime {
    RealTime { tsc: clock.tsc(), khz: clock.khz(), utc, error_ns: Some(0), tai_offset_s: None }
}

fn lost(fault: RegistrationFault) -> RunError {
    RunError::BadState(format!("the VMClock page that the guest's CPUID tells of is not there: {fault}"))
}
