//! Whose turn it is: in real time every vCPU has a thread, in virtual time one thread gives [`Turns`].

pub mod mailbox;
pub mod round_robin;

use std::{sync::atomic::Ordering, thread};

use vmtime::GuestTsc;

use self::{
    mailbox::Interruptions,
    round_robin::{Given, Turns, Until},
};
use super::{
    error::{At, End, RunError},
    shared::{Platform, lock},
    vcpu::{
        Cpu,
        step::{self, Pace, Stop, Turn},
    },
    wake::wake_timer::Alarm,
};
use crate::host::kick;

/// The loop of one vCPU: runs it on the calling thread until it stops, `stop` is reached, or it is wanted back, by the
/// third argument's word or [`Platform::stop_all`].
pub(crate) type Loop<C> = fn(&mut C, &Platform, &dyn Fn() -> bool, Option<GuestTsc>) -> Result<Stop, RunError>;

/// Runs all vCPUs, each on its thread, until one of them stops or somebody waits in the mailbox.
pub(crate) fn real<C: Send>(
    cpus: &mut [C],
    platform: &Platform,
    mailbox: &impl Interruptions,
    stop: Option<GuestTsc>,
    turns: Loop<C>,
) -> Result<Stop, RunError> {
    let Some((first, others)) = cpus.split_first_mut() else { return Err(RunError::Cpus(0)) };
    platform.stopping.store(false, Ordering::SeqCst);
    let results: Vec<Result<Stop, RunError>> = thread::scope(|scope| {
        let threads: Vec<_> = others
            .iter_mut()
            .enumerate()
            .map(|(others, cpu)| {
                let name = format!("vcpu{}", others + 1);
                thread::Builder::new()
                    .name(name)
                    .spawn_scoped(scope, move || one(cpu, platform, &|| false, stop, turns))
            })
            .collect();
        let mut results = Vec::new();
        // A thread that cannot be started stops those that could.
        if threads.iter().any(Result::is_err) {
            platform.stop_all();
        } else {
            results.push(one(first, platform, &|| mailbox.waiting(), stop, turns));
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
    // One that is asked to come back looks at no clock before it does: a gap that ends with that is found here.
    drop(platform.read_clock());
    summed_up(results)
}

/// What the machine's stop is, given every vCPU's: the end of the guest before the time reached before being asked.
fn summed_up(results: Vec<Result<Stop, RunError>>) -> Result<Stop, RunError> {
    let mut stop = Stop::Asked;
    for result in results {
        stop = match (result?, stop) {
            (ended @ Stop::Ended(_), Stop::Reached | Stop::Asked) => ended,
            (_, ended @ Stop::Ended(_)) => ended,
            (Stop::Reached, _) | (_, Stop::Reached) => Stop::Reached,
            (Stop::Asked, Stop::Asked) => Stop::Asked,
        };
    }
    Ok(stop)
}

/// One vCPU on the calling thread. Whatever stops it stops the others.
fn one<C>(
    cpu: &mut C,
    platform: &Platform,
    wanted: &dyn Fn() -> bool,
    stop: Option<GuestTsc>,
    turns: Loop<C>,
) -> Result<Stop, RunError> {
    let result = turns(cpu, platform, wanted, stop);
    platform.stop_all();
    result
}

/// The loop of a vCPU whose LAPIC is ours.
pub(crate) fn turns(
    cpu: &mut Cpu,
    platform: &Platform,
    wanted: &dyn Fn() -> bool,
    stop: Option<GuestTsc>,
) -> Result<Stop, RunError> {
    let Some(post) = platform.post(cpu.local.index) else { return Err(RunError::Cpus(cpu.local.index)) };
    let bell = &post.bell;
    // A vCPU whose state was just set has nothing in the shared page yet.
    cpu.drain(platform)?;
    let _binding = cpu.vcpu.bind();
    let mut alarm = Alarm::new(platform)?;
    bell.attach();
    let result = loop {
        alarm.look(cpu.vcpu.forget_kicks(), platform);
        bell.hush();
        if wanted() || platform.stopping.load(Ordering::SeqCst) {
            break Ok(Stop::Asked);
        }
        match step::turn(cpu, platform, &mut alarm, stop, Pace::Free) {
            Ok(Turn::Ran | Turn::Kicked) => {}
            Ok(Turn::Idle { deaf }) => {
                alarm.idle(platform, post, deaf);
                alarm.sleep(bell, platform, deaf);
            }
            Ok(Turn::Unread) => {
                alarm.set_for_stop(platform, stop);
                bell.sleep();
            }
            Ok(Turn::Stop(stop)) => break Ok(stop),
            Err(error) => break Err(error),
        }
    };
    bell.detach();
    step::settle(cpu, platform)?;
    result
}

/// Gives all vCPUs turns on the calling thread.
pub(crate) fn virtually(
    cpus: &mut [Cpu],
    platform: &Platform,
    mailbox: &impl Interruptions,
    until: Until,
    turns: &mut Turns,
) -> Result<Stop, RunError> {
    let Some(post) = platform.posts.first() else { return Err(RunError::Cpus(0)) };
    let mut alarm = Alarm::new(platform)?;
    for cpu in cpus.iter_mut() {
        cpu.drain(platform)?;
    }
    turns.begin();
    post.bell.attach();
    let result = loop {
        post.bell.hush();
        if mailbox.waiting() {
            break Ok(Stop::Asked);
        }
        match turns.give(cpus, platform, until, &mut alarm, Pace::Free) {
            Ok(Given::Turn { .. } | Given::Nothing | Given::Waited) => {}
            Ok(Given::Unread) => {
                post.bell.sleep();
                kick::clear();
                lock(&platform.clock).slept();
            }
            Ok(Given::NobodyWakes) if mailbox.can_come() => {
                post.bell.sleep();
                kick::clear();
                lock(&platform.clock).slept();
            }
            Ok(Given::NobodyWakes | Given::EndOfTime) => {
                let address = cpus.first_mut().map_or(0, |cpu| cpu.vcpu.registers().linear_rip);
                break Ok(Stop::Ended(End::NothingWillWake(At { cpu: 0, address })));
            }
            Ok(Given::Stop(stop)) => break Ok(stop),
            Err(error) => break Err(error),
        }
    };
    post.bell.detach();
    for cpu in cpus.iter_mut() {
        step::settle(cpu, platform)?;
    }
    result
}
