//! The virtual wire: from the 8259 pair to LINT0 of the first CPU.
//!
//! Only the first CPU is wired to it, as PCs are after firmware. Its vCPU samples the line at each step. While it is
//! idle, the next edge of the 8254 wakes it as its LAPIC's timer does.

use vlapic::LocalSource;
use vmtime::GuestTsc;

use super::{Cpu, Local, ipi};
use crate::{
    devices::Devices,
    machine::{clock::Clock, cpu_index::CpuIndex, error::RunError, shared::Shared},
};

/// Sets LINT0 of `cpu`, if it is the first, to the `level` of the line.
pub(crate) fn sample(cpu: &mut Cpu, shared: &Shared, level: bool) -> Result<(), RunError> {
    if cpu.local.index != CpuIndex::FIRST {
        return Ok(());
    }
    let delivery = cpu.local.apic.local(LocalSource::Lint0, level);
    ipi::carry_out(cpu, shared, delivery)
}

/// Acknowledges the 8259 pair's interrupt and returns its vector. The next sample shows whether another one waits.
pub(crate) fn acknowledge(local: &mut Local, shared: &Shared) -> u8 {
    let mut devices = shared.devices.lock();
    let vector = devices.acknowledge();
    // The acknowledgement lowers the line, even if it rises again at once.
    let _ = local.apic.local(LocalSource::Lint0, false);
    vector
}

/// The base TSC at which the line can next interrupt this CPU; none if it cannot.
pub(crate) fn due(local: &Local, devices: &Devices, clock: &Clock) -> Option<GuestTsc> {
    if local.index != CpuIndex::FIRST || !local.apic.heeds_lint0() {
        return None;
    }
    // Another CPU's access of the 8259 pair can have raised the line since it was sampled.
    if devices.interrupts() {
        return (!local.apic.lint0()).then(|| clock.tsc());
    }
    clock.least_tsc(devices.next_interrupt()?)
}
