//! Runs the vCPUs: in real time each on a thread of its own, in virtual time all on one thread (`round_robin`).

pub mod mailbox;
pub mod round_robin;

use std::{sync::atomic::Ordering, thread};

use vmtime::GuestTsc;

use self::{
    mailbox::RequestSource,
    round_robin::{RoundRobin, Until},
};
use super::{
    error::RunError,
    shared::Shared,
    stop::StopReason,
    vcpu::{
        Cpu,
        step::{self, Pace, Stepped},
    },
    wake::wake_timer::WakeTimer,
};
use crate::host::kick;

/// The loop of one vCPU: runs it on the calling thread until it stops, the third argument returns true, the TSC of the
/// fourth argument is reached, or [`Shared::stop_all`] is called.
pub(crate) type VcpuLoop<C> = fn(&mut C, &Shared, &dyn Fn() -> bool, Option<GuestTsc>) -> Result<StopReason, RunError>;

/// Runs all vCPUs, each on its thread, until one of them stops or a request waits in the mailbox.
pub(crate) fn run_threads<C: Send>(
    cpus: &mut [C],
    shared: &Shared,
    mailbox: &impl RequestSource,
    stop: Option<GuestTsc>,
    run: VcpuLoop<C>,
) -> Result<StopReason, RunError> {
    let Some((first, others)) = cpus.split_first_mut() else { return Err(RunError::Cpus(0)) };
    shared.stopping.store(false, Ordering::SeqCst);
    let results: Vec<Result<StopReason, RunError>> = thread::scope(|scope| {
        let threads: Vec<_> = others
            .iter_mut()
            .enumerate()
            .map(|(others, cpu)| {
                let name = format!("vcpu{}", others + 1);
                thread::Builder::new()
                    .name(name)
                    .spawn_scoped(scope, move || run_one(cpu, shared, &|| false, stop, run))
            })
            .collect();
        let mut results = Vec::new();
        // If one thread cannot be started, the others stop.
        if threads.iter().any(Result::is_err) {
            shared.stop_all();
        } else {
            results.push(run_one(first, shared, &|| mailbox.has_request(), stop, run));
        }
        for thread in threads {
            results.push(match thread.map(thread::ScopedJoinHandle::join) {
                Ok(Ok(result)) => result,
                Ok(Err(_)) => Err(RunError::Thread("it panicked".to_owned())),
                Err(error) => Err(RunError::Thread(error.to_string())),
            });
        }
        results
    });
    // A vCPU that returns because of a request does not read the clock first. A gap that ended just before the request
    // is found here.
    drop(shared.read_clock());
    results.into_iter().try_fold(StopReason::Requested, |so_far, result| Ok(so_far.or(result?)))
}

/// Runs one vCPU on the calling thread. When it stops, makes the others stop.
fn run_one<C>(
    cpu: &mut C,
    shared: &Shared,
    stop_requested: &dyn Fn() -> bool,
    stop: Option<GuestTsc>,
    run: VcpuLoop<C>,
) -> Result<StopReason, RunError> {
    let result = run(cpu, shared, stop_requested, stop);
    shared.stop_all();
    result
}

/// The loop of a vCPU with a LAPIC in user space.
pub(crate) fn run_vcpu(
    cpu: &mut Cpu,
    shared: &Shared,
    stop_requested: &dyn Fn() -> bool,
    stop: Option<GuestTsc>,
) -> Result<StopReason, RunError> {
    let Some(vcpu_shared) = shared.vcpu(cpu.local.index) else { return Err(RunError::Cpus(cpu.local.index.get())) };
    let doorbell = &vcpu_shared.doorbell;
    // The kvm_run page of a vCPU whose state was just set does not show that state yet. Draining updates it.
    cpu.drain(shared)?;
    let _binding = cpu.vcpu.bind();
    let mut wake_timer = WakeTimer::new(shared)?;
    doorbell.attach();
    let result = loop {
        wake_timer.check_expiry(cpu.vcpu.clear_kicks(), shared);
        doorbell.clear();
        if stop_requested() || shared.stopping.load(Ordering::SeqCst) {
            break Ok(StopReason::Requested);
        }
        match step::step(cpu, shared, &mut wake_timer, stop, Pace::Free) {
            Ok(Stepped::Ran { .. } | Stepped::Again) => {}
            Ok(Stepped::Idle { unwakeable }) => wake_timer.sleep(doorbell, shared, unwakeable),
            Ok(Stepped::OutputFull) => {
                wake_timer.set_for_stop(shared, stop);
                doorbell.sleep();
            }
            Ok(Stepped::Stop(stop)) => break Ok(stop),
            Err(error) => break Err(error),
        }
    };
    doorbell.detach();
    step::quiesce(cpu, shared)?;
    result
}

/// Virtual time: steps all vCPUs on the calling thread, one at a time.
pub(crate) fn run_round_robin(
    cpus: &mut [Cpu],
    shared: &Shared,
    mailbox: &impl RequestSource,
    until: Until,
    round_robin: &mut RoundRobin,
) -> Result<StopReason, RunError> {
    let Some(vcpu_shared) = shared.vcpus.first() else { return Err(RunError::Cpus(0)) };
    let mut wake_timer = WakeTimer::new(shared)?;
    for cpu in cpus.iter_mut() {
        cpu.drain(shared)?;
    }
    vcpu_shared.doorbell.attach();
    let result = loop {
        vcpu_shared.doorbell.clear();
        if mailbox.has_request() {
            break Ok(StopReason::Requested);
        }
        match round_robin.step(cpus, shared, until, &mut wake_timer, Pace::Free) {
            Ok(Stepped::Ran { .. } | Stepped::Again) => {}
            Ok(Stepped::Idle { .. }) if !mailbox.expects_requests() => {
                break Ok(StopReason::Ended(round_robin::nothing_will_wake(cpus)));
            }
            Ok(Stepped::OutputFull | Stepped::Idle { .. }) => {
                vcpu_shared.doorbell.sleep();
                kick::clear();
                shared.clock.lock().restart_spin_budget();
            }
            Ok(Stepped::Stop(stop)) => break Ok(stop),
            Err(error) => break Err(error),
        }
    };
    vcpu_shared.doorbell.detach();
    for cpu in cpus.iter_mut() {
        step::quiesce(cpu, shared)?;
    }
    result
}
