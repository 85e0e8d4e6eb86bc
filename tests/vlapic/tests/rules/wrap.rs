//! A TSC that the guest moves, and that wraps, against one of 128 bits that does not.

use proptest::prelude::*;

use vlapic::Deadline;

use super::*;

/// A CPU's TSC, with the wraps since the last write counted in bits 64 and up, and its deadline on it.
#[derive(Default)]
struct Model {
    tsc: u128,
    deadline: u64,
    due: u128,
    interrupts: usize,
}

impl Model {
    fn look(&mut self) {
        if self.deadline != 0 && self.tsc >= self.due {
            (self.deadline, self.interrupts) = (0, self.interrupts + 1);
        }
    }

    /// The value that RDTSC returns.
    fn low(&self) -> u64 {
        u64::try_from(self.tsc % (1 << 64)).unwrap()
    }

    /// The TSC, or the deadline, is another: how far apart they are now is how long it takes.
    fn compare(&mut self) {
        self.due = self.tsc + u128::from(self.deadline.saturating_sub(self.low()));
    }
}

#[derive(Clone, Debug)]
enum Op {
    /// WRMSR IA32_TSC.
    Tsc(u64),
    /// WRMSR IA32_TSC_ADJUST.
    Adjust(u64),
    /// WRMSR IA32_TSC_DEADLINE.
    Deadline(u64),
    /// The same, so far from the TSC.
    From(i64),
    /// A save, and a restore at once.
    Restore,
    Look,
}

fn near_the_wrap() -> impl Strategy<Value = u64> {
    prop_oneof![
        3 => (0..5000u64).prop_map(u64::wrapping_neg),
        1 => 0..5000u64,
        1 => any::<u64>(),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        2 => near_the_wrap().prop_map(Op::Tsc),
        1 => near_the_wrap().prop_map(Op::Adjust),
        2 => near_the_wrap().prop_map(Op::Deadline),
        2 => (-2000..5000i64).prop_map(Op::From),
        1 => Just(Op::Restore),
        2 => Just(Op::Look),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2000) })]

    /// However late the APIC is evaluated, before or after the wrap: every deadline interrupts once, none early.
    #[test]
    fn no_deadline_is_lost_over_the_wrap(
        start in 0..1u64 << 40,
        steps in proptest::collection::vec((prop_oneof![8 => 0..4000u64, 1 => 0..1u64 << 50], op()), 1..60),
    ) {
        let [_, mut bench] = Bench::timers(DEADLINE);
        let mut model = Model { tsc: u128::from(start), ..Model::default() };
        let (mut base, mut ahead) = (start, 0u64);
        for (ticks, op) in steps {
            base += ticks;
            model.tsc += u128::from(ticks);
            let now = Now::new(GuestTsc(base), VmTime(0)).ahead(TscAdjust(ahead));
            prop_assert_eq!(model.low(), now.tsc.0);
            model.look();
            match op {
                Op::Tsc(_) | Op::Adjust(_) => {
                    ahead = match op {
                        Op::Tsc(tsc) => tsc.wrapping_sub(base),
                        Op::Adjust(adjust) => adjust,
                        _ => ahead,
                    };
                    model.tsc = u128::from(base.wrapping_add(ahead));
                    model.compare();
                    bench.apic.move_tsc(now, now.ahead(TscAdjust(ahead)));
                }
                Op::Deadline(_) | Op::From(_) => {
                    model.deadline = match op {
                        Op::Deadline(deadline) => deadline,
                        Op::From(ticks) => model.low().saturating_add_signed(ticks),
                        _ => 0,
                    };
                    model.compare();
                    bench.wrmsr(TSC_DEADLINE, model.deadline, now);
                }
                Op::Restore => {
                    bench.apic.advance(now);
                    let state = bench.apic.state(now);
                    let restored = LocalApic::from_state(&state, ALL, state.saved_at.now(TscAdjust(ahead))).unwrap();
                    prop_assert_eq!(&restored, &bench.apic);
                    bench.apic = restored;
                }
                Op::Look => {}
            }
            model.look();
            let now = now.ahead(TscAdjust(ahead));
            prop_assert_eq!(bench.interrupts(now), std::mem::take(&mut model.interrupts).min(1));
            prop_assert_eq!(bench.rdmsr(TSC_DEADLINE, now), model.deadline);
            let left = u64::try_from(model.due.saturating_sub(model.tsc)).unwrap();
            let due = (model.deadline != 0).then(|| base.checked_add(left)).flatten();
            prop_assert_eq!(bench.apic.next_deadline(), due.map(|due| Deadline::Tsc(GuestTsc(due))));
        }
    }
}

/// A late evaluation reads a TSC that has wrapped and is small.
#[test]
fn a_deadline_just_before_the_wrap_comes() {
    let ahead = 1000u64.wrapping_neg();
    let now = |base| Now::new(GuestTsc(base), VmTime(0)).ahead(TscAdjust(ahead));
    for mut bench in Bench::timers(DEADLINE) {
        bench.wrmsr(TSC_DEADLINE, 10u64.wrapping_neg(), now(0));
        assert_eq!(bench.apic.next_deadline(), Some(Deadline::Tsc(GuestTsc(990))));
        assert_eq!((bench.interrupts(now(989)), bench.interrupts(now(5000))), (0, 1));
        assert_eq!(bench.rdmsr(TSC_DEADLINE, now(5000)), 0);
    }
}

/// A deadline is a value of the TSC: it moves against a TSC that is moved.
#[test]
fn a_write_of_the_tsc_moves_what_is_armed() {
    for mut bench in Bench::timers(DEADLINE) {
        let now = Now::new(GuestTsc(1000), VmTime(0));
        bench.wrmsr(TSC_DEADLINE, 3000, now);
        bench.apic.move_tsc(now, now.ahead(TscAdjust(500)));
        assert_eq!(bench.apic.next_deadline(), Some(Deadline::Tsc(GuestTsc(2500))));
        bench.apic.move_tsc(now, now.ahead(TscAdjust(700u64.wrapping_neg())));
        assert_eq!(bench.apic.next_deadline(), Some(Deadline::Tsc(GuestTsc(3700))));
        bench.apic.move_tsc(now, now.ahead(TscAdjust(2000)));
        assert_eq!((bench.apic.pending(), bench.apic.next_deadline()), (Some(0xec), None), "at once");
        assert_eq!(bench.interrupts(now.ahead(TscAdjust(2000))), 1);
        // What was due before the move interrupts, although the TSC is then less.
        bench.wrmsr(TSC_DEADLINE, 900, Now::new(GuestTsc(800), VmTime(0)));
        bench.apic.move_tsc(now, now.ahead(TscAdjust(1000u64.wrapping_neg())));
        assert_eq!(bench.interrupts(now.ahead(TscAdjust(1000u64.wrapping_neg()))), 1);
    }
}

/// What lies behind the end of the base TSC never comes; it does not come at once either.
#[test]
fn a_deadline_behind_the_end_of_the_base_never_comes() {
    let now = Now::new(GuestTsc(u64::MAX - 100), VmTime(0)).ahead(TscAdjust(200));
    for mut bench in Bench::timers(DEADLINE) {
        assert_eq!(now.tsc, GuestTsc(99));
        bench.wrmsr(TSC_DEADLINE, 500, now);
        assert_eq!((bench.apic.next_deadline(), bench.rdmsr(TSC_DEADLINE, now)), (None, 500));
        assert_eq!(bench.interrupts(Now::new(GuestTsc(u64::MAX), VmTime(0)).ahead(TscAdjust(200))), 0);
    }
}
