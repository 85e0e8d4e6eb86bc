//! The loop of one vCPU whose LAPIC is KVM's: enters the guest, emulates its accesses, and checks for requests to stop.

use std::{sync::atomic::Ordering, time::Duration};

use vmtime::GuestTsc;

use super::{KvmCpu, vcpu::KvmLapicBus};
use crate::{
    host::kick::KickTimer,
    kvm::{Vcpu, state::MpState},
    machine::{
        cpu_index::CpuIndex,
        error::RunError,
        shared::Shared,
        stop::{End, StopReason},
        vcpu::{assist, step},
        wake::pulse::Pulse,
    },
};

/// How often a vCPU that never exits is interrupted, for two checks. KVM does not report a HLT that no interrupt can
/// end. And the tick ring must be read before it is full: it holds 1,024 records, which the guest's fastest tick writes
/// in 102 ms.
const CHECK_EVERY: Duration = Duration::from_millis(50);

/// Runs `cpu` on the calling thread until it stops, `stop` is reached or `stop_requested` returns true.
pub fn run(
    cpu: &mut KvmCpu,
    shared: &Shared,
    stop_requested: &dyn Fn() -> bool,
    stop: Option<GuestTsc>,
) -> Result<StopReason, RunError> {
    let Some(vcpu_shared) = shared.vcpu(cpu.index) else { return Err(RunError::Cpus(cpu.index.get())) };
    // The kvm_run page of a vCPU whose state was just set does not show that state yet. Draining updates it.
    cpu.drain(shared)?;
    let _binding = cpu.vcpu.bind();
    let timer = KickTimer::new()?;
    let mut pulse = Pulse::new()?;
    let mut first = true;
    vcpu_shared.doorbell.attach();
    let result = loop {
        let kicked = cpu.vcpu.clear_kicks();
        vcpu_shared.doorbell.clear();
        if stop_requested() || shared.stopping.load(Ordering::SeqCst) {
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
            timer.arm(CHECK_EVERY);
            // This wait is not a stop by the host.
            vcpu_shared.last_run.note_idle(read, None);
            vcpu_shared.doorbell.sleep();
            continue;
        }
        if kicked {
            pulse.take_expired(read);
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
    cpu.note_page(shared)?;
    shared.costs.add(cpu.vcpu.take_calls());
    shared.read_rings();
    result
}

/// Enters the guest once. With `timer`, first does the checks of [`CHECK_EVERY`] and sets the timer again.
fn step(
    cpu: &mut KvmCpu,
    shared: &Shared,
    stop: Option<GuestTsc>,
    timer: Option<&KickTimer>,
) -> Result<Option<StopReason>, RunError> {
    // Draining completes an instruction after its exit, and that access may have ended the machine.
    if let Some(exit) = shared.devices.lock().take_exit() {
        return Ok(Some(StopReason::Ended(End::Guest(exit))));
    }
    if let Some(timer) = timer {
        cpu.note_page(shared)?;
        if cpu.index == CpuIndex::FIRST {
            shared.read_rings();
        }
        if shared.vcpus.len() == 1 && halted_for_ever(&mut cpu.vcpu)? {
            return Ok(Some(StopReason::Ended(End::HaltedForever(step::at(cpu.index, &mut cpu.vcpu)))));
        }
        let left = match stop {
            None => CHECK_EVERY,
            Some(stop) => {
                let left = shared.clock.lock().until(stop).unwrap_or(CHECK_EVERY);
                if left.is_zero() {
                    return Ok(Some(StopReason::Reached));
                }
                left.min(CHECK_EVERY)
            }
        };
        timer.arm(left);
    }
    let exit = assist::run(&mut cpu.vcpu, shared, &mut KvmLapicBus { index: cpu.index, shared })?;
    let end = match shared.devices.lock().take_exit() {
        Some(exit) => Some(End::Guest(exit)),
        None => step::fatal_end(cpu.index, &mut cpu.vcpu, shared, exit)?,
    };
    Ok(end.map(StopReason::Ended))
}

/// Whether the only vCPU is halted with interrupts off. Only an NMI could wake it, and there is no other vCPU to send
/// one.
fn halted_for_ever(vcpu: &mut Vcpu) -> Result<bool, RunError> {
    Ok(!vcpu.interrupts_enabled() && vcpu.mp_state()? == MpState::Halted)
}
