//! Random operations of a guest, a device or another CPU. Meaningful ones are more frequent than others.

use vlapic::{Config, LocalSource};
use vmtime::{GuestTsc, Now, VmTime};

use crate::{APIC_BASE, NS_DEADLINE, TSC_DEADLINE};

/// SplitMix64: a few lines, and the same everywhere.
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    pub(super) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn word(&mut self, bound: u64) -> u32 {
        u32::try_from(self.below(bound)).unwrap()
    }

    fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[0]
    }

    pub(super) fn one_in(&mut self, chances: u64) -> bool {
        self.below(chances) == 0
    }

    pub(super) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[usize::try_from(self.below(from.len() as u64)).unwrap()]
    }

    /// Numbers at the edges of something.
    fn value(&mut self) -> u64 {
        match self.below(6) {
            0 => self.next(),
            1 => (1u64 << self.below(64)).wrapping_sub(self.below(3)),
            2 => 0,
            _ => self.next() >> 32,
        }
    }

    pub(super) fn configs(&mut self) -> [Config; 3] {
        let ids = self.pick(&[[0, 1, 2], [0, 1, 0x12], [0x105, 5, 0x20], [0xff, 0xfe, 0x1_0000], [3, 3, 4]]);
        let [x2apic, tsc_deadline, ns_deadline] = [(); 3].map(|()| !self.one_in(5));
        ids.map(|id| Config { id, bsp: id == 0, x2apic, tsc_deadline, ns_deadline, physical_bits: 52 })
    }
}

/// What one CPU does, or what happens to it.
#[derive(Clone, Debug)]
pub(super) enum Op {
    PageRead {
        offset: u64,
        len: usize,
    },
    PageWrite {
        offset: u64,
        data: Vec<u8>,
    },
    Rdmsr(u32),
    Wrmsr(u32, u64),
    SetCr8(u8),
    Acknowledge,
    AcknowledgeAny(u8),
    /// A device's message: vector, level.
    Device(u8, bool),
    Local(LocalSource, bool),
    Init,
    Reset,
    /// A write of the TSC or of TSC_ADJUST: how far the TSC is then ahead of the base.
    MoveTsc(u64),
    SaveAndRestore,
    Advance,
}

/// Time for the next operation: mostly a little later, sometimes anywhere.
pub(super) fn step(random: &mut Random, now: Now) -> Now {
    let (tsc, vm) = match random.below(400) {
        0 => (random.value(), random.value()),
        1 => (random.below(1 << 20), random.below(1 << 20)),
        2..20 => (now.tsc.0.saturating_sub(random.below(3000)), now.vm.0.saturating_sub(random.below(1000))),
        20..120 => (now.tsc.0, now.vm.0),
        _ => {
            let reach = random.pick(&[10, 10, 300, 300, 3000, 3000, 120_000]);
            (now.tsc.0.saturating_add(random.below(3 * reach)), now.vm.0.saturating_add(random.below(reach)))
        }
    };
    Now::new(GuestTsc(tsc), VmTime(vm))
}

fn register(random: &mut Random, ids: &[u32]) -> (u32, u64) {
    let number = random.pick(&[
        2, 8, 8, 0xb, 0xb, 0xb, 0xd, 0xe, 0xf, 0x28, 0x28, 0x30, 0x30, 0x30, 0x30, 0x30, 0x31, 0x31, 0x32, 0x32, 0x33,
        0x34, 0x35, 0x35, 0x36, 0x37, 0x38, 0x38, 0x3e, 0x3f,
    ]);
    let id = random.pick(ids);
    let vector = if random.one_in(12) { random.below(16) } else { random.below(0x100) };
    let value = match number {
        _ if random.one_in(10) => random.value(),
        2 | 0x31 => u64::from(random.pick(&[id, id + 1, 0xff, 1, 0x21])) << 24,
        8 => random.below(0x100) >> random.pick(&[0, 2]),
        0xb | 0x28 => 0,
        0xd => random.pick(&[0x01, 0x02, 0x03, 0x11, 0x12, 0x21, 0xff]) << 24,
        0xe => random.pick(&[0xffff_ffff, 0x0fff_ffff, 0x7fff_ffff]),
        0xf => vector | random.pick(&[0x100, 0x100, 0x300, 0x100, 0x100, 0]),
        0x30 => {
            let bits = random.pick(&[0, 0, 0, 0x4000, 0x8000, 0xc000, 0x800, 0x800, 0x1_0000 * 4, 0x8_0000, 0xc_0000]);
            let to = random.pick(&[id, id >> 4 << 16 | 1 << (id & 15), id >> 4 << 16 | 0xffff, 0xff, u32::MAX, 7]);
            u64::from(to) << 32 | bits | random.pick(&[0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7]) << 8 | vector
        }
        0x32 => vector | random.below(8) << 16,
        0x33..=0x37 => {
            let fields = random.pick(&[0, 0, 0x8000, 0x8000, 0xa000, 0x400, 0x500, 0x700, 0x200, 0x300, 0x2000]);
            vector | fields | random.pick(&[0, 0, 0, 0x1_0000])
        }
        0x38 => random.below(random_reach(vector)),
        0x3e => random.pick(&[0, 1, 2, 3, 8, 9, 10, 11]),
        _ => vector,
    };
    (number, value)
}

/// Mostly short counts, so that they end within the test.
fn random_reach(salt: u64) -> u64 {
    [50, 500, 5000, 1 << 32][usize::try_from(salt % 4).unwrap()]
}

/// An operation for a CPU whose MSR door is open or not.
pub(super) fn op(random: &mut Random, x2apic: bool, disabled: bool, ids: &[u32], now: Now) -> Op {
    if disabled && random.one_in(4) {
        return Op::Wrmsr(APIC_BASE, 0xfee0_0800);
    }
    match random.below(100) {
        0..34 => {
            let (number, value) = register(random, ids);
            let wrong_door = random.one_in(50);
            if x2apic != wrong_door {
                return Op::Wrmsr(0x800 + number, value);
            }
            let data = value.to_le_bytes()[..4].to_vec();
            Op::PageWrite { offset: u64::from(number) * 16, data }
        }
        34..38 if x2apic => Op::Rdmsr(0x800 + random.word(0x41)),
        34..38 => Op::PageRead { offset: random.below(0x42) * 16, len: 4 },
        38 => Op::PageRead { offset: random.value(), len: usize::from(random.byte() % 9) },
        39 => Op::PageWrite { offset: random.below(0x1010), data: vec![random.byte(); usize::from(random.byte() % 9)] },
        40 => Op::Rdmsr(random.pick(&[APIC_BASE, TSC_DEADLINE, NS_DEADLINE, 0x8ff, 0x900, 0])),
        41 => Op::Wrmsr(random.pick(&[0x800, 0x802, 0x80e, 0x82f, 0x840, 0x10]), random.value()),
        42..48 => {
            let value = now.tsc.0.saturating_add(random.below(5000)).saturating_sub(500);
            Op::Wrmsr(TSC_DEADLINE, if random.one_in(8) { random.value() } else { value })
        }
        48..52 => {
            let value = now.vm.0.saturating_add(random.below(2000)).saturating_sub(200);
            Op::Wrmsr(NS_DEADLINE, if random.one_in(8) { random.value() } else { value })
        }
        52..55 => Op::SetCr8(if random.one_in(2) { 0 } else { random.byte() }),
        55..70 => Op::Acknowledge,
        70 => Op::AcknowledgeAny(random.byte()),
        71..75 => Op::Device(random.byte(), random.one_in(2)),
        75..85 => {
            let sources = [
                LocalSource::Lint0,
                LocalSource::Lint0,
                LocalSource::Lint1,
                LocalSource::Thermal,
                LocalSource::Performance,
                LocalSource::Error,
            ];
            Op::Local(random.pick(&sources), !random.one_in(3))
        }
        85 => match random.below(8) {
            0 => Op::Reset,
            1 => Op::Init,
            2 => Op::Wrmsr(APIC_BASE, random.value()),
            _ => {
                let bases = [0xfee0_0c00, 0xfee0_0c00, 0xfee0_0800, 0x1_2345_6900, 0x1_2345_6d00, 0xfee0_0000, 0x400];
                Op::Wrmsr(APIC_BASE, random.pick(&bases))
            }
        },
        86 => match random.below(4) {
            0 => Op::SaveAndRestore,
            1 => Op::MoveTsc(random.value()),
            2 => Op::MoveTsc(0),
            // The TSC is about to wrap.
            _ => Op::MoveTsc(now.base.0.wrapping_add(random.below(9000)).wrapping_neg()),
        },
        // What is not enabled does little: bring it back.
        87..90 if x2apic => Op::Wrmsr(0x80f, 0x1ff),
        87..90 => Op::PageWrite { offset: 0xf0, data: vec![0xff, 1, 0, 0] },
        _ => Op::Advance,
    }
}
