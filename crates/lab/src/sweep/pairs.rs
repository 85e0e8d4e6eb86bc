//! Two migrations: to another frequency at one point, back to the first at a later one.

use std::collections::{BTreeMap, BTreeSet};

use oorandom::Rand32;

use super::{
    SweepError,
    cost::{Cost, Lap},
    point::Attempt,
    verdict::Outcome,
    walk::Walk,
    workers::{FIRST, Job, SECOND},
};

impl Job<'_> {
    /// Tries the pairs whose first migration is here. Returns for each chosen second point the outcomes by ratio.
    ///
    /// For each ratio the guest migrates once and is then stepped through the second points in order. Each second
    /// migration starts from a checkpoint at its point, so that the stretch before it is stepped once, not once a pair.
    pub(super) fn pairs(
        &self,
        walk: &mut Walk,
        number: u64,
        samples: u64,
        cost: &mut Cost,
        clock: &mut Lap<'_>,
    ) -> Result<BTreeMap<u64, Vec<Outcome>>, SweepError> {
        let chosen = self.chosen(number, samples);
        let mut outcomes: BTreeMap<u64, Vec<Outcome>> = BTreeMap::new();
        let Some(last) = chosen.last() else { return Ok(outcomes) };
        walk.stepper.take_checkpoint(FIRST)?;
        let track = walk.track.clone();
        let mut reached = 0;
        clock.lap(&mut cost.save);
        for target in self.targets {
            let mut attempt = Attempt::begin(walk);
            attempt.migrate(&self.plan.experiment, walk, target.tsc_khz)?;
            let targets = track.targets(self.options.ticks);
            for second in 0..=*last {
                if chosen.contains(&second) {
                    clock.lap(&mut cost.step);
                    // Before the checkpoint, which discards the ticks handled so far.
                    attempt.collect(walk);
                    walk.stepper.take_checkpoint(SECOND)?;
                    let here = walk.track.clone();
                    clock.lap(&mut cost.save);
                    let mut back = attempt.clone();
                    back.migrate(&self.plan.experiment, walk, self.options.khz)?;
                    outcomes.entry(second).or_default().push(back.finish(&self.plan.experiment, walk)?);
                    clock.lap(&mut cost.run);
                    walk.stepper.restore_checkpoint(SECOND)?;
                    walk.track = here;
                    clock.lap(&mut cost.restore);
                    cost.tries = cost.tries.saturating_add(1);
                }
                reached = reached.max(second);
                // If the guest ends, or has handled all its ticks, before the second migration, the pair's outcome is
                // that of the first migration alone.
                let alone = if walk.handled_so_far().iter().zip(&targets).all(|(handled, target)| handled >= target) {
                    attempt.clone().finish(&self.plan.experiment, walk)?
                } else {
                    match walk.step("the second migration") {
                        Ok(()) => continue,
                        Err(SweepError::GuestEnded { end, .. }) => {
                            reached = u64::MAX;
                            attempt.clone().ended(&self.plan.experiment, walk, &end)
                        }
                        Err(error) => return Err(error),
                    }
                };
                for rest in chosen.range(second.saturating_add(1)..) {
                    outcomes.entry(*rest).or_default().push(alone.clone());
                }
                break;
            }
            walk.stepper.restore_checkpoint(FIRST)?;
            walk.track = track.clone();
        }
        // Second points that no ratio reached are dropped. If the guest ended, they stay: the first migration is then
        // the cause.
        outcomes.retain(|second, _| *second <= reached);
        Ok(outcomes)
    }

    /// The second points that go with the first point `number`. They depend on the seed only, not on worker or shard.
    fn chosen(&self, number: u64, samples: u64) -> BTreeSet<u64> {
        let side = self.plan.extent.boundaries;
        let square = u128::from(side) * u128::from(self.plan.extent.points.max(1));
        let share = u128::from(samples) * u128::from(u32::MAX) / square.max(1);
        // The multiplication spreads the numbers of neighbouring points over all bits of the seed.
        let mut random = Rand32::new(self.options.boot.seed ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        (0..side).filter(|_| u128::from(random.rand_u32()) <= share).collect()
    }
}
