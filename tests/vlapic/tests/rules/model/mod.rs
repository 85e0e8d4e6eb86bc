//! Three CPUs of ours against three of a second, naive model, under the same random operations at the same times.
//!
//! The naive model is written from the manual again, slowly and plainly: registers are numbers in a page, sets are
//! lists of booleans, times are 128-bit integers, and nothing is kept that can be recomputed. It shares no code with
//! ours but the types of results. After every operation everything that a guest or the run loop can see of the CPUs
//! concerned is compared; of all CPUs now and then.

mod clockwork;
mod naive;
mod naive_doors;
mod ops;
mod router;

use std::fmt::Write as _;

use self::{
    naive::Naive,
    naive_doors::{Outcome, readable},
    ops::{Op, Random},
};
use super::{APIC_BASE, NS_DEADLINE, Now, TSC_DEADLINE, TscAdjust};
use vlapic::{
    Config, Delivery, DeliveryMode, Destination, Effects, Ipi, LocalApic, Mode, State, Trigger, lowest_priority,
};

/// Operations before the CPUs are made anew, with another configuration.
const ROUND: usize = 2500;

struct Machine {
    ours: Vec<LocalApic>,
    naive: Vec<Naive>,
    /// What each CPU's TSC is ahead of the base.
    ahead: [u64; 3],
}

impl Machine {
    fn new(configs: [Config; 3]) -> Self {
        Self { ours: configs.map(LocalApic::new).to_vec(), naive: configs.map(Naive::new).to_vec(), ahead: [0; 3] }
    }

    /// The instant `base` for a CPU.
    fn now(&self, cpu: usize, base: Now) -> Now {
        base.ahead(TscAdjust(self.ahead[cpu]))
    }

    /// Does it to both; says which CPUs it can have changed.
    fn apply(&mut self, cpu: usize, op: &Op, now: Now) -> Vec<usize> {
        let (ours, naive) = (&mut self.ours[cpu], &mut self.naive[cpu]);
        match op {
            Op::PageRead { offset, len } => {
                let mut data = vec![0xa5; *len];
                ours.mmio_read(*offset, &mut data, now);
                assert_eq!(data, naive.page_read(*offset, *len, now));
            }
            Op::PageWrite { offset, data } => {
                return self.write(cpu, |ours, naive| {
                    (Ok(ours.mmio_write(*offset, data, now)), Ok(naive.page_write(*offset, data, now)))
                });
            }
            Op::Rdmsr(index) => assert_eq!(ours.msr_read(*index, now).ok(), naive.rdmsr(*index, now).ok()),
            Op::Wrmsr(index, value) => {
                return self.write(cpu, |ours, naive| {
                    (ours.msr_write(*index, *value, now).map_err(|_| ()), naive.wrmsr(*index, *value, now))
                });
            }
            Op::SetCr8(cr8) => {
                ours.set_cr8(*cr8);
                naive.page[8] = u32::from(cr8 & 0xf) << 4;
            }
            Op::Acknowledge => {
                if let Some(vector) = naive.pending() {
                    ours.acknowledge(vector);
                    naive.acknowledge(vector);
                }
            }
            Op::AcknowledgeAny(vector) => {
                ours.acknowledge(*vector);
                naive.acknowledge(*vector);
            }
            Op::Device(vector, level) => {
                let trigger = if *level { Trigger::Level } else { Trigger::Edge };
                let destination = Destination::Physical(naive.id());
                let ipi = Ipi { vector: *vector, mode: DeliveryMode::Fixed, destination, assert: true, trigger };
                let taken = naive.enabled().then(|| naive.request(u32::from(*vector), *level));
                assert_eq!(ours.deliver(&ipi), taken.unwrap_or(Delivery::None));
            }
            Op::Local(source, high) => assert_eq!(ours.local(*source, *high), naive.local(*source, *high)),
            Op::Init => {
                ours.init();
                naive.init();
            }
            Op::Reset => {
                ours.reset();
                naive.reset();
            }
            Op::MoveTsc(ahead) => {
                let after = now.ahead(TscAdjust(*ahead));
                ours.move_tsc(now, after);
                naive.advance(now);
                naive.timer.tsc_moved(after);
                naive.advance(after);
                self.ahead[cpu] = *ahead;
            }
            Op::SaveAndRestore => {
                // Before a save what was due is evaluated.
                ours.advance(now);
                naive.advance(now);
                let state = ours.state(now);
                let read: State = serde_json::from_str(&serde_json::to_string(&state).unwrap()).unwrap();
                let restored = LocalApic::from_state(&read, *ours.config(), now).unwrap();
                assert_eq!(restored.state(now), state);
                if self.ahead[cpu] == 0 {
                    assert_eq!(restored, *ours);
                }
                // Where the base TSC goes back, as here it may, a TSC that is ahead of it may go back over its wrap.
                naive.timer.tsc_moved(now);
                *ours = restored;
            }
            Op::Advance => {
                ours.advance(now);
                naive.advance(now);
            }
        }
        vec![cpu]
    }

    fn write(
        &mut self,
        cpu: usize,
        write: impl FnOnce(&mut LocalApic, &mut Naive) -> (Result<Effects, ()>, Result<Outcome, ()>),
    ) -> Vec<usize> {
        let naive = &mut self.naive[cpu];
        let (base, old) = (naive.base, naive.route());
        let (effects, outcome) = write(&mut self.ours[cpu], naive);
        assert_eq!(effects.is_err(), outcome.is_err(), "#GP");
        let (Ok(effects), Ok(outcome)) = (effects, outcome) else { return vec![cpu] };
        assert_eq!(effects.eoi, outcome.eoi);
        assert_eq!(effects.base_changed, base != naive.base);
        let mut route = naive.route();
        route.priority = old.priority;
        assert_eq!(effects.route_changed, old != route);

        let message = outcome.message.filter(router::Message::is_sent);
        assert_eq!(effects.ipi.is_some(), message.is_some_and(|message| !message.inside()));
        let expected = message.map_or(vec![], |message| message.deliver(&mut self.naive, cpu));
        if let Some(ipi) = effects.ipi {
            assert_eq!(self.send(&ipi, cpu), expected);
        }
        let mut concerned = vec![cpu];
        for (target, delivery) in expected {
            concerned.push(target);
            if delivery == Delivery::Init {
                self.ours[target].init();
                self.naive[target].init();
            }
        }
        concerned
    }

    /// Our bus, as a run loop has it: a table of routes, and then the chosen CPUs.
    fn send(&mut self, ipi: &Ipi, sender: usize) -> Vec<(usize, Delivery)> {
        let routes: Vec<_> = self.ours.iter().map(LocalApic::route).enumerate().collect();
        let mut targets: Vec<_> = routes
            .into_iter()
            .filter(|(cpu, route)| route.addressed_by(ipi.destination, *cpu == sender))
            .inspect(|(cpu, _)| assert!(self.ours[*cpu].addressed_by(ipi.destination, *cpu == sender)))
            .collect();
        if ipi.mode == DeliveryMode::LowestPriority {
            let chosen = lowest_priority(targets.iter().copied());
            targets.retain(|(cpu, _)| Some(*cpu) == chosen);
        }
        targets.into_iter().map(|(cpu, _)| (cpu, self.ours[cpu].deliver(ipi))).collect()
    }

    fn compare(&mut self, cpu: usize, now: Now) {
        let (ours, naive) = (&mut self.ours[cpu], &mut self.naive[cpu]);
        assert_eq!(ours.apic_base(), naive.base);
        let door = naive.mode();
        let address = (door == Mode::XApic).then_some(naive.base >> 12 << 12);
        assert_eq!(ours.mmio_base(), address);
        for number in 0..0x40 {
            match door {
                Mode::Disabled => {}
                Mode::X2Apic => {
                    let index = 0x800 + number;
                    assert_eq!(ours.msr_read(index, now).ok(), naive.rdmsr(index, now).ok(), "MSR {index:#x}");
                }
                Mode::XApic if readable(number, false) => {
                    let offset = u64::from(number) * 16;
                    let mut data = [0xa5; 4];
                    ours.mmio_read(offset, &mut data, now);
                    assert_eq!(&data[..], naive.page_read(offset, 4, now), "offset {offset:#x}");
                }
                Mode::XApic => {}
            }
        }
        for index in [APIC_BASE, TSC_DEADLINE, NS_DEADLINE] {
            assert_eq!(ours.msr_read(index, now).ok(), naive.rdmsr(index, now).ok(), "MSR {index:#x}");
        }
        assert_eq!(u32::from(ours.cr8()), naive.page[8] >> 4);
        assert_eq!(ours.pending(), naive.pending());
        assert_eq!(ours.blocked_by_priority(), naive.waiting().is_some() && naive.pending().is_none());
        assert_eq!(ours.blocked_by_tpr(), naive.blocked_by_tpr());
        assert_eq!(ours.next_deadline(), naive.timer.next());
        assert_eq!(ours.next_wake(), naive.next_wake());
        assert_eq!(ours.route(), naive.route());
        assert_eq!(ours.external_interrupt(), naive.external_interrupt());
    }
}

/// One round; on a difference, how to have it again, and what led to it.
fn round(seed: u64) {
    let mut random = Random(seed);
    let configs = random.configs();
    let mut machine = Machine::new(configs);
    let ids = configs.map(|config| config.id);
    let mut now = Now::default();
    let mut log: Vec<(usize, Op, Now)> = Vec::with_capacity(ROUND);
    let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        for count in 0..ROUND {
            now = ops::step(&mut random, now);
            let cpu = usize::try_from(random.below(3)).unwrap();
            let mode = machine.naive[cpu].mode();
            let own = machine.now(cpu, now);
            let op = ops::op(&mut random, mode == Mode::X2Apic, mode == Mode::Disabled, &ids, own);
            log.push((cpu, op.clone(), own));
            for cpu in machine.apply(cpu, &op, own) {
                machine.compare(cpu, machine.now(cpu, now));
            }
            if count % 16 == 15 {
                (0..3).for_each(|cpu| machine.compare(cpu, machine.now(cpu, now)));
            }
        }
    }));
    if let Err(difference) = done {
        let mut text = String::new();
        for (cpu, op, now) in log.iter().skip(log.len().saturating_sub(60)) {
            writeln!(text, "  tsc {} vm {} cpu {cpu}: {op:x?}", now.tsc.0, now.vm.0).unwrap();
        }
        eprintln!("round({seed:#x}), {configs:?}, operation {}; the last ones:\n{text}", log.len());
        std::panic::resume_unwind(difference);
    }
}

/// A quarter of a million operations.
fn rounds(seed: u64) {
    let mut seeds = Random(seed);
    for _ in 0..250_000 / ROUND {
        round(seeds.next());
    }
}

// Four tests of 250,000 operations each, so that they run side by side.

#[test]
fn as_the_naive_model_1() {
    rounds(1);
}

#[test]
fn as_the_naive_model_2() {
    rounds(2);
}

#[test]
fn as_the_naive_model_3() {
    rounds(3);
}

#[test]
fn as_the_naive_model_4() {
    rounds(4);
}
