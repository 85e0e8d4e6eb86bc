//! The timer against models that share no arithmetic with it.

use proptest::prelude::*;

use super::*;

const DIVIDES: [(u32, u32); 8] = [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1)];

/// The hardware, clocked: a prescaler, a counter, and a comparator on each clock, one nanosecond at a time.
#[derive(Default)]
struct Hardware {
    lvtt: u32,
    tick_ns: u32,
    /// Nanoseconds until the counter drops.
    prescaler: u32,
    counter: u32,
    initial: u32,
    /// Nanoseconds until a count begins to drop: those that its period is too short by.
    hold: u32,
    tsc_deadline: u64,
    ns_deadline: u64,
    ns: u64,
    interrupted: bool,
}

impl Hardware {
    fn deadline_mode(&self) -> bool {
        self.lvtt & DEADLINE != 0
    }

    fn expired(&mut self) {
        self.interrupted |= self.lvtt & MASKED == 0;
    }

    fn pass(&mut self, mut ns: u64) {
        while ns > 0 {
            // Nothing happens while a count is held.
            let held = u64::from(self.hold).min(ns);
            self.hold -= u32::try_from(held).unwrap();
            self.ns += held;
            ns -= held;
            if ns > 0 {
                self.nanosecond();
                ns -= 1;
            }
        }
    }

    /// The counter takes the initial count.
    fn load(&mut self) {
        (self.counter, self.prescaler) = (self.initial, self.tick_ns);
        let ns = self.initial * self.tick_ns;
        self.hold = if self.lvtt & PERIODIC != 0 && ns > 0 { 200_000u32.saturating_sub(ns) } else { 0 };
    }

    fn nanosecond(&mut self) {
        self.ns += 1;
        if self.counter > 0 {
            self.prescaler -= 1;
            if self.prescaler == 0 {
                self.prescaler = self.tick_ns;
                self.counter -= 1;
                if self.counter == 0 {
                    self.expired();
                    if self.lvtt & PERIODIC != 0 {
                        self.load();
                    }
                }
            }
        }
        self.compare();
    }

    fn compare(&mut self) {
        if self.tsc_deadline != 0 && self.ns * 3 >= self.tsc_deadline {
            self.tsc_deadline = 0;
            self.expired();
        }
        if self.ns_deadline != 0 && self.ns >= self.ns_deadline {
            self.ns_deadline = 0;
            self.expired();
        }
    }

    fn write_lvtt(&mut self, lvtt: u32) {
        if (self.lvtt ^ lvtt) & DEADLINE != 0 {
            (self.counter, self.hold, self.tsc_deadline, self.ns_deadline) = (0, 0, 0, 0);
        }
        self.lvtt = lvtt;
    }

    fn write_initial(&mut self, count: u32) {
        if !self.deadline_mode() {
            self.initial = count;
            self.load();
        }
    }

    /// The part of a tick that is left keeps its proportion.
    fn write_divide(&mut self, tick_ns: u32) {
        if self.counter > 0 {
            self.prescaler = (self.prescaler * tick_ns).div_ceil(self.tick_ns);
        }
        self.tick_ns = tick_ns;
    }

    fn write_deadline(&mut self, tsc: bool, value: u64) {
        if self.deadline_mode() {
            (self.tsc_deadline, self.ns_deadline) = if tsc { (value, 0) } else { (0, value) };
            self.compare();
        }
    }
}

#[derive(Clone, Debug)]
enum Op {
    Lvtt(u32),
    Initial(u32),
    Divide(u32, u32),
    /// A deadline, in nanoseconds from now; which MSR.
    Deadline(i64, bool),
    /// 0.
    Stop(bool),
    Nothing,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        (0..3u32, any::<bool>())
            .prop_map(|(mode, masked)| Op::Lvtt(mode << 17 | if masked { MASKED } else { 0 } | VECTOR)),
        prop_oneof![0..400u32, 0..20_000u32].prop_map(Op::Initial),
        proptest::sample::select(&DIVIDES[..]).prop_map(|(code, ns)| Op::Divide(code, ns)),
        (-50..2000i64, any::<bool>()).prop_map(|(after, tsc)| Op::Deadline(after, tsc)),
        any::<bool>().prop_map(Op::Stop),
        Just(Op::Nothing),
        Just(Op::Nothing),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(1500) })]

    /// A timer that is evaluated only now and then shows at each of those instants what clocked hardware shows.
    #[test]
    fn as_clocked_hardware(
        start in prop_oneof![Just(0u64), any::<u32>().prop_map(u64::from)],
        x2apic in any::<bool>(),
        steps in proptest::collection::vec((prop_oneof![4 => 0..2000u64, 1 => 0..450_000u64], op()), 1..40),
    ) {
        let mut bench = if x2apic { Bench::x2apic() } else { Bench::xapic() };
        let mut model = Hardware { lvtt: VECTOR, tick_ns: 2, ns: start, ..Hardware::default() };
        bench.write(LVTT, VECTOR, at(start));
        for (ns, op) in steps {
            model.pass(ns);
            let now = at(model.ns);
            match op {
                Op::Lvtt(lvtt) => { model.write_lvtt(lvtt); bench.write(LVTT, lvtt, now); }
                Op::Initial(count) => { model.write_initial(count); bench.write(TMICT, count, now); }
                Op::Divide(code, tick_ns) => { model.write_divide(tick_ns); bench.write(TDCR, code, now); }
                Op::Deadline(after, tsc) => {
                    let value = model.ns.saturating_add_signed(after) * if tsc { 3 } else { 1 };
                    model.write_deadline(tsc, value);
                    bench.wrmsr(if tsc { TSC_DEADLINE } else { NS_DEADLINE }, value, now);
                }
                Op::Stop(tsc) => {
                    model.write_deadline(tsc, 0);
                    bench.wrmsr(if tsc { TSC_DEADLINE } else { NS_DEADLINE }, 0, now);
                }
                Op::Nothing => {}
            }
            prop_assert_eq!(bench.read(TMCCT, now), model.counter);
            prop_assert_eq!(bench.read(TMICT, now), model.initial);
            prop_assert_eq!(bench.rdmsr(TSC_DEADLINE, now), model.tsc_deadline);
            prop_assert_eq!(bench.rdmsr(NS_DEADLINE, now), model.ns_deadline);
            let interrupted = std::mem::take(&mut model.interrupted);
            prop_assert_eq!(bench.interrupts(now), usize::from(interrupted));
        }
    }

    /// Counts of every size, at every time: the closed form in 128 bits.
    #[test]
    fn as_unbounded_arithmetic(
        start in prop_oneof![any::<u64>(), (0..1u64 << 41).prop_map(|before| u64::MAX - before)],
        count in prop_oneof![any::<u32>(), 1..1000u32, Just(u32::MAX)],
        (code, tick_ns) in proptest::sample::select(&DIVIDES[..]),
        periodic in any::<bool>(),
        mut afters in proptest::collection::vec(prop_oneof![any::<u64>(), 0..1u64 << 42, 0..100_000u64], 1..20),
    ) {
        let mut bench = Bench::xapic();
        let from = Now::new(GuestTsc(0), VmTime(start));
        bench.write(TDCR, code, from);
        bench.write(LVTT, VECTOR | if periodic { PERIODIC } else { ONE_SHOT }, from);
        bench.write(TMICT, count, from);
        let ticks = u128::from(count) * u128::from(tick_ns);
        let period = if periodic && ticks > 0 { ticks.max(200_000) } else { ticks };
        let end = u128::from(u64::MAX - start);
        afters.sort_unstable();
        let mut seen = 0;
        for after in afters {
            let after = u128::from(after).min(end);
            let now = Now::new(GuestTsc(0), VmTime(start + u64::try_from(after).unwrap()));
            let expiries = match period {
                0 => 0,
                _ if periodic => after / period,
                _ => (after / period).min(1),
            };
            // The count that now runs, unless it would end after the last instant that there is.
            let ends = (expiries + 1) * period;
            let running = period > 0 && (periodic || expiries == 0) && ends <= end;
            let left = if running { (ends - after).div_ceil(u128::from(tick_ns)).min(u128::from(count)) } else { 0 };
            prop_assert_eq!(u128::from(bench.read(TMCCT, now)), left);
            prop_assert_eq!(bench.interrupts(now), usize::from(expiries > seen));
            seen = expiries;
        }
    }
}
