//! What one LAPIC's timer was told to wait for, and what became of that. It needs no record of the guest's, and so
//! judges any guest.
//!
//! The VMM cannot know for which instant a guest wanted an interrupt. It knows the instant for which the timer was
//! armed: a TSC deadline is due at a VM time that follows from the TSC's frequency at that moment. A migration changes
//! the frequency, and the deadline policy decides what becomes of the deadline; so the interrupt may come at another VM
//! time. That is what [`InFlight`] says. How a guest computes its deadlines after a migration shows if its armings are
//! compared with those of a copy of the machine that was not migrated: for that the first ones are kept.
//!
//! VM times are those of the reference clock. Deadlines that are VM times themselves (counts, nanosecond deadlines)
//! follow the kvmclock page, which drifts from it by a microsecond an hour.

use serde::Serialize;
use vlapic::Armed;
use vmtime::{GuestTsc, Now, VmTime};

/// How many armings are kept after each resume.
const KEPT: usize = 8;

/// The account of one vCPU's timer. Nothing in it grows with time.
#[derive(Clone, Debug)]
pub(crate) struct TimerAudit {
    /// What the timer waits for; none if it is not armed.
    open: Option<Open>,
    /// A deadline that was in flight at a resume has expired, and its interrupt has not entered yet: when it was to
    /// come.
    expired: Option<VmTime>,
    account: TimerAccount,
}

/// What the timer waits for.
#[derive(Clone, Copy, Debug)]
struct Open {
    /// VM time at which it was due when it was armed.
    asked: VmTime,
    /// If it was in flight at a resume: that, or the VM time of the resume if that is later.
    expected: Option<VmTime>,
}

/// How a timer was armed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ArmingKind {
    /// IA32_TSC_DEADLINE.
    Tsc,
    /// The nanosecond deadline MSR.
    Ns,
    /// One-shot or periodic mode, which count VM time.
    Count,
}

/// One arming.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Arming {
    /// How.
    pub kind: ArmingKind,
    /// When.
    pub at: VmTime,
    /// VM time at which it is due, by the TSC frequency at that moment; not before `at`.
    pub due: VmTime,
}

/// What a vCPU's timer was armed for, and what became of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct TimerAccount {
    /// Armings by a TSC deadline.
    pub by_tsc: u64,
    /// Armings by a nanosecond deadline.
    pub by_ns: u64,
    /// Armings by an initial count.
    pub by_count: u64,
    /// Armings that were due at once.
    pub due_at_once: u64,
    /// How often an armed timer was armed anew before it expired.
    pub replaced: u64,
    /// How often an armed timer was disarmed.
    pub disarmed: u64,
    /// How often it expired later than at once.
    pub expired: u64,
    /// Interrupts that entered the guest.
    pub interrupts: u64,
    /// Those that were armed at a resume.
    pub in_flight: InFlight,
    /// The first armings since the last resume.
    pub first: Vec<Arming>,
}

/// What became of timers that were armed at a resume. An interrupt is expected at the VM time for which the timer was
/// armed by the frequency at that moment, or at the resume if VM time has advanced beyond that.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct InFlight {
    /// How many, counted at each resume.
    pub count: u64,
    /// Those that the resume disarmed.
    pub lost: u64,
    /// The resume left the timer armed for an instant that is later than expected: by how much, at most.
    pub late_ns: u64,
    /// The same for an earlier one.
    pub early_ns: u64,
    /// Interrupts that entered the guest.
    pub interrupts: u64,
    /// How much later than expected an interrupt entered, at most.
    pub entered_late_ns: u64,
    /// Those that the guest replaced or disarmed before they expired.
    pub replaced: u64,
}

impl TimerAudit {
    /// The account of a timer that is due at `due`; none if it is not armed.
    pub(crate) fn new(due: Option<VmTime>) -> Self {
        // Armings are noted while the guest runs, where nothing allocates.
        let account = TimerAccount { first: Vec::with_capacity(KEPT), ..TimerAccount::default() };
        Self { open: due.map(Open::armed_for), expired: None, account }
    }

    /// What is known.
    pub(crate) fn account(&self) -> TimerAccount {
        self.account.clone()
    }

    /// The guest armed or disarmed the timer at `now`. `time` converts a base TSC.
    pub(crate) fn written(&mut self, armed: Armed, now: Now, time: impl Fn(GuestTsc) -> VmTime) {
        let Self { open, account, expired: _ } = self;
        let (kind, due, count) = match armed {
            Armed::Disarmed => {
                if let Some(was) = open.take() {
                    account.disarmed = account.disarmed.saturating_add(1);
                    account.in_flight.replace(was);
                }
                return;
            }
            Armed::Tsc(deadline) => {
                let left = deadline.0.saturating_sub(now.tsc.0);
                (ArmingKind::Tsc, time(GuestTsc(now.base.0.saturating_add(left))), &mut account.by_tsc)
            }
            Armed::Ns(due) => (ArmingKind::Ns, due, &mut account.by_ns),
            Armed::Count { expires } => (ArmingKind::Count, expires, &mut account.by_count),
        };
        *count = count.saturating_add(1);
        if let Some(was) = open.take() {
            account.replaced = account.replaced.saturating_add(1);
            account.in_flight.replace(was);
        }
        let at = time(now.base);
        if due > at {
            *open = Some(Open::armed_for(due));
        } else {
            account.due_at_once = account.due_at_once.saturating_add(1);
        }
        if account.first.len() < KEPT {
            account.first.push(Arming { kind, at, due: due.max(at) });
        }
    }

    /// It expired. `interrupts`: its LVT entry is not masked. `next`: when the next period ends.
    pub(crate) fn expired(&mut self, interrupts: bool, next: Option<VmTime>) {
        if let Some(was) = self.open.take() {
            self.account.expired = self.account.expired.saturating_add(1);
            if interrupts && let Some(expected) = was.expected {
                self.expired = Some(expected);
            }
        }
        self.open = next.map(Open::armed_for);
    }

    /// Its interrupt entered the guest.
    pub(crate) fn entered(&mut self, at: VmTime) {
        let account = &mut self.account;
        account.interrupts = account.interrupts.saturating_add(1);
        if let Some(expected) = self.expired.take() {
            let in_flight = &mut account.in_flight;
            in_flight.interrupts = in_flight.interrupts.saturating_add(1);
            in_flight.entered_late_ns = in_flight.entered_late_ns.max(at.0.saturating_sub(expected.0));
        }
    }

    /// An INIT disarmed it, and took back what it had requested.
    pub(crate) fn initialized(&mut self) {
        (self.open, self.expired) = (None, None);
    }

    /// The machine was resumed, and VM time is `now`. `due`: for which VM time the timer is armed now.
    pub(crate) fn resumed(&mut self, due: Option<VmTime>, now: VmTime) {
        self.account.first.clear();
        let Some(open) = self.open.take() else {
            // Another VMM's restore armed one that was not armed.
            self.open = due.map(Open::armed_for);
            return;
        };
        let expected = open.asked.max(now);
        let in_flight = &mut self.account.in_flight;
        in_flight.count = in_flight.count.saturating_add(1);
        let Some(due) = due.map(|due| due.max(now)) else {
            in_flight.lost = in_flight.lost.saturating_add(1);
            return;
        };
        in_flight.late_ns = in_flight.late_ns.max(due.0.saturating_sub(expected.0));
        in_flight.early_ns = in_flight.early_ns.max(expected.0.saturating_sub(due.0));
        self.open = Some(Open { expected: Some(expected), ..open });
    }
}

impl Open {
    fn armed_for(asked: VmTime) -> Self {
        Self { asked, expected: None }
    }
}

impl InFlight {
    fn replace(&mut self, was: Open) {
        if was.expected.is_some() {
            self.replaced = self.replaced.saturating_add(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vmtime::{Khz, ReferenceClock};

    use super::*;

    const MS: u64 = 1_000_000;

    /// A clock that began at TSC 0 with 2 GHz.
    fn clock() -> ReferenceClock {
        ReferenceClock::start(VmTime(0), GuestTsc(0), Khz::new(2_000_000).unwrap())
    }

    fn at_ms(clock: &ReferenceClock, ticks_per_ms: u64, ms: u64) -> Now {
        let tsc = GuestTsc(ticks_per_ms * ms);
        Now { tsc, base: tsc, vm: clock.at(tsc) }
    }

    /// An account of a timer that was armed at 1 ms for 11 ms.
    fn armed() -> TimerAudit {
        let (mut audit, clock) = (TimerAudit::new(None), clock());
        audit.written(Armed::Tsc(GuestTsc(11 * 2 * MS)), at_ms(&clock, 2 * MS, 1), |tsc| clock.at(tsc));
        audit
    }

    // Catches: a due time by another frequency than that at the arming, and a kind that is counted as another.
    #[test]
    fn an_arming_is_due_by_the_frequency_at_that_moment() {
        let (mut audit, clock) = (armed(), clock());
        let time = |tsc| clock.at(tsc);
        let first = Arming { kind: ArmingKind::Tsc, at: VmTime(MS), due: VmTime(11 * MS) };
        assert_eq!(audit.account().first, [first]);
        audit.written(Armed::Ns(VmTime(7 * MS)), at_ms(&clock, 2 * MS, 2), time);
        audit.written(Armed::Count { expires: VmTime(8 * MS) }, at_ms(&clock, 2 * MS, 3), time);
        audit.written(Armed::Disarmed, at_ms(&clock, 2 * MS, 4), time);
        audit.written(Armed::Disarmed, at_ms(&clock, 2 * MS, 4), time);
        audit.written(Armed::Tsc(GuestTsc(1)), at_ms(&clock, 2 * MS, 5), time);
        let TimerAccount { by_tsc, by_ns, by_count, due_at_once, replaced, disarmed, expired, first, .. } =
            audit.account();
        assert_eq!((by_tsc, by_ns, by_count), (2, 1, 1));
        assert_eq!((due_at_once, replaced, disarmed, expired), (1, 2, 1, 0));
        assert_eq!(first.last(), Some(&Arming { kind: ArmingKind::Tsc, at: VmTime(5 * MS), due: VmTime(5 * MS) }));
    }

    // Catches: a deadline that a resume moved, and an account that calls it on time; lateness counted from the moved
    // deadline.
    #[test]
    fn a_deadline_in_flight_is_expected_when_it_was_armed_for() {
        let mut kept = armed();
        // Half the frequency: the 6 ms that are left take 12.
        kept.resumed(Some(VmTime(17 * MS)), VmTime(5 * MS));
        assert_eq!(kept.account().first, []);
        kept.expired(true, None);
        kept.entered(VmTime(17 * MS + 5));
        // This one was not in flight.
        kept.expired(true, None);
        kept.entered(VmTime(40 * MS));
        let late =
            InFlight { count: 1, late_ns: 6 * MS, interrupts: 1, entered_late_ns: 6 * MS + 5, ..InFlight::default() };
        assert_eq!(kept.account().in_flight, late);
        assert_eq!(kept.account().interrupts, 2);

        let mut early = armed();
        early.resumed(Some(VmTime(8 * MS)), VmTime(5 * MS));
        assert_eq!(early.account().in_flight, InFlight { count: 1, early_ns: 3 * MS, ..InFlight::default() });
    }

    // Catches: a second migration judged by where the first one left the deadline.
    #[test]
    fn errors_of_several_resumes_add_up() {
        let mut audit = armed();
        audit.resumed(Some(VmTime(17 * MS)), VmTime(5 * MS));
        audit.resumed(Some(VmTime(20 * MS)), VmTime(6 * MS));
        let InFlight { count, late_ns, .. } = audit.account().in_flight;
        assert_eq!((count, late_ns), (2, 9 * MS));
    }

    // Catches: downtime that VM time counts, blamed on the deadline policy; a timer that a resume disarmed, unnoticed.
    #[test]
    fn a_deadline_within_the_downtime_is_expected_at_the_resume() {
        let mut passed = armed();
        passed.resumed(Some(VmTime(11 * MS)), VmTime(60 * MS));
        assert_eq!(passed.account().in_flight, InFlight { count: 1, ..InFlight::default() });
        passed.expired(true, None);
        passed.entered(VmTime(60 * MS + 3));
        assert_eq!(passed.account().in_flight.entered_late_ns, 3);

        let mut lost = armed();
        lost.resumed(None, VmTime(5 * MS));
        assert_eq!(lost.account().in_flight, InFlight { count: 1, lost: 1, ..InFlight::default() });
        // An INIT had disarmed it before.
        let mut none = armed();
        none.initialized();
        none.resumed(None, VmTime(5 * MS));
        assert_eq!(none.account().in_flight, InFlight::default());
    }

    // Catches: a masked timer's expiry taken for one whose interrupt is still to come; one that was replaced.
    #[test]
    fn what_never_interrupts_is_not_waited_for() {
        let mut masked = armed();
        masked.resumed(Some(VmTime(17 * MS)), VmTime(5 * MS));
        masked.expired(false, None);
        masked.entered(VmTime(40 * MS));
        assert_eq!(masked.account().in_flight.interrupts, 0);

        let mut replaced = armed();
        replaced.resumed(Some(VmTime(17 * MS)), VmTime(5 * MS));
        replaced.written(Armed::Disarmed, at_ms(&clock(), 2 * MS, 6), |tsc| clock().at(tsc));
        assert_eq!(replaced.account().in_flight.replaced, 1);
    }

    // Catches: an account that grows with the guest's armings, or keeps the last ones.
    #[test]
    fn the_first_armings_are_kept() {
        let (mut audit, clock) = (TimerAudit::new(Some(VmTime(5))), clock());
        let capacity = audit.account.first.capacity();
        for ms in 1..100 {
            let due = GuestTsc(2 * MS * (ms + 3));
            audit.written(Armed::Tsc(due), at_ms(&clock, 2 * MS, ms), |tsc| clock.at(tsc));
        }
        let first: Vec<u64> = audit.account().first.iter().map(|arming| arming.at.0 / MS).collect();
        assert_eq!(first, (1..=8).collect::<Vec<u64>>());
        assert_eq!(audit.account.first.capacity(), capacity);
    }

    proptest! {
        // Catches: an interval that is rounded, wraps or takes the vCPU's TSC for the base. The model has 128 bits.
        #[test]
        fn an_interval_has_its_length(
            khz in Khz::MIN.get()..=Khz::MAX.get(),
            base in 0..u64::MAX / 4,
            ahead in any::<u64>(),
            ticks in 0..u64::MAX / 4,
        ) {
            let clock = ReferenceClock::start(VmTime(0), GuestTsc(0), Khz::try_from(khz).unwrap());
            let tsc = base.wrapping_add(ahead);
            prop_assume!(tsc.checked_add(ticks).is_some());
            let now = Now { tsc: GuestTsc(tsc), base: GuestTsc(base), vm: VmTime(0) };
            let mut audit = TimerAudit::new(None);
            audit.written(Armed::Tsc(GuestTsc(tsc + ticks)), now, |tsc| clock.at(tsc));
            let model = |ticks: u64| {
                let ns = u128::from(ticks) * 1_000_000 / u128::from(khz);
                VmTime(u64::try_from(ns).unwrap_or(u64::MAX))
            };
            let arming = Arming { kind: ArmingKind::Tsc, at: model(base), due: model(base + ticks) };
            prop_assert_eq!(&audit.account().first, &[arming]);
        }
    }
}
