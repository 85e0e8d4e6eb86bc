//! Whose turn it is.
//!
//! In real time every vCPU has a thread. In virtual time one thread gives turns: a vCPU runs up to its next operation
//! (or PAUSE site), then the order, fixed by a seed, says who is next. Exits that are no operations never change the
//! order, so that a signal or a single step cannot make two runs differ.

use std::{sync::atomic::Ordering, thread};

use oorandom::Rand32;

use super::{
    End, Platform, RunError,
    cpu::Cpu,
    idle,
    mailbox::Interruptions,
    platform::lock,
    turn::{self, Alarm, Stop, Turn},
};
use crate::time::GuestTsc;

/// Runs all vCPUs, each on its thread, until one of them stops or somebody waits in the mailbox.
pub(super) fn real(
    cpus: &mut [Cpu],
    platform: &Platform,
    mailbox: &impl Interruptions,
    stop: Option<GuestTsc>,
) -> Result<Stop, RunError> {
    let Some((first, others)) = cpus.split_first_mut() else { return Err(RunError::Cpus(0)) };
    platform.stopping.store(false, Ordering::SeqCst);
    let results: Vec<Result<Stop, RunError>> = thread::scope(|scope| {
        let threads: Vec<_> = others
            .iter_mut()
            .map(|cpu| {
                let name = format!("vcpu{}", cpu.local.index);
                thread::Builder::new().name(name).spawn_scoped(scope, move || one(cpu, platform, &|| false, stop))
            })
            .collect();
        let mut results = Vec::new();
        // A thread that cannot be started stops those that could.
        if threads.iter().any(Result::is_err) {
            platform.stop_all();
        } else {
            results.push(one(first, platform, &|| mailbox.waiting(), stop));
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
fn one(
    cpu: &mut Cpu,
    platform: &Platform,
    wanted: &dyn Fn() -> bool,
    stop: Option<GuestTsc>,
) -> Result<Stop, RunError> {
    let result = turns(cpu, platform, wanted, stop);
    platform.stop_all();
    result
}

fn turns(
    cpu: &mut Cpu,
    platform: &Platform,
    wanted: &dyn Fn() -> bool,
    stop: Option<GuestTsc>,
) -> Result<Stop, RunError> {
    let post = usize::try_from(cpu.local.index).ok().and_then(|index| platform.posts.get(index));
    let Some(post) = post else { return Err(RunError::Cpus(cpu.local.index)) };
    let bell = &post.bell;
    // A vCPU whose state was just set has nothing in the shared page yet.
    cpu.drain(platform)?;
    let _binding = cpu.vcpu.bind();
    let mut alarm = Alarm::new()?;
    bell.attach();
    let result = loop {
        if cpu.vcpu.forget_kicks() {
            // In real time the alarm only has to be set again.
            alarm.rang(cpu, platform);
        }
        bell.hush();
        if wanted() || platform.stopping.load(Ordering::SeqCst) {
            break Ok(Stop::Asked);
        }
        match turn::turn(cpu, platform, &mut alarm, stop) {
            Ok(Turn::Ran) => {}
            Ok(Turn::Idle { deaf }) => {
                let limit = {
                    let clock = lock(&platform.clock);
                    let target = [idle::due(cpu, &clock, deaf), stop].into_iter().flatten().min();
                    idle::sleep_for(&clock, target)
                };
                bell.sleep(limit);
            }
            Ok(Turn::Stop(stop)) => break Ok(stop),
            Err(error) => break Err(error),
        }
    };
    bell.detach();
    turn::settle(cpu, platform)?;
    result
}

/// When turns end: where the caller wants it, and where the page is due for renewal. The latter never wakes anybody.
#[derive(Clone, Copy, Debug)]
pub(super) struct Until {
    pub stop: Option<GuestTsc>,
    pub renewal: Option<GuestTsc>,
}

impl Until {
    /// Whichever is first.
    pub(super) fn first(self) -> Option<GuestTsc> {
        [self.stop, self.renewal].into_iter().flatten().min()
    }
}

/// Gives all vCPUs turns on the calling thread.
pub(super) fn virtually(
    cpus: &mut [Cpu],
    platform: &Platform,
    mailbox: &impl Interruptions,
    until: Until,
    order: &mut Rand32,
) -> Result<Stop, RunError> {
    let Some(post) = platform.posts.first() else { return Err(RunError::Cpus(0)) };
    let mut alarm = Alarm::new()?;
    for cpu in cpus.iter_mut() {
        cpu.drain(platform)?;
    }
    post.bell.attach();
    let result = in_order(cpus, platform, mailbox, until, order, &mut alarm);
    post.bell.detach();
    for cpu in cpus.iter_mut() {
        turn::settle(cpu, platform)?;
    }
    result
}

fn in_order(
    cpus: &mut [Cpu],
    platform: &Platform,
    mailbox: &impl Interruptions,
    until: Until,
    order: &mut Rand32,
    alarm: &mut Alarm,
) -> Result<Stop, RunError> {
    /// `Some(deaf)` for those that were idle at their last turn.
    type Idle = Vec<Option<bool>>;
    let mut idle: Idle = vec![None; cpus.len()];
    loop {
        if let Some(post) = platform.posts.first() {
            post.bell.hush();
        }
        if mailbox.waiting() {
            return Ok(Stop::Asked);
        }
        wake(cpus, platform, &mut idle);
        let awake: Vec<usize> = (0..cpus.len()).filter(|index| idle.get(*index) == Some(&None)).collect();
        let Some(chosen) = choose(&awake, order) else {
            let mut clock = lock(&platform.clock);
            let dues = cpus.iter().zip(&idle).filter_map(|(cpu, deaf)| idle::due(cpu, &clock, deaf.unwrap_or(false)));
            match dues.chain(until.stop).min() {
                // The clock's end: what is armed beyond never comes.
                Some(target) if target.0 == u64::MAX && clock.tsc() == target => {
                    drop(clock);
                    let rip = cpus.first_mut().map_or(0, |cpu| cpu.vcpu.registers().rip);
                    return Ok(Stop::Ended(End::NothingWillWake { rip }));
                }
                Some(target) => clock.jump_to(until.renewal.map_or(target, |renewal| target.min(renewal))),
                None if mailbox.can_come() => {
                    drop(clock);
                    if let Some(post) = platform.posts.first() {
                        post.bell.sleep(None);
                    }
                    lock(&platform.clock).slept();
                }
                None => {
                    drop(clock);
                    let rip = cpus.first_mut().map_or(0, |cpu| cpu.vcpu.registers().rip);
                    return Ok(Stop::Ended(End::NothingWillWake { rip }));
                }
            }
            // Whoever is due, or the stop, shows in the next round; all look again.
            idle.fill(None);
            continue;
        };
        let Some(cpu) = cpus.get_mut(chosen) else { return Err(RunError::Cpus(0)) };
        let _binding = cpu.vcpu.bind();
        let before = lock(&platform.clock).operations();
        loop {
            if cpu.vcpu.forget_kicks() {
                if let Some(end) = alarm.rang(cpu, platform) {
                    return Ok(Stop::Ended(end));
                }
                if mailbox.waiting() {
                    return Ok(Stop::Asked);
                }
            }
            match turn::turn(cpu, platform, alarm, until.first())? {
                Turn::Ran if lock(&platform.clock).operations() == before => {}
                Turn::Ran => break,
                Turn::Idle { deaf } => {
                    if let Some(slot) = idle.get_mut(chosen) {
                        *slot = Some(deaf);
                    }
                    break;
                }
                Turn::Stop(stop) => return Ok(stop),
            }
        }
    }
}

/// One CPU draws nothing, so that its runs do not depend on the seed.
fn choose(awake: &[usize], order: &mut Rand32) -> Option<usize> {
    match awake {
        [] => None,
        [only] => Some(*only),
        several => {
            let count = u32::try_from(several.len()).unwrap_or(u32::MAX);
            let drawn = usize::try_from(order.rand_range(0..count)).unwrap_or(0);
            several.get(drawn).copied()
        }
    }
}

/// Whoever has a message, or a timer that is due, is no longer idle.
fn wake(cpus: &[Cpu], platform: &Platform, idle: &mut [Option<bool>]) {
    let clock = lock(&platform.clock);
    let now = clock.tsc();
    for ((cpu, post), slot) in cpus.iter().zip(&platform.posts).zip(idle) {
        if let Some(deaf) = *slot {
            let message = !lock(&post.inbox).is_empty();
            if message || idle::due(cpu, &clock, deaf).is_some_and(|due| due <= now) {
                *slot = None;
            }
        }
    }
}
