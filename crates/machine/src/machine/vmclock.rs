//! The machine's VMClock page: when it is written, and what is real time.
//!
//! It is written at boot and at the end of each resume. The marker then says that the TSC was disrupted: it stood
//! still, or its value or rate was set. A resume after which the TSC is where it would have been is no exception,
//! because the host's clocks have an error.
//!
//! With vCPUs whose TSCs the guest has set, the page is that of the base TSC. So it is for a guest that leaves its TSCs
//! alone, as Linux does.

use guest_abi::vmclock::Instant;
use kvm_pv::{
    RegistrationFault,
    vmclock::{self, Cause, RealTime},
};
use vmtime::{GuestTsc, Moment, Stood};

use super::{
    Machine,
    clock::{Clock, VIRTUAL_EPOCH_NS},
    config::TimeMode,
    error::RunError,
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
        vmclock::publish(address, &now, Cause::Boot, &Ram(&self.shared.memory)).map_err(lost)
    }

    /// Writes the page of a machine that was resumed from `saved`, where it had stood for `stood`. In virtual time real
    /// time has gone on by that, or by the `elapsed_ns` for which the restore let the TSC go on, if that is longer.
    pub(super) fn continue_vmclock(
        &self,
        saved: &Moment,
        stood: Stood,
        elapsed_ns: u64,
        cause: Cause,
    ) -> Result<(), RunError> {
        let Some(address) = self.vmclock_address() else { return Ok(()) };
        let ram = Ram(&self.shared.memory);
        let clock = self.shared.clock.lock();
        let now = match clock.mode() {
            TimeMode::Real => real_time(&clock),
            TimeMode::Virtual => {
                // A restore into virtual time from a snapshot of real time goes on from what the page says, too.
                let stopped = vmclock::read(address, &ram).map_err(lost)?.at(saved.tsc.0);
                let stood_ns = match stood {
                    Stood::For(length) => u64::try_from(length.as_nanos()).unwrap_or(u64::MAX),
                    Stood::UntilWall(_) => 0,
                };
                virtual_time(&clock, stopped.plus(Instant::from_ns(stood_ns.max(elapsed_ns))))
            }
        };
        drop(clock);
        vmclock::publish(address, &now, cause, &ram).map_err(lost)
    }

    /// How far real time by the VMClock page is ahead of the host's (negative: behind), in nanoseconds. None without a
    /// page, in virtual time, and while the guest's TSC stands still.
    #[must_use]
    pub fn vmclock_error_ns(&self) -> Option<i64> {
        let page = vmclock::read(self.vmclock_address()?, &Ram(&self.shared.memory)).ok()?;
        let clock = self.shared.clock.lock();
        if clock.mode() == TimeMode::Virtual || clock.is_stopped() {
            return None;
        }
        let RealTime { tsc: GuestTsc(tsc), utc, .. } = real_time(&clock);
        Some(page.at(tsc).ns().wrapping_sub(utc.ns()).cast_signed())
    }
}

/// The guest's TSC and the host's wall clock, read together.
fn real_time(clock: &Clock) -> RealTime {
    let WallReading { real, tai_offset_s } = WallReading::now(clock.host());
    let (tsc, khz, utc) = (clock.tsc_at(real.tsc), clock.khz(), Instant::from_ns(real.ns));
    RealTime { tsc, khz, utc, error_ns: real.error_ns, tai_offset_s }
}

/// In virtual time real time is `utc`, exactly, and nobody knows of leap seconds.
fn virtual_time(clock: &Clock, utc: Instant) -> RealTime {
    RealTime { tsc: clock.tsc(), khz: clock.khz(), utc, error_ns: Some(0), tai_offset_s: None }
}

fn lost(fault: RegistrationFault) -> RunError {
    RunError::BadState(format!("the VMClock page that the guest's CPUID tells of is lost: {fault}"))
}
