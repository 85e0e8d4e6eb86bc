//! Sets the vCPUs' TSCs in KVM to what the machine's clock says, unless the VMM emulates RDTSC.

use vmtime::{Adjusted, HostTsc, Khz, TscAdjust};

use crate::{
    kvm::{ScaledTsc, Vcpu},
    machine::{clock::Clock, config::source::TscSource, error::RunError},
};

/// A vCPU, and how far its TSC is ahead of the machine's.
pub(crate) type VcpuTsc<'a> = (&'a Vcpu, TscAdjust);

/// Call it before the clock is started, if the TSC does not continue from its value at the stop: the clock then
/// continues with the TSC that KVM has.
pub(crate) fn measure_before_start(vcpus: &[VcpuTsc<'_>], clock: &mut Clock, khz: Khz) -> Result<(), RunError> {
    let host_khz = clock.host().as_it_is().khz();
    match clock.source() {
        TscSource::Trapped => {}
        TscSource::Host => {
            for (vcpu, adjust) in vcpus {
                // A probe has shown that the TSC is then the host's.
                drop(vcpu.set_tsc_offset(adjust.0));
            }
        }
        TscSource::Scaled => {
            for (vcpu, _) in vcpus {
                vcpu.set_tsc_khz(khz.get())?;
                let ScaledTsc { host, guest, rate } = vcpu.scaled_tsc(khz, host_khz)?;
                clock.follow_scaled_tsc(host, guest, rate);
            }
        }
    }
    Ok(())
}

/// Call it after the clock was started at `adjusted`, when the host's TSC was `start`, if the TSC can be set: sets the
/// offset with which KVM continues that TSC. All vCPUs have the same offset, so that their TSCs are equal.
pub(crate) fn set_after_start(
    vcpus: &[VcpuTsc<'_>],
    clock: &mut Clock,
    adjusted: &Adjusted,
    start: HostTsc,
    khz: Khz,
) -> Result<(), RunError> {
    let host_khz = clock.host().as_it_is().khz();
    let offset = match clock.source() {
        TscSource::Trapped => return Ok(()),
        TscSource::Host => clock.ahead_of_host(),
        TscSource::Scaled => {
            let Some((first, _)) = vcpus.first() else { return Ok(()) };
            // The frequency first: setting it may restart the TSC.
            vcpus.iter().try_for_each(|(vcpu, _)| vcpu.set_tsc_khz(khz.get()))?;
            // KVM adds the offset to the scaled TSC of the host.
            first.set_tsc_offset(0)?;
            let ScaledTsc { host, guest, rate } = first.scaled_tsc(khz, host_khz)?;
            clock.follow_scaled_tsc(start, adjusted.tsc, rate);
            // The clock has counted since `start`, and the guest's TSC is to have the same value.
            clock.tsc_at(host).0.wrapping_sub(guest.0)
        }
    };
    clock.set_vcpu_offset(offset);
    vcpus.iter().try_for_each(|(vcpu, adjust)| Ok(vcpu.set_tsc_offset(offset.wrapping_add(adjust.0))?))
}
