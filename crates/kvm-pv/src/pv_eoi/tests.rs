//! The word against a model that knows what is in service: the guest, which ended what it ended, however it did.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
};

use guest_abi::{
    lapic::{self, x2apic_msr},
    msr::{IA32_APIC_BASE, IA32_TSC_DEADLINE},
};
use proptest::prelude::*;
use vlapic::{Config, Interrupt, LocalApic};
use vmtime::Now;

use super::*;

const RAM: usize = 64;
const WORDS: [u64; 2] = [8, 60];
/// What else the guest keeps in the word.
const OTHERS: u32 = 0xdead_beee;

struct Ram(RefCell<[u8; RAM]>);

impl Ram {
    fn new() -> Self {
        let ram = Self(RefCell::new([0; RAM]));
        for word in WORDS {
            ram.write(word, &OTHERS.to_le_bytes()).unwrap();
        }
        ram
    }

    fn range(addr: u64, bytes: usize) -> Result<std::ops::Range<usize>, OutsideRam> {
        let start = usize::try_from(addr).unwrap();
        let end = start.checked_add(bytes).filter(|end| *end <= RAM).ok_or(OutsideRam { addr, bytes })?;
        Ok(start..end)
    }

    fn word(&self, addr: u64) -> u32 {
        word(addr, self).unwrap()
    }
}

impl GuestWrite for Ram {
    fn write(&self, addr: u64, bytes: &[u8]) -> Result<(), OutsideRam> {
        self.0.borrow_mut()[Self::range(addr, bytes.len())?].copy_from_slice(bytes);
        Ok(())
    }

    fn read(&self, addr: u64, bytes: &mut [u8]) -> Result<(), OutsideRam> {
        bytes.copy_from_slice(&self.0.borrow()[Self::range(addr, bytes.len())?]);
        Ok(())
    }
}

const CONFIG: Config =
    Config { id: 0, bsp: true, x2apic: true, tsc_deadline: true, ns_deadline: true, physical_bits: 52 };
const NOW: Now = Now::new(vmtime::GuestTsc(0), vmtime::VmTime(0));
const MSR_SVR: u32 = x2apic_msr(lapic::SVR);
const MSR_EOI: u32 = x2apic_msr(lapic::EOI);
const MSR_LVTT: u32 = x2apic_msr(lapic::LVTT);

fn apic() -> LocalApic {
    let mut apic = LocalApic::new(CONFIG);
    apic.msr_write(IA32_APIC_BASE, apic.apic_base() | 1 << 10, NOW).unwrap();
    apic.msr_write(MSR_SVR, 0x1ff, NOW).unwrap();
    apic
}

fn set_of(words: [u32; 8]) -> BTreeSet<u8> {
    (0..=u8::MAX).filter(|vector| words[usize::from(vector / 32)] & 1 << (vector % 32) != 0).collect()
}

/// A vCPU as `run` drives it, and what is true of it.
struct Bench {
    ram: Ram,
    apic: LocalApic,
    pv_eoi: PvEoi,
    /// Requested, and whether level-triggered.
    requested: BTreeMap<u8, bool>,
    /// In service, for the guest.
    serving: BTreeMap<u8, bool>,
}

impl Bench {
    fn new() -> Self {
        let (requested, serving) = (BTreeMap::new(), BTreeMap::new());
        Self { ram: Ram::new(), apic: apic(), pv_eoi: PvEoi::default(), requested, serving }
    }

    fn register(&mut self, value: u64) {
        self.pv_eoi.write_msr(value, &self.ram).unwrap();
    }

    fn bit(&self) -> bool {
        self.pv_eoi.address().is_some_and(|address| self.ram.word(address) & PENDING != 0)
    }

    fn look(&mut self) {
        if let Some(vector) = self.pv_eoi.take_ended(&self.ram) {
            self.apic.end_silently(vector);
        }
    }

    /// The vCPU came out: from here on the LAPIC is right.
    fn come_out(&mut self) {
        self.look();
        let state = self.apic.state(NOW);
        assert_eq!(set_of(state.isr), self.serving.keys().copied().collect(), "in service");
        assert_eq!(set_of(state.irr), self.requested.keys().copied().collect(), "requested");
    }

    fn request(&mut self, vector: u8, level: bool) {
        self.apic.accept(Interrupt { vector, level });
        self.requested.insert(vector, level);
    }

    /// Injects what may enter, and enters.
    fn enter(&mut self) {
        let due = self.requested.last_key_value().map(|(vector, _)| *vector);
        let due =
            due.filter(|vector| self.serving.last_key_value().is_none_or(|(serving, _)| vector >> 4 > serving >> 4));
        assert_eq!(self.apic.pending(), due, "priority");
        if let Some(vector) = due {
            self.apic.acknowledge(vector);
            self.pv_eoi.lend(self.apic.silent_end(), &self.ram);
            let level = self.requested.remove(&vector).unwrap();
            self.serving.insert(vector, level);
        }
        self.pv_eoi.withdraw_unless(self.apic.silent_end(), &self.ram);
        let silent = self.serving.len() == 1 && self.requested.is_empty() && !self.serving.values().any(|level| *level);
        assert!(silent || !self.bit(), "something waits for the EOI: {:?}, {:?}", self.serving, self.requested);
    }

    /// The guest ends what it serves; gives whether that came out.
    fn end(&mut self, by_word: bool) -> bool {
        let Some((_, _)) = self.serving.pop_last() else { return false };
        if by_word && self.bit() {
            let address = self.pv_eoi.address().unwrap();
            self.ram.write(address, &(self.ram.word(address) & !PENDING).to_le_bytes()).unwrap();
            return false;
        }
        // What came out before the write is looked at first: the guest has not ended it yet.
        self.look();
        self.apic.msr_write(MSR_EOI, 0, NOW).unwrap();
        self.come_out();
        true
    }

    fn save_and_restore(&mut self) {
        self.pv_eoi = PvEoi::from_state(self.pv_eoi.state(), &self.ram).unwrap();
        self.apic = LocalApic::from_state(&self.apic.state(NOW), CONFIG, NOW).unwrap();
    }
}

#[derive(Clone, Debug)]
enum Op {
    Request { vector: u8, level: bool },
    Exit,
    End { by_word: bool },
    Register(u64),
    Save,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (0_u8..16, 0_u8..10).prop_map(|(n, level)| Op::Request { vector: 0x20 + n * 11, level: level == 0 }),
        3 => Just(Op::Exit),
        6 => (0..8).prop_map(|n| Op::End { by_word: n != 0 }),
        1 => prop_oneof![Just(0), Just(WORDS[0] | ENABLE), Just(WORDS[1] | ENABLE)].prop_map(Op::Register),
        1 => Just(Op::Save),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    // Catches: an EOI that is lost or counted twice, one without an exit while something waits for it, and an
    // interrupt that enters out of its turn.
    #[test]
    fn every_end_is_heard_once(ops in prop::collection::vec(op(), 1..200)) {
        let mut bench = Bench::new();
        bench.register(WORDS[0] | ENABLE);
        bench.enter();
        for op in ops {
            // Each runs in the guest and comes out at once, or after more of them.
            match op {
                Op::End { by_word } => {
                    if bench.end(by_word) {
                        bench.enter();
                    }
                    continue;
                }
                Op::Request { vector, level } => {
                    bench.come_out();
                    bench.request(vector, level);
                }
                Op::Exit => bench.come_out(),
                Op::Register(value) => {
                    bench.come_out();
                    bench.register(value);
                }
                Op::Save => {
                    bench.come_out();
                    bench.save_and_restore();
                }
            }
            bench.enter();
        }
        // What is left ends, and enters in order of priority, without a kick.
        bench.come_out();
        bench.enter();
        while !bench.serving.is_empty() {
            let waits = !bench.requested.is_empty();
            let out = bench.end(true);
            prop_assert!(out || !waits, "the guest ended what others waited for, and was not heard");
            if out {
                bench.enter();
            }
        }
        prop_assert!(bench.requested.is_empty());
        bench.come_out();
        for word in WORDS {
            prop_assert_eq!(bench.ram.word(word) & !PENDING, OTHERS & !PENDING);
        }
    }
}

#[test]
fn a_lone_interrupt_ends_without_coming_out() {
    let mut bench = Bench::new();
    bench.register(WORDS[1] | ENABLE);
    bench.request(0x40, false);
    bench.enter();
    assert!(bench.bit() && !bench.end(true));
    bench.come_out();
    assert!(!bench.bit());
}

/// What is not told of in the word is written, as without it.
#[test]
fn without_a_word_every_end_comes_out() {
    let mut bench = Bench::new();
    bench.register(WORDS[0]);
    bench.request(0x40, false);
    bench.enter();
    assert!(!bench.bit() && bench.end(true));
    assert_eq!(bench.ram.word(WORDS[0]), OTHERS);
}

#[test]
fn a_word_that_is_given_up_is_given_back_clear() {
    let mut bench = Bench::new();
    bench.register(WORDS[0] | ENABLE);
    bench.request(0x40, false);
    bench.enter();
    assert!(bench.bit());
    bench.register(0);
    assert_eq!(bench.ram.word(WORDS[0]), OTHERS);
    assert!(bench.end(true));
}

/// INIT finds a CPU whose memory others may have put to another use.
#[test]
fn after_a_reset_the_word_is_not_written() {
    let mut bench = Bench::new();
    bench.register(WORDS[0] | ENABLE);
    bench.request(0x40, false);
    bench.enter();
    bench.ram.write(WORDS[0], &u32::MAX.to_le_bytes()).unwrap();
    bench.pv_eoi.reset();
    bench.request(0x50, false);
    bench.enter();
    assert_eq!((bench.ram.word(WORDS[0]), bench.pv_eoi.read_msr()), (u32::MAX, 0));
}

#[test]
fn a_timer_behind_the_interrupt_in_service_is_waited_for() {
    let mut bench = Bench::new();
    bench.register(WORDS[0] | ENABLE);
    bench.apic.msr_write(MSR_LVTT, 0x4_0040, NOW).unwrap();
    bench.request(0x40, false);
    bench.enter();
    bench.apic.msr_write(IA32_TSC_DEADLINE, 1_000, NOW).unwrap();
    assert_eq!(bench.apic.next_wake(), None, "not before the EOI");
    assert!(bench.pv_eoi.is_lent() && bench.apic.next_wake_after_end().is_some(), "the EOI may not exit");
    let mut plain = Bench::new();
    plain.apic.msr_write(MSR_LVTT, 0x4_0040, NOW).unwrap();
    plain.request(0x40, false);
    plain.enter();
    plain.apic.msr_write(IA32_TSC_DEADLINE, 1_000, NOW).unwrap();
    assert!(!plain.pv_eoi.is_lent());
}

#[test]
fn values_that_are_no_word_fault_and_change_nothing() {
    let mut bench = Bench::new();
    bench.register(WORDS[0] | ENABLE);
    for (value, fault) in [
        (WORDS[0] | 2, PvEoiFault::Misaligned(WORDS[0] | 2)),
        (WORDS[0] | 3, PvEoiFault::Misaligned(WORDS[0] | 2)),
        (64 | ENABLE, PvEoiFault::OutsideRam(OutsideRam { addr: 64, bytes: 4 })),
        (!3 | ENABLE, PvEoiFault::OutsideRam(OutsideRam { addr: !3, bytes: 4 })),
    ] {
        assert_eq!(bench.pv_eoi.write_msr(value, &bench.ram), Err(fault));
        assert_eq!(bench.pv_eoi.read_msr(), WORDS[0] | ENABLE);
    }
    assert_eq!(bench.pv_eoi.address(), Some(WORDS[0]));
    // Disabled, any aligned value is one.
    bench.register(!3);
    assert_eq!(bench.pv_eoi.address(), None);
}

#[test]
fn a_snapshot_cannot_lend_without_a_word() {
    let ram = Ram::new();
    for (msr, lent, fault) in [
        (0, Some(0x40), PvEoiFault::NoWord(0x40)),
        (2, None, PvEoiFault::Misaligned(2)),
        (0x1000 | ENABLE, None, PvEoiFault::OutsideRam(OutsideRam { addr: 0x1000, bytes: 4 })),
    ] {
        assert_eq!(PvEoi::from_state(PvEoiState { msr, lent }, &ram), Err(fault));
    }
}
