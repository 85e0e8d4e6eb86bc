//! One point of a sweep once more, with a trace.

use std::sync::atomic::AtomicBool;

use machine::{HostEnvironment, Outputs, TraceTo, boot::Image, output::AT_END};

use super::{
    Options, SweepError,
    code::Program,
    point::{Attempt, Experiment},
    result::{Code, Target},
    verdict::Outcome,
    walk::Walk,
};

/// One point of a sweep, repeated with a trace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replay {
    /// The point's number, and with two migrations the number of boundaries to the second.
    pub at: Vec<u64>,
    /// The frequency to migrate to.
    pub target: Target,
    /// What the migration did.
    pub outcome: Outcome,
    /// The instruction at the point.
    pub code: Code,
}

/// Boots, steps to point `at`, migrates there to `target` and runs to the verdict. `trace` records all of it.
///
/// # Errors
/// [`SweepError`].
pub fn replay(
    env: &HostEnvironment,
    image: &Image,
    options: &Options,
    at: &[u64],
    target: &Target,
    trace: TraceTo,
    cancel: &AtomicBool,
) -> Result<Replay, SweepError> {
    let program = Program::read(image.bytes());
    // The baseline is measured in a run of its own, so that it is not in the trace.
    let experiment = {
        let outputs = Outputs::new(Box::new(std::io::sink()), None);
        let mut walk = Walk::begin(env, image, &program, options, outputs, cancel)?;
        walk.stepper.take_checkpoint(0)?;
        Experiment::measure(&mut walk, options, 0)?
    };
    let outputs = Outputs { trace, ..Outputs::new(Box::new(std::io::sink()), None) };
    let mut walk = Walk::begin(env, image, &program, options, outputs, cancel)?;
    let beyond = |number: u64, end: u64| {
        SweepError::Usage(format!("--point {number}: the stretch has no such boundary, they are 0 to {end}"))
    };
    let (first, second) = match at {
        [first] => (*first, None),
        [first, second] => (*first, Some(*second)),
        _ => return Err(SweepError::Usage("--point takes one number, or two for two migrations".to_owned())),
    };
    for passed in 0..first {
        if !walk.next()? {
            return Err(beyond(first, passed));
        }
    }
    let code = program.at(walk.track.place.rip);
    let mut attempt = Attempt::begin(&mut walk);
    attempt.migrate(&experiment, &mut walk, target.tsc_khz)?;
    let mut end = None;
    if let Some(second) = second {
        for _ in 0..second {
            match walk.step("the second migration") {
                Ok(()) => {}
                Err(SweepError::GuestEnded { end: how, .. }) => {
                    end = Some(how);
                    break;
                }
                Err(error) => return Err(error),
            }
        }
        if end.is_none() {
            attempt.migrate(&experiment, &mut walk, options.khz)?;
        }
    }
    let outcome = match end {
        Some(end) => attempt.ended(&experiment, &mut walk, &end),
        None => attempt.finish(&experiment, &mut walk)?,
    };
    let machine = walk.stepper.into_machine()?;
    machine.finish_trace(AT_END)?;
    Ok(Replay { at: at.to_vec(), target: target.clone(), outcome, code })
}
