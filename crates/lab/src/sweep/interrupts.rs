//! Judges a guest that keeps no records of its ticks: by its timer interrupts, as the VMM sees them.
//!
//! Such a guest's timer may be armed for anything. But without a migration it interrupts at certain instants of VM
//! time, and a migration should change none of them. So the interrupts after a migration are compared with those of the
//! same run without one.

use machine::Machine;

use super::verdict::{Finish, Outcome, Verdict};

/// More instants than a stretch and the ticks behind it have; bounds the memory for a guest that interrupts itself
/// without end.
const MAX_INSTANTS: usize = 1 << 20;

/// The instants of timer interrupts, in VM time, for each CPU. An interrupt is noticed at the guest's next exit, so
/// that an instant can be some operations too late.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Interrupts {
    /// How many each CPU had had at the beginning.
    before: Vec<u64>,
    /// When the ones since then came.
    at_ns: Vec<Vec<u64>>,
}

impl Interrupts {
    /// Begins to watch a machine whose CPUs have had so many.
    pub(super) fn begin(before: Vec<u64>) -> Self {
        let at_ns = vec![Vec::new(); before.len()];
        Self { before, at_ns }
    }

    /// Notes the interrupts that have come since. Call it after each exit of the guest.
    pub(super) fn note(&mut self, machine: &Machine) {
        for (cpu, (before, at_ns)) in self.before.iter().zip(&mut self.at_ns).enumerate() {
            let since = usize::try_from(machine.timer_interrupts(cpu).saturating_sub(*before)).unwrap_or(usize::MAX);
            if since > at_ns.len() {
                at_ns.push(machine.vm_time().0);
            }
        }
    }

    /// Whether there are more of them than can be kept.
    pub(super) fn are_too_many(&self) -> bool {
        self.at_ns.iter().map(Vec::len).sum::<usize>() > MAX_INSTANTS
    }

    /// How many CPU 0 has had since the beginning.
    pub(super) fn of_first_cpu(&self) -> usize {
        self.at_ns.first().map_or(0, Vec::len)
    }
}

/// What the guest does without a migration: the instants of its timer interrupts from the beginning of the stretch.
#[derive(Clone, Debug)]
pub(super) struct Expected {
    undisturbed: Interrupts,
    /// How many of them, from the point on, a run waits for.
    ticks: usize,
    tolerance_ns: u64,
}

impl Expected {
    /// From a run without a migration.
    pub(super) fn new(undisturbed: Interrupts, ticks: u64, tolerance_ns: u64) -> Self {
        Self { undisturbed, ticks: usize::try_from(ticks).unwrap_or(usize::MAX), tolerance_ns }
    }

    /// The longest time between two interrupts of CPU 0; 0 if there are not two.
    pub(super) fn period_ns(&self) -> u64 {
        let first = self.undisturbed.at_ns.first().map(Vec::as_slice).unwrap_or_default();
        first.array_windows().map(|[a, b]| b.saturating_sub(*a)).max().unwrap_or(0)
    }

    /// Whether CPU 0 has all that a point waits for at which it has had `counts` interrupts.
    pub(super) fn reaches(&self, counts: &[u64]) -> bool {
        self.awaited(counts).next().is_some_and(|awaited| awaited.len() >= self.ticks)
    }

    /// The interrupts that are waited for, for each CPU, at a point at which they have had `counts`. By count, not by
    /// time: at a point in a handler the instant of its interrupt has not been noticed yet. A CPU that is to have fewer
    /// in the time is judged by these.
    fn awaited(&self, counts: &[u64]) -> impl Iterator<Item = &[u64]> {
        let Self { undisturbed: Interrupts { before, at_ns }, ticks, .. } = self;
        at_ns.iter().zip(before).zip(counts).map(|((at_ns, before), count)| {
            let had = usize::try_from(count.saturating_sub(*before)).unwrap_or(usize::MAX);
            let left = at_ns.get(had..).unwrap_or_default();
            left.get(..*ticks).unwrap_or(left)
        })
    }

    /// Whether all interrupts that are waited for have come.
    pub(super) fn have_come(&self, came: &Interrupts) -> bool {
        self.awaited(&came.before).zip(&came.at_ns).all(|(awaited, came)| match (awaited.last(), came.last()) {
            (None, _) => true,
            (Some(last), Some(came)) => *came >= last.saturating_sub(self.tolerance_ns),
            (Some(_), None) => false,
        })
    }

    /// The verdict on the interrupts that `came` after a migration.
    pub(super) fn verdict(&self, came: &Interrupts, finish: Finish) -> Outcome {
        let (mut early_wakes, mut late_ns, mut missing) = (0u64, None, false);
        for (awaited, came) in self.awaited(&came.before).zip(&came.at_ns) {
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
                match last.filter(|at| *at >= from) {
                    Some(at) => late_ns = late_ns.max(Some(at.saturating_sub(*due))),
                    None => missing = true,
                }
            }
        }
        let (verdict, ended) = match finish {
            Finish::Ended(reason) => (Verdict::Ended, Some(reason)),
            Finish::Missing => (Verdict::Lost, None),
            Finish::Storm => (Verdict::Storm, None),
            Finish::Handled if missing => (Verdict::Lost, None),
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

    /// CPU 0 had had `before` interrupts, and then these; CPU 1 had had 7, and then `other`.
    fn interrupts(before: u64, at_ms: &[u64], other: &[u64]) -> Interrupts {
        let ns = |at_ms: &[u64]| at_ms.iter().map(|ms| ms * MS).collect();
        Interrupts { before: vec![before, 7], at_ns: vec![ns(at_ms), ns(other)] }
    }

    /// The stretch begins when CPU 0 has had 5. It then has one every 10 ms; two of them are waited for.
    fn expected(other: &[u64]) -> Expected {
        Expected::new(interrupts(5, &[10, 20, 30, 40], other), 2, MS / 100)
    }

    fn verdict(before: u64, at_ms: &[u64]) -> (Verdict, u64, Option<u64>) {
        let Outcome { verdict, early_wakes, late_ns, .. } =
            expected(&[]).verdict(&interrupts(before, at_ms, &[]), Finish::Handled);
        (verdict, early_wakes, late_ns.map(|ns| ns / MS))
    }

    // Catches: a run that is ended before the interrupt that would show the fault, or that waits for one which the
    // guest never has; a point that waits for fewer than it must.
    #[test]
    fn a_run_waits_for_the_interrupts_after_the_point() {
        let expected = expected(&[]);
        assert!(!expected.have_come(&interrupts(6, &[20], &[])));
        assert!(expected.have_come(&interrupts(6, &[20, 30], &[])));
        assert!(expected.have_come(&interrupts(5, &[10, 20], &[])));
        // A late one stands for all before it.
        assert!(expected.have_come(&interrupts(5, &[25], &[])));
        assert_eq!(expected.period_ns(), 10 * MS);
        assert!(expected.reaches(&[7, 7]) && !expected.reaches(&[8, 7]));
    }

    // Catches: an interrupt compared with another one's instant; one that is early taken for the one that is due.
    #[test]
    fn each_interrupt_is_compared_with_its_own_instant() {
        assert_eq!(verdict(6, &[20, 30]), (Verdict::OnTime, 0, Some(0)));
        // Armed for half the time, and again for half of the rest.
        assert_eq!(verdict(6, &[16, 18, 20, 30]), (Verdict::Rearmed, 2, Some(0)));
        assert_eq!(verdict(6, &[20, 40]), (Verdict::Late, 0, Some(10)));
        assert_eq!(verdict(6, &[25, 30]), (Verdict::Late, 0, Some(5)));
        assert_eq!(verdict(6, &[50]), (Verdict::Late, 0, Some(30)));
        // One of them never came, whatever ended the run.
        assert_eq!(verdict(6, &[20]).0, Verdict::Lost);
        assert_eq!(verdict(6, &[]).0, Verdict::Lost);
    }

    // Catches: a CPU whose timer is slower than CPU 0's, and whose interrupt is lost unseen.
    #[test]
    fn a_cpu_with_fewer_interrupts_is_judged_by_these() {
        let expected = expected(&[25]);
        let of = |other: &[u64]| {
            let came = interrupts(6, &[20, 30], other);
            (expected.have_come(&came), expected.verdict(&came, Finish::Handled).verdict)
        };
        assert_eq!(of(&[25]), (true, Verdict::OnTime));
        assert_eq!(of(&[]), (false, Verdict::Lost));
        assert_eq!(of(&[29]), (true, Verdict::Late));
    }

    // Catches: a guest that stops interrupting, or interrupts without end, judged by what came before that.
    #[test]
    fn a_run_that_did_not_end_well_is_named_so() {
        let of = |finish| expected(&[]).verdict(&interrupts(5, &[10, 20], &[]), finish).verdict;
        assert_eq!(of(Finish::Missing), Verdict::Lost);
        assert_eq!(of(Finish::Storm), Verdict::Storm);
        assert_eq!(of(Finish::Ended("crash".to_owned())), Verdict::Ended);
    }
}
