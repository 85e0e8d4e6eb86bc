//! One point: migrate, run to the next ticks, compare them with the baseline.

use std::{sync::Arc, time::Duration};

use guest_abi::report::Header;
use machine::{End, Machine, Pace, Policies, StopReason, audit::Handled};
use vmtime::{DowntimePolicy, Khz, VmTime};

use super::{
    Options, SweepError,
    interrupts::{Expected, Interrupts},
    reason,
    result::Baseline,
    verdict::{ClockHistory, Counted, Finish, Measure, Outcome},
    walk::Walk,
};
use crate::recipe::{Played, Recipe, step::Destination};

/// Periods that a run waits for its ticks, without `--patience`. A timer set in the units of a TSC ten times as fast
/// comes ten periods late, and the verdict on that must be "late", not "lost".
const PATIENCE_PERIODS: u64 = 30;

/// VM time in which a guest without records must have had its timer interrupts, without `--patience`, in nanoseconds.
const BASELINE_NS: u64 = 60_000_000_000;

/// Timer interrupts in a row, each within [`STORM_GAP_NS`] of the one before, that make a storm. It must be above what
/// a guest that recovers needs: a deadline computed for a TSC ten times as slow covers a tenth of the remaining time,
/// so it is early some 40 times in a row before one or two operations remain.
const STORM: u32 = 80;
/// A handler's few operations cost as many microseconds of virtual time.
const STORM_GAP_NS: u64 = 10_000;

/// What all points of a sweep have in common: the policies, the baseline, and which ticks a run waits for.
#[derive(Clone, Debug)]
pub(super) struct Experiment {
    pub baseline: Baseline,
    pub patience: Duration,
    measure: Measure,
    /// Per CPU: whether it makes ticks.
    ticking: Vec<bool>,
    ticks: u64,
    policies: Policies,
    recipe: Option<Arc<Recipe>>,
    /// The guest is stopped for a time, of which it is to be told.
    tells: bool,
    /// What the recipe loses is measured in the guest's pages.
    measures_pages: bool,
    /// The guest keeps no records: it is judged by its timer interrupts.
    pub interrupts: Option<Expected>,
}

/// How the run after a migration went.
struct Run {
    finish: Finish,
    ticks: Vec<Handled>,
    headers: Vec<Option<Header>>,
    interrupts: Interrupts,
}

impl Experiment {
    /// Measures the baseline: runs from the beginning of the stretch without a migration, then goes back to `level`.
    pub(super) fn measure(walk: &mut Walk, options: &Options, level: usize) -> Result<Self, SweepError> {
        let machine = walk.stepper.machine();
        // A CPU that is up has a ring, even before its first tick.
        let ticking = (0..walk.handled_so_far().len()).map(|cpu| machine.ring_header(cpu).is_some());
        let mut experiment = Self {
            baseline: Baseline { late_ns: 0, early_wakes: 0, period_ns: 0 },
            patience: options.patience.unwrap_or(Duration::MAX),
            measure: Measure { usual_late_ns: 0, usual_early_wakes: 0, tolerance_ns: nanoseconds(options.tolerance) },
            ticking: ticking.collect(),
            ticks: options.ticks.max(2),
            policies: policies(options),
            recipe: options.recipe.clone(),
            tells: options.recipe.as_ref().is_none_or(|recipe| recipe.stops_the_guest()),
            measures_pages: options.measures_pages(),
            interrupts: None,
        };
        if !walk.stepper.machine().announces_ring() {
            return experiment.by_interrupts(walk, options, level);
        }
        experiment.can_reach(walk)?;
        let Run { finish, ticks, .. } = experiment.run_on(walk, &[])?;
        if finish != Finish::Handled {
            return Err(SweepError::Usage(format!(
                "without a migration the guest does not make {} ticks after the beginning of the stretch",
                experiment.ticks
            )));
        }
        walk.stepper.restore_checkpoint(level)?;
        let expiries: Vec<u64> = ticks.iter().filter(|tick| tick.cpu == 0).map(|tick| tick.record.expires_ns).collect();
        let period_ns = expiries.array_windows().map(|[a, b]| b.saturating_sub(*a)).max().unwrap_or(0);
        if period_ns == 0 {
            return Err(SweepError::Usage(
                "CPU 0 of the guest makes no ticks after the beginning of the stretch: there is nothing to judge by"
                    .to_owned(),
            ));
        }
        let clocks = ClockHistory { before: Vec::new(), now: walk.stepper.machine().reference(), ahead: Vec::new() };
        let Outcome { early_wakes, late_ns, .. } =
            experiment.measure.verdict(&ticks, &clocks, Counted::default(), Finish::Handled);
        experiment.baseline = Baseline { late_ns: late_ns.unwrap_or(0), early_wakes, period_ns };
        experiment.measure.usual_late_ns = experiment.baseline.late_ns;
        experiment.measure.usual_early_wakes = early_wakes;
        experiment.ticks = options.ticks;
        experiment.patience =
            options.patience.unwrap_or(Duration::from_nanos(period_ns.saturating_mul(PATIENCE_PERIODS)));
        Ok(experiment)
    }

    /// Completes the baseline of a guest without records: runs until CPU 0 has had the timer interrupts that the last
    /// point waits for.
    fn by_interrupts(mut self, walk: &mut Walk, options: &Options, level: usize) -> Result<Self, SweepError> {
        let counts = walk.timer_interrupts();
        // One that ends the stretch, if nothing else does.
        let more =
            walk.ends_at_interrupt().map_or(1, |end| end.saturating_sub(counts.first().copied().unwrap_or(0)).max(1));
        let needed = usize::try_from(options.ticks.saturating_add(more)).unwrap_or(usize::MAX);
        let mut interrupts = Interrupts::begin(counts);
        let begun = walk.stepper.machine().vm_time();
        let limit = VmTime(begun.0.saturating_add(options.patience.map_or(BASELINE_NS, nanoseconds)));
        let stopped = walk.stepper.run(Pace::Free, Some(limit), |machine, _| {
            interrupts.note(machine);
            interrupts.of_first_cpu() >= needed || interrupts.are_too_many()
        })?;
        if interrupts.are_too_many() {
            return Err(SweepError::Usage(
                "the guest has more than a million timer interrupts in the stretch and the ticks behind it: choose a nearer --to,                  or another --from"
                    .to_owned(),
            ));
        }
        if stopped != StopReason::Requested {
            return Err(SweepError::Usage(format!(
                "without a migration CPU 0 of the guest has not {needed} timer interrupts after the beginning of the stretch, within \
                 {:?} of VM time: there is nothing to judge by; choose another --from, or a longer --patience",
                Duration::from_nanos(limit.0.saturating_sub(begun.0))
            )));
        }
        walk.stepper.restore_checkpoint(level)?;
        let expected = Expected::new(interrupts, options.ticks, nanoseconds(options.tolerance));
        self.baseline.period_ns = expected.period_ns();
        self.patience = options
            .patience
            .unwrap_or_else(|| Duration::from_nanos(self.baseline.period_ns.saturating_mul(PATIENCE_PERIODS)));
        self.interrupts = Some(expected);
        Ok(self)
    }

    /// Refuses a guest whose scenario ends within the sweep: a tick it never made would count as lost.
    fn can_reach(&self, walk: &Walk) -> Result<(), SweepError> {
        for (cpu, target) in self.targets(walk).into_iter().enumerate() {
            let expected = walk.stepper.machine().ticks_expected(cpu).unwrap_or(0);
            // The stretch is one tick long, so that points at its end wait for one tick more than those at its
            // beginning.
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

    /// Migrates to `khz` and runs to the verdict. `walk` is then no longer at the point.
    pub(super) fn try_at(&self, walk: &mut Walk, khz: Khz) -> Result<Outcome, SweepError> {
        let mut attempt = Attempt::begin(walk);
        attempt.migrate(self, walk, khz)?;
        attempt.finish(self, walk)
    }

    /// Runs until every ticking CPU has handled its ticks, the patience is over, or a storm is seen.
    ///
    /// `begun` is how many timer interrupts each CPU had had at the point.
    fn run_on(&self, walk: &mut Walk, begun: &[u64]) -> Result<Run, SweepError> {
        let targets = self.targets(walk);
        let now = walk.stepper.machine().vm_time();
        let limit = VmTime(now.0.saturating_add(nanoseconds(self.patience)));
        let interrupts = |machine: &Machine| -> u64 {
            (0..targets.len()).map(|cpu| machine.timer_interrupts(cpu)).fold(0, u64::saturating_add)
        };
        let mut watched = Interrupts::begin(begun.to_vec());
        let (mut so_far, mut last_vm, mut in_a_row) = (interrupts(walk.stepper.machine()), now, 0u32);
        let storm_at = STORM.saturating_mul(u32::try_from(targets.len()).unwrap_or(1));
        let mut storm = false;
        let done = |machine: &mut Machine, _| {
            // Storm first: early wakes without end complete no tick, so that the ticks below would never come.
            let count = interrupts(machine);
            if count != so_far {
                let vm = machine.vm_time();
                in_a_row = if vm.0.saturating_sub(last_vm.0) <= STORM_GAP_NS { in_a_row.saturating_add(1) } else { 0 };
                (so_far, last_vm) = (count, vm);
                storm = in_a_row >= storm_at;
            }
            if storm {
                return true;
            }
            if let Some(expected) = &self.interrupts {
                watched.note(machine);
                return expected.have_come(&watched) || watched.are_too_many();
            }
            targets.iter().zip(&self.ticking).enumerate().all(|(cpu, (target, ticks))| {
                !ticks || machine.ticks_handled(cpu).is_some_and(|handled| handled >= *target)
            })
        };
        let finish = match walk.stepper.run(Pace::Free, Some(limit), done)? {
            StopReason::Requested if storm => Finish::Storm,
            StopReason::Requested => Finish::Handled,
            // In virtual time, the host never stops a machine.
            StopReason::Reached | StopReason::HostStopped { .. } => Finish::Missing,
            StopReason::Ended(end) => finish_of(&end),
        };
        Ok(Run { finish, ticks: walk.take_handled(), headers: headers(walk), interrupts: watched })
    }
}

/// The policies of the restores.
fn policies(options: &Options) -> Policies {
    let given = Policies {
        deadline: options.deadline,
        downtime: options.downtime,
        downtime_length: Some(options.downtime_length),
        restorer: None,
    };
    let cpus = usize::try_from(options.boot.cpus).unwrap_or(1);
    match options.recipe.as_ref().map(|recipe| (recipe.destination, recipe)) {
        // KVM's restore begins with the values of the stop.
        Some((Destination::Kvm, _)) => Policies { downtime_length: Some(Duration::ZERO), ..Policies::default() },
        // The clocks count on.
        Some((Destination::Same, recipe)) => Policies {
            downtime: DowntimePolicy::CatchUp,
            downtime_length: Some(Duration::from_nanos(recipe.length_ns(cpus))),
            ..given
        },
        Some((Destination::Vmm, _)) | None => given,
    }
}

/// A guest that halts with no interrupt to come has lost its tick; every other end is one of the guest itself.
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

/// One attempt at a point, from its first migration to the verdict.
#[derive(Clone)]
pub(super) struct Attempt {
    /// How many timer interrupts each CPU had had.
    begun: Vec<u64>,
    clocks: ClockHistory,
    before: Vec<Option<Header>>,
    /// Ticks that came while the guest was stepped to a second migration.
    ticks: Vec<Handled>,
    /// With a recipe: how far each vCPU's page was ahead of its TSC after the last migration.
    page_errors_ns: Vec<Option<i64>>,
}

impl Attempt {
    /// Begins at a point, before its migration.
    pub(super) fn begin(walk: &mut Walk) -> Self {
        drop(walk.take_handled());
        let now = walk.stepper.machine().reference();
        Self {
            begun: walk.timer_interrupts(),
            clocks: ClockHistory { before: Vec::new(), now, ahead: Vec::new() },
            before: headers(walk),
            ticks: Vec::new(),
            page_errors_ns: Vec::new(),
        }
    }

    /// Takes the ticks handled since the last call. Needed before each checkpoint, which discards them.
    pub(super) fn collect(&mut self, walk: &mut Walk) {
        self.ticks.extend(walk.take_handled());
    }

    /// Migrates.
    pub(super) fn migrate(&mut self, experiment: &Experiment, walk: &mut Walk, khz: Khz) -> Result<(), SweepError> {
        self.collect(walk);
        let before = match &experiment.recipe {
            None => walk.stepper.migrate(khz, &experiment.policies)?,
            Some(recipe) => {
                let played = Played::new(recipe, khz);
                let khz = recipe.khz_there(walk.stepper.machine().tsc_khz(), khz);
                let before = walk.stepper.migrate_as(khz, &experiment.policies, &played)?;
                self.clocks.ahead = played.tscs_ahead();
                if experiment.measures_pages {
                    self.page_errors_ns = played.page_errors_ns(walk.stepper.machine());
                }
                before
            }
        };
        self.clocks.before.push(before);
        self.clocks.now = walk.stepper.machine().reference();
        Ok(())
    }

    /// Runs to the ticks that are waited for, and returns the outcome.
    pub(super) fn finish(self, experiment: &Experiment, walk: &mut Walk) -> Result<Outcome, SweepError> {
        let run = experiment.run_on(walk, &self.begun)?;
        Ok(self.outcome(experiment, run))
    }

    /// The outcome if the guest ended before the second migration: that of the first one alone.
    pub(super) fn ended(self, experiment: &Experiment, walk: &mut Walk, end: &End) -> Outcome {
        let interrupts = Interrupts::default();
        let run = Run { finish: finish_of(end), ticks: walk.take_handled(), headers: headers(walk), interrupts };
        self.outcome(experiment, run)
    }

    fn outcome(mut self, experiment: &Experiment, run: Run) -> Outcome {
        let Run { finish, ticks, headers, interrupts } = run;
        if let Some(expected) = &experiment.interrupts {
            return expected.verdict(&interrupts, finish);
        }
        self.ticks.extend(ticks);
        let mut counted = Counted::default();
        for ((before, after), ticks) in self.before.iter().zip(&headers).zip(&experiment.ticking) {
            let (Some(before), Some(after), true) = (before, after, ticks) else { continue };
            let back = after.clock_steps_back.saturating_sub(before.clock_steps_back);
            counted.steps_back = counted.steps_back.saturating_add(back);
            // The ring's header holds the worst since boot: it is this run's only if it grew.
            if after.worst_step_back_ns > before.worst_step_back_ns {
                counted.worst_step_back_ns = counted.worst_step_back_ns.max(after.worst_step_back_ns);
            }
            counted.unstable |= after.watchdog.unstable & !before.watchdog.unstable != 0;
            counted.wrong_time |= after.vmclock_wrong > before.vmclock_wrong;
            counted.untold |= experiment.tells && after.guest_stopped_seen <= before.guest_stopped_seen;
        }
        let outcome = experiment.measure.verdict(&self.ticks, &self.clocks, counted, finish);
        Outcome { page_errors_ns: self.page_errors_ns, ..outcome }
    }
}
