//! The host time that a sweep takes. It is printed only: findings hold no host time.

use std::time::Duration;

use machine::HostEnvironment;
use vmtime::HostTsc;

/// What a sweep cost, in host time, summed over workers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Migrations tried: points times ratios.
    pub tries: u64,
    /// Wall time from the first point to the last.
    pub elapsed: Duration,
    /// Stepping from boundary to boundary.
    pub step: Duration,
    /// Taking checkpoints.
    pub save: Duration,
    /// Migrating, and running to the ticks after it.
    pub run: Duration,
    /// Going back to checkpoints.
    pub restore: Duration,
}

/// Stopwatch that adds host time to the activity that it was spent on.
pub(super) struct Lap<'a> {
    env: &'a HostEnvironment,
    since: HostTsc,
}

impl<'a> Lap<'a> {
    pub(super) fn begin(env: &'a HostEnvironment) -> Self {
        Self { env, since: env.clock.tsc() }
    }

    /// Adds the time since the last call to `into`.
    pub(super) fn lap(&mut self, into: &mut Duration) {
        let now = self.env.clock.tsc();
        *into = into.saturating_add(self.env.clock.duration(self.since, now));
        self.since = now;
    }
}

impl Cost {
    pub(super) fn add(&mut self, other: &Self) {
        let Self { tries, elapsed: _, step, save, run, restore } = other;
        self.tries = self.tries.saturating_add(*tries);
        for (to, from) in
            [(&mut self.step, step), (&mut self.save, save), (&mut self.run, run), (&mut self.restore, restore)]
        {
            *to = to.saturating_add(*from);
        }
    }
}
