//! One point: migrate, run on, judge.

use std::{sync::atomic::AtomicBool, time::Duration};

use guest_abi::report::Header;
use machine::shared::lock;
use machine::{
    Came, End, HostEnvironment, Machine, Outputs, Pace, Policies, TraceTo, audit::Handled, boot::Image, output::AT_END,
};
use vmtime::{Khz, VmTime};

use super::{
    Options, SweepError,
    code::Program,
    reason,
    result::{Baseline, Target},
    verdict::{Account, Counted, Finish, Measure, Outcome},
    walk::Walk,
};

/// Without `--patience` a tick is waited for so many periods: a timer that is set in the units of a TSC ten times as fast
/// comes ten periods late, and that shall be "late", not "lost".
const PATIENCE_PERIODS: u64 = 30;

/// So many timer interrupts in a row, each within [`STORM_GAP_NS`] of the one before, are a storm. A deadline that covers
/// only a tenth of what is left, as one computed for a TSC ten times as slow does, is early some 40 times in a row before
/// what is left is an operation or two.
const STORM: u32 = 80;
/// A handler's few operations cost as many microseconds of virtual time.
const STORM_GAP_NS: u64 = 10_000;

/// What every point of a sweep is judged by.
#[derive(Clone, Debug)]
pub(super) struct Bench {
    pub baseline: Baseline,
    pub patience: Duration,
    measure: Measure,
    /// Per CPU: it makes ticks.
    ticking: Vec<bool>,
    ticks: u64,
    policies: Policies,
}

/// How the run after a migration went.
struct Run {
    finish: Finish,
    ticks: Vec<Handled>,
    headers: Vec<Option<Header>>,
}

impl Bench {
    /// Runs on from the beginning of the stretch without a migration, and comes back.
    pub(super) fn measure(walk: &mut Walk, options: &Options, level: usize) -> Result<Self, SweepError> {
        let machine = walk.stepper.machine();
        // A CPU that is up has a ring, even before its first tick.
        let ticking = (0..walk.handled_so_far().len()).map(|cpu| machine.ring_header(cpu).is_some());
        let mut bench = Self {
            baseline: Baseline { late_ns: 0, early_wakes: 0, period_ns: 0 },
            patience: options.patience.unwrap_or(Duration::MAX),
            measure: Measure { usual_late_ns: 0, usual_early_wakes: 0, tolerance_ns: nanoseconds(options.tolerance) },
            ticking: ticking.collect(),
            ticks: options.ticks.max(2),
            policies: Policies {
                khz: None,
                deadline: options.deadline,
                downtime: options.downtime,
                downtime_length: Some(options.downtime_length),
                fault: options.fault,
            },
        };
        bench.can_reach(walk)?;
        let Run { finish, ticks, headers: _ } = bench.run_on(walk)?;
        if finish != Finish::Handled {
            return Err(SweepError::Usage(format!(
                "without a migration the guest does not make {} ticks after the beginning of the stretch",
                bench.ticks
            )));
        }
        walk.stepper.go_back(level)?;
        let expiries: Vec<u64> = ticks.iter().filter(|tick| tick.cpu == 0).map(|tick| tick.record.expires_ns).collect();
        let period_ns = expiries.array_windows().map(|[a, b]| b.saturating_sub(*a)).max().unwrap_or(0);
        if period_ns == 0 {
            return Err(SweepError::Usage(
                "CPU 0 of the guest makes no ticks after the beginning of the stretch: there is nothing to judge by"
                    .to_owned(),
            ));
        }
        let account = Account { before: Vec::new(), now: *lock(&walk.stepper.machine().shared().clock).reference() };
        let Outcome { early_wakes, late_ns, .. } =
            bench.measure.judge(&ticks, &account, Counted::default(), Finish::Handled);
        bench.baseline = Baseline { late_ns: late_ns.unwrap_or(0), early_wakes, period_ns };
        bench.measure.usual_late_ns = bench.baseline.late_ns;
        bench.measure.usual_early_wakes = early_wakes;
        bench.ticks = options.ticks;
        bench.patience = options.patience.unwrap_or(Duration::from_nanos(period_ns.saturating_mul(PATIENCE_PERIODS)));
        Ok(bench)
    }

    /// A guest that will make no more ticks loses none.
    fn can_reach(&self, walk: &Walk) -> Result<(), SweepError> {
        for (cpu, target) in self.targets(walk).into_iter().enumerate() {
            let expected = walk.stepper.machine().ticks_expected(cpu).unwrap_or(0);
            // The stretch is a tick long, and points at its end wait for one more.
            let needed = target.saturating_add(1);
            if expected != 0 && expected < needed && self.ticking.get(cpu) == Some(&true) {
                return Err(SweepError::Usage(format!(
                    "CPU {cpu} of the guest makes only {expected} ticks, and the sweep needs {needed}: ask the guest for more \
                     (count={needed}), or begin earlier (--from)"
                )));
            }
        }
        Ok(())
    }

    fn targets(&self, walk: &Walk) -> Vec<u64> {
        walk.track.targets(self.ticks)
    }

    /// Migrates to `khz` and runs on; `walk` is then somewhere else.
    pub(super) fn try_at(&self, walk: &mut Walk, khz: Khz) -> Result<Outcome, SweepError> {
        let mut leg = Leg::begin(walk);
        leg.migrate(self, walk, khz)?;
        leg.finish(self, walk)
    }

    fn run_on(&self, walk: &mut Walk) -> Result<Run, SweepError> {
        let targets = self.targets(walk);
        let now = lock(&walk.stepper.machine().shared().clock).now(0).vm;
        let limit = VmTime(now.0.saturating_add(nanoseconds(self.patience)));
        let interrupts = |machine: &Machine| -> u64 {
            (0..targets.len()).map(|cpu| machine.timer_interrupts(cpu)).fold(0, u64::saturating_add)
        };
        let (mut so_far, mut last_vm, mut in_a_row) = (interrupts(walk.stepper.machine()), now, 0u32);
        let storm_at = STORM.saturating_mul(u32::try_from(targets.len()).unwrap_or(1));
        let mut storm = false;
        let done = |machine: &mut Machine, _| {
            let count = interrupts(machine);
            if count != so_far {
                let vm = lock(&machine.shared().clock).now(0).vm;
                in_a_row = if vm.0.saturating_sub(last_vm.0) <= STORM_GAP_NS { in_a_row.saturating_add(1) } else { 0 };
                (so_far, last_vm) = (count, vm);
                storm = in_a_row >= storm_at;
            }
            if storm {
                return true;
            }
            targets.iter().zip(&self.ticking).enumerate().all(|(cpu, (target, ticks))| {
                !ticks || machine.ticks_handled(cpu).is_some_and(|handled| handled >= *target)
            })
        };
        let finish = match walk.stepper.run(Pace::Free, Some(limit), done)? {
            Came::Here if storm => Finish::Storm,
            Came::Here => Finish::Handled,
            Came::ToLimit => Finish::Missing,
            Came::ToEnd(end) => finish_of(&end),
        };
        Ok(Run { finish, ticks: walk.take_handled(), headers: headers(walk) })
    }
}

/// A guest that halts with nothing to wake it has lost its tick; others did not go on.
fn finish_of(end: &End) -> Finish {
    match end {
        End::NothingWillWake(_) => Finish::Missing,
        end => Finish::Ended(reason(end)),
    }
}

fn headers(walk: &Walk) -> Vec<Option<Header>> {
    (0..walk.handled_so_far().len()).map(|cpu| walk.stepper.machine().ring_header(cpu)).collect()
}

fn nanoseconds(length: Duration) -> u64 {
    u64::try_from(length.as_nanos()).unwrap_or(u64::MAX)
}

/// From the first migration at a point to the judgement.
#[derive(Clone)]
pub(super) struct Leg {
    account: Account,
    before: Vec<Option<Header>>,
    /// Ticks that came while the guest was stepped to a second migration.
    ticks: Vec<Handled>,
}

impl Leg {
    /// At a point, before its migration.
    pub(super) fn begin(walk: &mut Walk) -> Self {
        drop(walk.take_handled());
        let now = *lock(&walk.stepper.machine().shared().clock).reference();
        Self { account: Account { before: Vec::new(), now }, before: headers(walk), ticks: Vec::new() }
    }

    /// Takes the ticks that came since: a checkpoint forgets them.
    pub(super) fn collect(&mut self, walk: &mut Walk) {
        self.ticks.extend(walk.take_handled());
    }

    /// Migrates.
    pub(super) fn migrate(&mut self, bench: &Bench, walk: &mut Walk, khz: Khz) -> Result<(), SweepError> {
        self.collect(walk);
        let before = walk.stepper.migrate(&Policies { khz: Some(khz), ..bench.policies })?;
        self.account.before.push(before);
        self.account.now = *lock(&walk.stepper.machine().shared().clock).reference();
        Ok(())
    }

    /// Runs on, and judges.
    pub(super) fn finish(self, bench: &Bench, walk: &mut Walk) -> Result<Outcome, SweepError> {
        let run = bench.run_on(walk)?;
        Ok(self.judge(bench, run))
    }

    /// The guest did not get to the second migration: what the first one did.
    pub(super) fn ended(self, bench: &Bench, walk: &mut Walk, end: &End) -> Outcome {
        let run = Run { finish: finish_of(end), ticks: walk.take_handled(), headers: headers(walk) };
        self.judge(bench, run)
    }

    fn judge(mut self, bench: &Bench, run: Run) -> Outcome {
        let Run { finish, ticks, headers } = run;
        self.ticks.extend(ticks);
        let mut counted = Counted::default();
        for ((before, after), ticks) in self.before.iter().zip(&headers).zip(&bench.ticking) {
            let (Some(before), Some(after), true) = (before, after, ticks) else { continue };
            let back = after.clock_steps_back.saturating_sub(before.clock_steps_back);
            counted.steps_back = counted.steps_back.saturating_add(back);
            // The ring has the worst since boot.
            if after.worst_step_back_ns > before.worst_step_back_ns {
                counted.worst_step_back_ns = counted.worst_step_back_ns.max(after.worst_step_back_ns);
            }
            counted.untold |= after.guest_stopped_seen <= before.guest_stopped_seen;
        }
        bench.measure.judge(&self.ticks, &self.account, counted, finish)
    }
}

/// One point, again, with a trace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replay {
    /// The point's number, and with two migrations the number of boundaries to the second.
    pub at: Vec<u64>,
    /// Where to migrate to.
    pub target: Target,
    /// What came of it.
    pub outcome: Outcome,
    /// Where it was.
    pub code: super::result::Code,
}

/// Boots, steps to point `at`, migrates there to `target`, runs on and judges, writing everything that happens to `trace`.
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
    // What is usual is measured by a run of its own: it would be in the trace.
    let bench = {
        let outputs = Outputs::new(Box::new(std::io::sink()), None);
        let mut walk = Walk::begin(env, image, &program, options, outputs, cancel)?;
        walk.stepper.keep(0)?;
        Bench::measure(&mut walk, options, 0)?
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
    let mut leg = Leg::begin(&mut walk);
    leg.migrate(&bench, &mut walk, target.tsc_khz)?;
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
            leg.migrate(&bench, &mut walk, options.khz)?;
        }
    }
    let outcome = match end {
        Some(end) => leg.ended(&bench, &mut walk, &end),
        None => leg.finish(&bench, &mut walk)?,
    };
    let machine = walk.stepper.into_machine()?;
    machine.shared().trace.finish(AT_END)?;
    Ok(Replay { at: at.to_vec(), target: target.clone(), outcome, code })
}
