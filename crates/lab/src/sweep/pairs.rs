//! Two migrations: there at one point, and back at a later one.

use std::collections::{BTreeMap, BTreeSet};

use oorandom::Rand32;

use super::{
    SweepError,
    cost::{Cost, Lap},
    point::Leg,
    verdict::Outcome,
    walk::Walk,
    workers::{FIRST, Job, SECOND},
};

impl Job<'_> {
    /// The pairs whose first migration is here: for each second point that was chosen, what came of it by ratio.
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
        walk.stepper.keep(FIRST)?;
        let track = walk.track.clone();
        let mut reached = 0;
        clock.lap(&mut cost.save);
        for target in self.targets {
            let mut leg = Leg::begin(walk);
            leg.migrate(&self.plan.bench, walk, target.tsc_khz)?;
            let targets = track.targets(self.options.ticks);
            for second in 0..=*last {
                if chosen.contains(&second) {
                    clock.lap(&mut cost.step);
                    // Ticks so far are the leg's: a checkpoint forgets them.
                    leg.collect(walk);
                    walk.stepper.keep(SECOND)?;
                    let here = walk.track.clone();
                    clock.lap(&mut cost.save);
                    let mut back = leg.clone();
                    back.migrate(&self.plan.bench, walk, self.options.khz)?;
                    outcomes.entry(second).or_default().push(back.finish(&self.plan.bench, walk)?);
                    clock.lap(&mut cost.run);
                    walk.stepper.go_back(SECOND)?;
                    walk.track = here;
                    clock.lap(&mut cost.restore);
                    cost.tries = cost.tries.saturating_add(1);
                }
                reached = reached.max(second);
                // Where the guest does not get to the second migration, the pair comes to what the first one does alone.
                let alone = if walk.handled_so_far().iter().zip(&targets).all(|(handled, target)| handled >= target) {
                    leg.clone().finish(&self.plan.bench, walk)?
                } else {
                    match walk.step("the second migration") {
                        Ok(()) => continue,
                        Err(SweepError::GuestEnded { end, .. }) => {
                            reached = u64::MAX;
                            leg.clone().ended(&self.plan.bench, walk, &end)
                        }
                        Err(error) => return Err(error),
                    }
                };
                for rest in chosen.range(second.saturating_add(1)..) {
                    outcomes.entry(*rest).or_default().push(alone.clone());
                }
                break;
            }
            walk.stepper.go_back(FIRST)?;
            walk.track = track.clone();
        }
        // Second points that no ratio came to are none, unless it was the first migration that kept the guest from them.
        outcomes.retain(|second, _| *second <= reached);
        Ok(outcomes)
    }

    /// The second points that go with the first point `number`, by the seed alone.
    fn chosen(&self, number: u64, samples: u64) -> BTreeSet<u64> {
        let side = self.plan.extent.boundaries;
        let square = u128::from(side) * u128::from(self.plan.extent.points.max(1));
        let share = u128::from(samples) * u128::from(u32::MAX) / square.max(1);
        // Neighbouring seeds of the generator are mixed by its own first steps.
        let mut random = Rand32::new(self.options.boot.seed ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        (0..side).filter(|_| u128::from(random.rand_u32()) <= share).collect()
    }
}
