//! Judges a guest that keeps no records of its ticks: by its timer interrupts, as the VMM sees them.
//!
//! Such a guest's timer may be armed for anything. But without a migration it interrupts at certain instants of VM
//! time, and a migration should change none of them. So the interrupts after a migration are compared with those of the
//! same run without one.

use machine::Machine;

use super::verdict::{Finish, Outcome, Verdict};

/// The instants of timer interrupts, in VM time, for each CPU. An interrupt is noticed at the guest's next exit, so
/// that an instant can be some operations too late.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Interrupts {
    /// How many each CPU has had.
    counts: Vec<u64>,
    /// When the ones since the beginning came.
    pub(super) at_ns: Vec<Vec<u64>>,
}

impl Interrupts {
    /// Begins to watch a machine of `cpus` CPUs.
    pub(super) fn begin(machine: &Machine, cpus: usize) -> Self {
        let counts = (0..cpus).map(|cpu| machine.timer_interrupts(cpu)).collect();
        Self { counts, at_ns: vec![Vec::new(); cpus] }
    }

    /// Notes the interrupts that have come since. Call it after each exit of the guest.
    pub(super) fn note(&mut self, machine: &Machine) {
        for (cpu, (count, at_ns)) in self.counts.iter_mut().zip(&mut self.at_ns).enumerate() {
            let now = machine.timer_interrupts(cpu);
            if now != *count {
                *count = now;
                at_ns.push(machine.vm_time().0);
            }
        }
    }
}

/// What the guest does without a migration: the instants of its timer interrupts from the beginning of the stretch.
#[derive(Clone, Debug)]
pub(super) struct Expected {
    at_ns: Vec<Vec<u64>>,
    /// How many of them, from the point on, a run waits for.
    ticks: usize,
    tolerance_ns: u64,
}

impl Expected {
    /// From a run without a migration, in which CPU 0 had at least two interrupts more than `ticks`.
    pub(super) fn new(undisturbed: Interrupts, ticks: u64, tolerance_ns: u64) -> Self {
        Self { at_ns: undisturbed.at_ns, ticks: usize::try_from(ticks).unwrap_or(usize::MAX), tolerance_ns }
    }

    /// The longest time between two interrupts of CPU 0; 0 if there are not two.
    pub(super) fn period_ns(&self) -> u64 {
        let first = self.at_ns.first().map(Vec::as_slice).unwrap_or_default();
        first.array_windows().map(|[a, b]| b.saturating_sub(*a)).max().unwrap_or(0)
    }

    /// The interrupts that are waited for after `now_ns`, for each CPU. CPUs that have none in time have no part.
    fn awaited(&self, now_ns: u64) -> impl Iterator<Item = &[u64]> {
        self.at_ns.iter().map(move |at_ns| {
            let after = at_ns.partition_point(|at| *at <= now_ns);
            at_ns.get(after..).and_then(|later| later.get(..self.ticks)).unwrap_or_default()
        })
    }

    /// Whether all interrupts that are waited for after `begun_ns` have come.
    pub(super) fn have_come(&self, begun_ns: u64, came: &Interrupts) -> bool {
        self.awaited(begun_ns).zip(&came.at_ns).all(|(awaited, came)| match (awaited.last(), came.last()) {
            (None, _) => true,
            (Some(last), Some(came)) => *came >= last.saturating_sub(self.tolerance_ns),
            (Some(_), None) => false,
        })
    }

    /// The verdict on a run after a migration at `begun_ns`.
    pub(super) fn verdict(&self, begun_ns: u64, came: &Interrupts, finish: Finish) -> Outcome {
        let (mut early_wakes, mut late_ns) = (0u64, None);
        for (awaited, came) in self.awaited(begun_ns).zip(&came.at_ns) {
            let mut came = came.iter().copied();
            let mut last = None;
            for due in awaited {
                let from = due.saturating_sub(self.tolerance_ns);
                // One interrupt can be that of several instants, if it is so late.
                while last.is_none_or(|last| last < from) {
                    let Some(at) = came.next() else { break };
                    early_wakes = early_wakes.saturating_add(u64::from(at < from));
                    last = Some(at);
                }
                if let Some(at) = last.filter(|at| *at >= from) {
                    late_ns = late_ns.max(Some(at.saturating_sub(*due)));
                }
            }
        }
        let (verdict, ended) = match finish {
            Finish::Ended(reason) => (Verdict::Ended, Some(reason)),
            Finish::Missing => (Verdict::Lost, None),
            Finish::Storm => (Verdict::Storm, None),
            Finish::Handled if late_ns > Some(self.tolerance_ns) => (Verdict::Late, None),
            Finish::Handled if early_wakes > 0 => (Verdict::Rearmed, None),
            Finish::Handled => (Verdict::OnTime, None),
        };
        Outcome {
            verdict,
            early_wakes,
            late_ns,
            clock_error_ns: 0,
            page_errors_ns: Vec::new(),
            unstable: false,
            wrong_time: false,
            ended,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn came(at_ms: &[u64]) -> Interrupts {
        Interrupts { counts: vec![0, 0], at_ns: vec![at_ms.iter().map(|ms| ms * MS).collect(), Vec::new()] }
    }

    /// CPU 0 every 10 ms, two of them are waited for; CPU 1 never.
    fn expected() -> Expected {
        Expected::new(came(&[10, 20, 30, 40]), 2, MS / 100)
    }

    fn verdict(begun_ms: u64, at_ms: &[u64]) -> (Verdict, u64, Option<u64>) {
        let Outcome { verdict, early_wakes, late_ns, .. } =
            expected().verdict(begun_ms * MS, &came(at_ms), Finish::Handled);
        (verdict, early_wakes, late_ns.map(|ns| ns / MS))
    }

    // Catches: a run that is ended before the interrupt that would show the fault, or that waits for one which the
    // guest never has.
    #[test]
    fn a_run_waits_for_the_interrupts_after_the_point() {
        let expected = expected();
        assert!(!expected.have_come(12 * MS, &came(&[20])));
        assert!(expected.have_come(12 * MS, &came(&[20, 30])));
        assert!(expected.have_come(2 * MS, &came(&[10, 20])));
        // A late one stands for all before it.
        assert!(expected.have_come(2 * MS, &came(&[25])));
        assert_eq!(expected.period_ns(), 10 * MS);
    }

    // Catches: an interrupt compared with another one's instant; one that is early taken for the one that is due.
    #[test]
    fn each_interrupt_is_compared_with_its_own_instant() {
        assert_eq!(verdict(12, &[20, 30]), (Verdict::OnTime, 0, Some(0)));
        // Armed for half the time, and again for half of the rest.
        assert_eq!(verdict(12, &[16, 18, 20, 30]), (Verdict::Rearmed, 2, Some(0)));
        assert_eq!(verdict(12, &[20, 40]), (Verdict::Late, 0, Some(10)));
        assert_eq!(verdict(12, &[25, 30]), (Verdict::Late, 0, Some(5)));
        assert_eq!(verdict(12, &[50]), (Verdict::Late, 0, Some(30)));
    }

    // Catches: a guest that stops interrupting, or interrupts without end, judged by what came before that.
    #[test]
    fn a_run_that_did_not_end_well_is_named_so() {
        let of = |finish| expected().verdict(0, &came(&[10, 20]), finish).verdict;
        assert_eq!(of(Finish::Missing), Verdict::Lost);
        assert_eq!(of(Finish::Storm), Verdict::Storm);
        assert_eq!(of(Finish::Ended("crash".to_owned())), Verdict::Ended);
    }
}
