//! The virtual wire: from the 8259 pair to LINT0 of the first CPU.
//!
//! Only the first CPU has it, as PCs leave it after firmware. Its vCPU samples the line at each turn, and in between
//! waits for the timer's next edge as it waits for its LAPIC's.

use vlapic::LocalSource;
use vmtime::{GuestTsc, Now};

use super::{Cpu, Local, ipi};
use crate::machine::{clock::Clock, cpu_index::CpuIndex, error::RunError, shared::Shared};

/// Gives `cpu`, if it is the first, the level of the line at `now`.
pub(crate) fn sample(cpu: &mut Cpu, shared: &Shared, now: Now) -> Result<(), RunError> {
    if cpu.local.index != CpuIndex::FIRST {
        return Ok(());
    }
    let level = {
        let mut devices = shared.devices.lock();
        devices.advance(now.vm);
        devices.interrupts()
    };
    let delivery = cpu.local.apic.local(LocalSource::Lint0, level);
    ipi::carry_out(cpu, shared, delivery)
}

/// The CPU takes the 8259's interrupt: its vector. Later ones show at the next sample.
pub(crate) fn acknowledge(local: &mut Local, shared: &Shared) -> u8 {
    let mut devices = shared.devices.lock();
    let vector = devices.acknowledge();
    // The line falls, if only to rise again at once.
    let _ = local.apic.local(LocalSource::Lint0, false);
    vector
}

/// The base TSC at which the line can next ask something of this CPU; none if nothing is to be waited for.
pub(crate) fn due(local: &Local, shared: &Shared, clock: &Clock) -> Option<GuestTsc> {
    if local.index != CpuIndex::FIRST || !local.apic.heeds_lint0() {
        return None;
    }
    let devices = shared.devices.lock();
    // Another CPU's access of the 8259 pair can have raised the line since it was sampled.
    if devices.interrupts() {
        return (!local.apic.lint0()).then(|| clock.tsc());
    }
    clock.least_tsc(devices.next_interrupt()?)
}
