//! Gives vCPUs the TSC that the machine's clock says they have, where KVM provides it.

use vmtime::{Adjusted, Khz, TscAdjust};

use crate::{
    kvm::Vcpu,
    machine::{clock::Clock, config::source::TscSource, error::RunError},
};

/// A vCPU, and how far its TSC is ahead of the machine's.
pub(crate) type Of<'a> = (&'a Vcpu, TscAdjust);

/// Before the clock is started: where the TSC cannot be moved, the clock has to be told what it is.
pub(crate) fn prepare(vcpus: &[Of<'_>], clock: &mut Clock, khz: Khz) -> Result<(), RunError> {
    match clock.source() {
        TscSource::Trapped => {}
        TscSource::Host => {
            for (vcpu, adjust) in vcpus {
                // A probe saw that the TSC then is the host's.
                drop(vcpu.set_tsc_offset(adjust.0));
            }
        }
        TscSource::Scaled => {
            for (vcpu, _) in vcpus {
                vcpu.set_tsc_khz(khz.get())?;
                let (host, tsc) = vcpu.measured_tsc()?;
                clock.measured(host, tsc, khz);
            }
        }
    }
    Ok(())
}

/// After the clock was started at `adjusted`, whose TSC KVM can provide by an offset: the same one for all vCPUs, so that
/// their TSCs are equal.
pub(crate) fn set(vcpus: &[Of<'_>], clock: &mut Clock, adjusted: &Adjusted, khz: Khz) -> Result<(), RunError> {
    let offset = match clock.source() {
        TscSource::Trapped => return Ok(()),
        TscSource::Host => clock.ahead_of_host(),
        TscSource::Scaled => {
            let Some((first, _)) = vcpus.first() else { return Ok(()) };
            // The frequency first: KVM may start the TSC anew with it.
            vcpus.iter().try_for_each(|(vcpu, _)| vcpu.set_tsc_khz(khz.get()))?;
            // KVM adds the offset to the scaled TSC of the host.
            first.set_tsc_offset(0)?;
            let (host, scaled) = first.measured_tsc()?;
            clock.measured(host, adjusted.tsc, khz);
            adjusted.tsc.0.wrapping_sub(scaled.0)
        }
    };
    clock.set_vcpu_offset(offset);
    vcpus.iter().try_for_each(|(vcpu, adjust)| Ok(vcpu.set_tsc_offset(offset.wrapping_add(adjust.0))?))
}
