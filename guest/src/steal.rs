//! Steal time: what the host says that this CPU did not run, and what a scheduler makes of it.
//!
//! A scheduler charges a task with the time from one tick to the next. A clock that advances over a stop of the VM
//! charges it with the stop, too. Linux subtracts what the steal-time area has gained meanwhile (`update_rq_clock_task`
//! in `kernel/sched/core.c`, with `kvm_steal_clock` in `arch/x86/kernel/kvm.c`).

/// The steal-time area, which the host may be writing.
pub trait Area {
    /// The version. Reads after the call may not move before it.
    fn version(&mut self) -> u32;
    /// The sum in nanoseconds, with any version; it may be torn.
    fn steal(&mut self) -> u64;
    /// Executes PAUSE, while the area is being written.
    fn pause(&mut self);
}

/// Reads the sum, until the version was even and the same before and after.
pub fn read<A: Area>(area: &mut A) -> u64 {
    loop {
        let version = area.version();
        let steal = area.steal();
        if version & 1 == 0 && area.version() == version {
            return steal;
        }
        area.pause();
    }
}

/// What one task that always runs is charged with, from tick to tick.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Charged {
    last: Option<(u64, u64)>,
    /// The longest interval, in nanoseconds of the clock.
    pub longest_ns: u64,
    /// The longest interval less what was stolen in it.
    pub longest_ran_ns: u64,
    /// What was stolen so far.
    pub stolen_ns: u64,
}

impl Charged {
    /// A tick at `now_ns` of the clock, when the area's sum was `steal_ns`.
    pub fn tick(&mut self, now_ns: u64, steal_ns: u64) {
        if let Some((then_ns, before_ns)) = self.last.replace((now_ns, steal_ns)) {
            let interval_ns = now_ns.saturating_sub(then_ns);
            let stolen_ns = steal_ns.wrapping_sub(before_ns);
            self.longest_ns = self.longest_ns.max(interval_ns);
            self.longest_ran_ns = self.longest_ran_ns.max(interval_ns.saturating_sub(stolen_ns));
            self.stolen_ns = self.stolen_ns.wrapping_add(stolen_ns);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    /// Versions in the order in which they are read; the sum is ten times the version read last.
    struct Script(VecDeque<u32>, u32, u32);

    impl Area for Script {
        fn version(&mut self) -> u32 {
            self.1 = self.0.pop_front().unwrap();
            self.1
        }

        fn steal(&mut self) -> u64 {
            u64::from(self.1) * 10
        }

        fn pause(&mut self) {
            self.2 += 1;
        }
    }

    // Catches: a sum that was read while the host wrote it.
    #[test]
    fn a_sum_is_taken_only_under_one_even_version() {
        for (versions, sum, pauses) in [(&[2, 2][..], 20, 0), (&[3, 4, 4], 40, 1), (&[2, 3, 4, 6, 6, 6], 60, 2)] {
            let mut area = Script(versions.iter().copied().collect(), 0, 0);
            assert_eq!((read(&mut area), area.2), (sum, pauses), "{versions:?}");
            assert_eq!(area.0.len(), 0, "{versions:?}");
        }
    }

    // Catches: a stop that is charged in spite of the sum, and one that is subtracted from another interval.
    #[test]
    fn what_was_stolen_is_not_charged() {
        let mut charged = Charged::default();
        for (now_ns, steal_ns) in [(1_000, 7), (2_000, 7), (9_500, 6_507), (10_500, 6_507)] {
            charged.tick(now_ns, steal_ns);
        }
        assert_eq!((charged.longest_ns, charged.longest_ran_ns, charged.stolen_ns), (7_500, 1_000, 6_500));
        let mut untold = Charged::default();
        for now_ns in [1_000, 2_000, 9_500] {
            untold.tick(now_ns, 0);
        }
        assert_eq!((untold.longest_ran_ns, untold.stolen_ns), (7_500, 0));
    }
}
