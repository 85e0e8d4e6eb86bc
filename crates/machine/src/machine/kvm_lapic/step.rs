//! The loop of one vCPU whose LAPIC is KVM's: enter, answer, look whether somebody wants it to stop.

use std::{sync::atomic::Ordering, time::Duration};

use vmtime::GuestTsc;

use super::{KvmCpu, vcpu::KvmLapicBus};
use crate::{
    host::kick::KickTimer,
    kvm::{Vcpu, state::MpState},
    machine::{
        error::RunError,
        shared::Shared,
        stop::{End, StopReason},
        vcpu::step,
        wake::pulse::Pulse,
    },
};

/// How often a vCPU that never exits is looked after. KVM does not tell of a HLT that nothing ends, nor anybody of a tick
/// ring that fills: it holds 1,024 records, which the guest's fastest tick writes in 102 ms.
const LOOK_AFTER: Duration = Duration::from_millis(50);

/// Runs `cpu` on the calling thread until it stops, `stop` is reached or somebody wants it to come back.
pub fn run(
    cpu: &mut KvmCpu,
    shared: &Shared,
    wanted: &dyn Fn() -> bool,
    stop: Option<GuestTsc>,
) -> Result<StopReason, RunError> {
    let Some(vcpu_shared) = shared.vcpu(cpu.index) else { return Err(RunError::Cpus(cpu.index)) };
    // A vCPU whose state was just set has nothing in the shared page yet.
    cpu.drain(shared)?;
    let _binding = cpu.vcpu.bind();
    let timer = KickTimer::new()?;
    let mut pulse = Pulse::new()?;
    let mut first = true;
    vcpu_shared.doorbell.attach();
    let result = loop {
        let kicked = cpu.vcpu.clear_kicks();
        vcpu_shared.doorbell.clear();
        if wanted() || shared.stopping.load(Ordering::SeqCst) {
            break Ok(StopReason::Requested);
        }
        let (host, read, reached) = {
            let (clock, read) = shared.read_clock();
            (clock.host(), read, stop.is_some_and(|stop| clock.tsc_at(read) >= stop))
        };
        if shared.has_gap() {
            break Ok(StopReason::Requested);
        }
        if !reached && shared.waits_for_reader() {
            timer.arm(LOOK_AFTER);
            // It is not the host that keeps it from running.
            vcpu_shared.last_run.idle(read, None);
            vcpu_shared.doorbell.sleep();
            continue;
        }
        if kicked {
            pulse.came(read);
        }
        if !pulse.enter(shared, vcpu_shared, host, read) {
            continue;
        }
        match step(cpu, shared, stop, (kicked || std::mem::take(&mut first)).then_some(&timer)) {
            Ok(None) => {}
            Ok(Some(stop)) => break Ok(stop),
            Err(error) => break Err(error),
        }
    };
    vcpu_shared.doorbell.detach();
    cpu.drain(shared)?;
    shared.costs.add(cpu.vcpu.take_calls());
    shared.read_rings();
    result
}

/// Enters once. `timer` is to be set again, and the vCPU looked after.
fn step(
    cpu: &mut KvmCpu,
    shared: &Shared,
    stop: Option<GuestTsc>,
    timer: Option<&KickTimer>,
) -> Result<Option<StopReason>, RunError> {
    // An instruction that was completed after its exit may have ended the machine.
    if let Some(exit) = shared.devices.lock().take_exit() {
        return Ok(Some(StopReason::Ended(End::Guest(exit))));
    }
    if let Some(timer) = timer {
        if cpu.index == 0 {
            shared.read_rings();
        }
        if shared.vcpus.len() == 1 && halted_for_ever(&mut cpu.vcpu)? {
            return Ok(Some(StopReason::Ended(End::HaltedForever(step::at(cpu.index, &mut cpu.vcpu)))));
        }
        let left = match stop {
            None => LOOK_AFTER,
            Some(stop) => {
                let left = shared.clock.lock().until(stop).unwrap_or(LOOK_AFTER);
                if left.is_zero() {
                    return Ok(Some(StopReason::Reached));
                }
                left.min(LOOK_AFTER)
            }
        };
        timer.arm(left);
    }
    let exit = cpu.vcpu.run(&mut KvmLapicBus { index: cpu.index, shared })?;
    let end = match shared.devices.lock().take_exit() {
        Some(exit) => Some(End::Guest(exit)),
        None => step::cannot_go_on(cpu.index, &mut cpu.vcpu, shared, exit)?,
    };
    Ok(end.map(StopReason::Ended))
}

/// Whether the only vCPU halts with interrupts off. An NMI could wake it, and nobody is there to send one.
fn halted_for_ever(vcpu: &mut Vcpu) -> Result<bool, RunError> {
    Ok(!vcpu.interrupts_enabled() && vcpu.mp_state()? == MpState::Halted)
}
