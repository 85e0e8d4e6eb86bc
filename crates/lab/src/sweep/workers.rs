//! The sweep itself: a first walk that counts the boundaries, then workers that share the points.
//!
//! Each worker has a machine of its own and walks the whole stretch, which is cheap. It tries only its own points,
//! which is not. A point's outcome does not depend on the worker.

use std::{
    collections::BTreeSet,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use machine::{
    HostEnvironment, Outputs,
    boot::{
        Image,
        sites::{SiteState, Sites},
    },
};

use super::{
    Depth, Options, SweepError,
    code::Program,
    cost::{Cost, Lap},
    point::Experiment,
    result::{Code, Extent, Findings, Inputs, Point, RecipeUsed, SCHEMA, Shard, Target},
    verdict::Outcome,
    walk::Walk,
    windows,
};
use crate::recipe::{predict, step::Destination};

/// The longest stretch, in instructions.
pub(super) const STRETCH_MAX: u64 = 2_000_000;

/// Checkpoint slots: the beginning of the stretch, the present point, the second migration of a pair.
const BEGINNING: usize = 0;
pub(super) const FIRST: usize = 1;
pub(super) const SECOND: usize = 2;

/// Called after every point with the points done and the points in all.
pub type Progress<'a> = dyn Fn(u64, u64) + Sync + 'a;

/// What the first walk measured.
pub(super) struct Plan {
    pub(super) experiment: Experiment,
    pub(super) extent: Extent,
}

/// The points that a worker tries: every `workers`-th point of its shard.
#[derive(Clone, Copy)]
struct Share {
    shard: Shard,
    worker: u64,
    workers: u64,
}

impl Share {
    fn in_shard(self, ordinal: u64) -> Option<u64> {
        let count = u64::from(self.shard.count.max(1));
        (ordinal % count == u64::from(self.shard.index.saturating_sub(1))).then_some(ordinal / count)
    }

    fn has(self, ordinal: u64) -> bool {
        self.in_shard(ordinal).is_some_and(|own| own % self.workers == self.worker)
    }
}

/// The findings of one worker.
#[derive(Default)]
struct Part {
    points: Vec<Point>,
    addresses: BTreeSet<u64>,
    cost: Cost,
}

/// Sweeps. When `cancel` becomes true, the findings so far are returned, marked as incomplete.
///
/// # Errors
/// [`SweepError`].
pub fn sweep(
    env: &HostEnvironment,
    image: &Image,
    options: &Options,
    cancel: &AtomicBool,
    progress: &Progress<'_>,
) -> Result<(Findings, Cost), SweepError> {
    let targets: Vec<Target> = options
        .ratios
        .iter()
        .map(|ratio| Ok(Target { ratio: ratio.text.clone(), tsc_khz: ratio.of(options.khz)? }))
        .collect::<Result<_, SweepError>>()?;
    if targets.is_empty() {
        return Err(SweepError::Usage("--ratio: name at least one".to_owned()));
    }
    let stays = options.recipe.as_ref().filter(|recipe| recipe.destination == Destination::Same);
    if let Some(recipe) = stays
        && targets.iter().any(|target| target.tsc_khz != options.khz)
    {
        return Err(SweepError::Usage(format!(
            "{}: the VM stays where it is, and its frequency does not change; leave --ratio out, or use --ratio 1",
            recipe.name
        )));
    }
    if options.measures_pages() && options.depth != Depth::One {
        return Err(SweepError::Usage(
            "--recipe: what it loses is measured after one migration; use --depth 1".to_owned(),
        ));
    }
    let program = Program::read(image.bytes());
    let mut first = begin(env, image, &program, options, cancel)?;
    let plan = plan(env, &mut first, options, cancel)?;
    if plan.extent.points == 0 {
        return Err(SweepError::Usage(format!(
            "the stretch has no point: no boundary of it is one after what --every {} asks for",
            options.every.as_str()
        )));
    }
    let shard = options.shard.unwrap_or(Shard { index: 1, count: 1 });
    let workers = u64::from(options.workers.clamp(1, 64));
    let share = |worker| Share { shard, worker, workers };
    let total = u64::try_from((0..plan.extent.points).filter(|n| share(0).in_shard(*n).is_some()).count()).unwrap_or(0);
    let done = std::sync::atomic::AtomicU64::new(0);
    let started = env.clock.tsc();
    let point_done = || {
        progress(done.fetch_add(1, Ordering::Relaxed).saturating_add(1), total);
    };
    let job = Job { env, options, plan: &plan, targets: &targets, cancel, point_done: &point_done };
    let parts: Vec<Result<Part, SweepError>> = thread::scope(|scope| {
        let others: Vec<_> = (1..workers)
            .map(|worker| {
                let job = &job;
                thread::Builder::new().name(format!("sweep{worker}")).spawn_scoped(scope, move || {
                    // A program of its own: its cache of line tables cannot be shared between threads.
                    let mut walk = begin(env, image, &Program::read(image.bytes()), options, cancel)?;
                    walk.stepper.take_checkpoint(BEGINNING)?;
                    job.work(&mut walk, share(worker))
                })
            })
            .collect();
        let mut parts = vec![job.work(&mut first, share(0))];
        for other in others {
            parts.push(match other.map(thread::ScopedJoinHandle::join) {
                Ok(Ok(part)) => part,
                Ok(Err(_)) => Err(SweepError::Worker("it panicked".to_owned())),
                Err(error) => Err(SweepError::Worker(error.to_string())),
            });
        }
        parts
    });
    let mut whole = Part::default();
    for part in parts {
        let part = match part {
            // This worker saw `cancel` before its first point. The points of the others are kept.
            Err(SweepError::Interrupted) => continue,
            part => part?,
        };
        whole.points.extend(part.points);
        whole.addresses.extend(part.addresses);
        whole.cost.add(&part.cost);
    }
    whole.points.sort_by(|a, b| a.at.cmp(&b.at));
    whole.cost.elapsed = env.clock.duration(started, env.clock.tsc());
    let code: Vec<Code> = whole.addresses.iter().map(|address| program.at(*address)).collect();
    let findings = Findings {
        schema: SCHEMA.to_owned(),
        inputs: inputs(image, options, &targets, &plan),
        shard: options.shard,
        complete: !cancel.load(Ordering::Relaxed),
        extent: plan.extent,
        baseline: plan.experiment.baseline,
        totals: windows::totals(&targets, &whole.points),
        windows: windows::windows(&targets, &whole.points),
        code,
        points: whole.points,
    };
    Ok((findings, whole.cost))
}

fn inputs(image: &Image, options: &Options, targets: &[Target], plan: &Plan) -> Inputs {
    let nanoseconds = |length: Duration| u64::try_from(length.as_nanos()).unwrap_or(u64::MAX);
    Inputs {
        guest: image.name().to_owned(),
        guest_crc32: crc32fast::hash(image.bytes()),
        cmdline: options.boot.cmdline.clone(),
        memory: options.boot.memory,
        cpus: options.boot.cpus,
        cpuid: options.boot.cpuid.to_string(),
        seed: options.boot.seed,
        x2apic: options.boot.x2apic,
        vmclock: options.boot.vmclock,
        tsc_khz: options.khz,
        from: options.from.to_string(),
        to: options.to.as_ref().map_or_else(|| "one tick later".to_owned(), ToString::to_string),
        every: options.every.as_str().to_owned(),
        ratios: targets.to_vec(),
        deadline: options.deadline,
        downtime: options.downtime,
        downtime_ns: nanoseconds(options.downtime_length),
        inject: options.inject.clone(),
        recipe: options.recipe.as_ref().filter(|_| options.inject.is_none()).map(|recipe| RecipeUsed {
            name: recipe.name.clone(),
            about: recipe.about.clone(),
            predicted_ns: targets
                .iter()
                .map(|target| predict(recipe, usize::try_from(options.boot.cpus).ok()?, options.khz, target.tsc_khz))
                .collect(),
        }),
        by_interrupts: plan.experiment.interrupts.is_some(),
        initrd_crc32: options.boot.initrd.as_deref().map(crc32fast::hash),
        sites_crc32: image.sites().are_found().then(|| sites_crc32(image.sites())),
        ticks: options.ticks,
        depth: if options.depth == Depth::One { 1 } else { 2 },
        samples: match options.depth {
            Depth::One => None,
            Depth::Two { samples } => Some(samples),
        },
        tolerance_ns: nanoseconds(options.tolerance),
        patience_ns: nanoseconds(plan.experiment.patience),
    }
}

fn sites_crc32(sites: &Sites) -> u32 {
    let mut sum = crc32fast::Hasher::new();
    for SiteState { address, physical, kind, later } in sites.state() {
        let words = [address, physical.unwrap_or(address), u64::from(kind), u64::from(later)];
        words.iter().for_each(|word| sum.update(&word.to_le_bytes()));
    }
    sum.finalize()
}

fn begin(
    env: &HostEnvironment,
    image: &Image,
    program: &Program,
    options: &Options,
    cancel: &AtomicBool,
) -> Result<Walk, SweepError> {
    let outputs = Outputs::new(Box::new(std::io::sink()), None);
    Walk::begin(env, image, program, options, outputs, cancel)
}

/// Walks through the stretch once, counting boundaries and points, and goes back to its beginning.
///
/// Going back restores what a tick can change, not FPU, debug registers and most MSRs. So the walk ends with two
/// checks: these have not changed, and RAM is again as it was.
fn plan(env: &HostEnvironment, walk: &mut Walk, options: &Options, cancel: &AtomicBool) -> Result<Plan, SweepError> {
    walk.stepper.take_checkpoint(BEGINNING)?;
    let resting = walk.stepper.state_outside_checkpoint(env)?;
    let beginning = walk.track.clone();
    let experiment = Experiment::measure(walk, options, BEGINNING)?;
    let mut extent = Extent {
        boundaries: 1,
        points: u64::from(beginning.is_point(options.every)),
        operations: 0,
        from_vm_ns: beginning.place.vm.0,
        to_vm_ns: beginning.place.vm.0,
    };
    while walk.next()? {
        extent.boundaries = extent.boundaries.saturating_add(1);
        extent.to_vm_ns = walk.track.place.vm.0;
        extent.operations = walk.track.place.operations.saturating_sub(beginning.place.operations);
        extent.points = extent.points.saturating_add(u64::from(walk.track.is_point(options.every)));
        if cancel.load(Ordering::Relaxed) {
            return Err(SweepError::Interrupted);
        }
        if extent.boundaries > STRETCH_MAX {
            let to = options.to.as_ref().map_or_else(|| "one tick later".to_owned(), ToString::to_string);
            return Err(SweepError::TooLong { from: options.from.to_string(), to, limit: STRETCH_MAX });
        }
    }
    let counts = walk.timer_interrupts();
    // The last point is before the interrupt that ends the stretch.
    let last: Vec<u64> = match (counts.split_first(), walk.ends_at_interrupt()) {
        (Some((first, others)), Some(_)) => {
            std::iter::once(first.saturating_sub(1)).chain(others.iter().copied()).collect()
        }
        _ => counts,
    };
    if experiment.interrupts.as_ref().is_some_and(|expected| !expected.reaches(&last)) {
        return Err(SweepError::Usage(
            "there are timer interrupts of CPU 0 in the stretch, and too few were seen behind its end to judge by: choose a nearer \
             --to, or tick:N"
                .to_owned(),
        ));
    }
    if walk.stepper.state_outside_checkpoint(env)? != resting {
        return Err(SweepError::NotBack("it changes its FPU, its debug registers or MSRs in the stretch"));
    }
    walk.stepper.restore_checkpoint(BEGINNING)?;
    walk.track = beginning;
    if !walk.stepper.ram_is(BEGINNING) {
        return Err(SweepError::NotBack(
            "its memory is not what it was (KVM's account of written pages is wrong here)",
        ));
    }
    Ok(Plan { experiment, extent })
}

/// What all workers share.
pub(super) struct Job<'a> {
    env: &'a HostEnvironment,
    pub(super) options: &'a Options,
    pub(super) plan: &'a Plan,
    pub(super) targets: &'a [Target],
    cancel: &'a AtomicBool,
    point_done: &'a (dyn Fn() + Sync),
}

impl Job<'_> {
    fn work(&self, walk: &mut Walk, share: Share) -> Result<Part, SweepError> {
        let mut part = Part::default();
        let resting = walk.stepper.state_outside_checkpoint(self.env)?;
        let mut clock = Lap::begin(self.env);
        let (mut number, mut ordinal) = (0u64, 0u64);
        loop {
            if self.cancel.load(Ordering::Relaxed) {
                break;
            }
            if walk.track.is_point(self.options.every) {
                if share.has(ordinal) {
                    clock.lap(&mut part.cost.step);
                    for point in self.at(walk, number, &mut part.cost, &mut clock)? {
                        part.addresses.insert(point.address);
                        part.points.push(point);
                    }
                }
                ordinal = ordinal.saturating_add(1);
            }
            if !walk.next()? {
                break;
            }
            number = number.saturating_add(1);
        }
        clock.lap(&mut part.cost.step);
        walk.stepper.restore_checkpoint(BEGINNING)?;
        if walk.stepper.state_outside_checkpoint(self.env)? != resting || !walk.stepper.ram_is(BEGINNING) {
            return Err(SweepError::NotBack(
                "after a migration it changed its FPU, its debug registers, MSRs, or memory unseen",
            ));
        }
        Ok(part)
    }

    /// Tries the point where `walk` is, or the pairs that begin there.
    fn at(&self, walk: &mut Walk, number: u64, cost: &mut Cost, clock: &mut Lap<'_>) -> Result<Vec<Point>, SweepError> {
        let place = walk.track.place;
        let point = |at: Vec<u64>, outcomes: Vec<Outcome>| Point {
            at,
            cpu: place.cpu.get(),
            address: place.rip,
            halted: place.halted,
            vm_ns: place.vm.0,
            outcomes,
        };
        let points = match self.options.depth {
            Depth::One => {
                walk.stepper.take_checkpoint(FIRST)?;
                clock.lap(&mut cost.save);
                let mut outcomes = Vec::new();
                for target in self.targets {
                    outcomes.push(self.plan.experiment.try_at(walk, target.tsc_khz)?);
                    clock.lap(&mut cost.run);
                    walk.stepper.restore_checkpoint(FIRST)?;
                    clock.lap(&mut cost.restore);
                    cost.tries = cost.tries.saturating_add(1);
                }
                vec![point(vec![number], outcomes)]
            }
            Depth::Two { samples } => {
                let pairs = self.pairs(walk, number, samples, cost, clock)?;
                pairs.into_iter().map(|(second, outcomes)| point(vec![number, second], outcomes)).collect()
            }
        };
        (self.point_done)();
        Ok(points)
    }
}
