//! Tests of the whole APIC through its doors.

mod base_rules;
mod count_rules;
mod deadline_rules;
mod doors;
mod inbox;
mod interrupts;
mod local;
mod messages;
mod model;
mod random;
mod reference;
mod saved;
mod wrap;

use vlapic::{Config, Effects, Interrupt, LocalApic};
use vmtime::{GuestTsc, Now, TscAdjust, VmTime};

const ALL: Config = Config { id: 0, bsp: true, x2apic: true, tsc_deadline: true, ns_deadline: true, physical_bits: 52 };

/// Offsets in the xAPIC page, and MSRs below: from the manual once more, so that a wrong number in `guest_abi` is
/// found.
const ID: u64 = 0x20;
const VERSION: u64 = 0x30;
const TPR: u64 = 0x80;
const PPR: u64 = 0xa0;
const EOI: u64 = 0xb0;
const LDR: u64 = 0xd0;
const DFR: u64 = 0xe0;
const SVR: u64 = 0xf0;
const ISR: u64 = 0x100;
const TMR: u64 = 0x180;
const IRR: u64 = 0x200;
const ESR: u64 = 0x280;
const ICR: u64 = 0x300;
const ICR_HIGH: u64 = 0x310;
const LVTT: u64 = 0x320;
const LVT_THERMAL: u64 = 0x330;
const LVT_PERFORMANCE: u64 = 0x340;
const LVT_LINT0: u64 = 0x350;
const LVT_LINT1: u64 = 0x360;
const LVT_ERROR: u64 = 0x370;
const TMICT: u64 = 0x380;
const TMCCT: u64 = 0x390;
const TDCR: u64 = 0x3e0;

const TSC_DEADLINE: u32 = 0x6e0;
const NS_DEADLINE: u32 = guest_abi::ns_deadline::MSR;
const APIC_BASE: u32 = 0x1b;
const SELF_IPI: u32 = 0x83f;

const MASKED: u32 = 1 << 16;
const ONE_SHOT: u32 = 0;
const PERIODIC: u32 = 1 << 17;
const DEADLINE: u32 = 1 << 18;
const VECTOR: u32 = 0xec;
/// TDCR for 1 ns, 2 ns, 4 ns, 8 ns and 128 ns a tick.
const BY_1: u32 = 0b1011;
const BY_2: u32 = 0b0000;
const BY_4: u32 = 0b0001;
const BY_8: u32 = 0b0010;
const BY_128: u32 = 0b1010;

/// An instant: the TSC runs three times as fast as VM time, so that the clocks cannot be confused.
fn at(ns: u64) -> Now {
    Now::new(GuestTsc(ns.saturating_mul(3)), VmTime(ns))
}

/// The MSR of the register at an offset in the page.
fn msr(offset: u64) -> u32 {
    0x800 + u32::try_from(offset / 16).unwrap()
}

/// An APIC that remembers which door it is used through.
#[derive(Clone, Debug)]
struct Bench {
    apic: LocalApic,
    x2apic: bool,
}

impl Bench {
    /// After reset, xAPIC mode.
    fn reset(config: Config) -> Self {
        Self { apic: LocalApic::new(config), x2apic: false }
    }

    /// Software enabled, xAPIC mode.
    fn xapic() -> Self {
        let mut bench = Self::reset(ALL);
        bench.write(SVR, 0x1ff, at(0));
        bench
    }

    /// Software enabled, x2APIC mode.
    fn x2apic() -> Self {
        let mut bench = Self::reset(ALL);
        bench.enter_x2apic();
        bench.write(SVR, 0x1ff, at(0));
        bench
    }

    fn enter_x2apic(&mut self) {
        self.apic.msr_write(APIC_BASE, 0xfee0_0c00, at(0)).unwrap();
        self.x2apic = true;
    }

    /// With the timer in a mode, unmasked unless `lvtt` says so, and one tick a nanosecond; through both doors.
    fn timers(lvtt: u32) -> [Self; 2] {
        [Self::xapic(), Self::x2apic()].map(|mut bench| {
            bench.write(TDCR, BY_1, at(0));
            bench.write(LVTT, lvtt | VECTOR, at(0));
            bench
        })
    }

    fn write(&mut self, offset: u64, value: u32, now: Now) -> Effects {
        if self.x2apic {
            self.apic.msr_write(msr(offset), u64::from(value), now).unwrap()
        } else {
            self.apic.mmio_write(offset, &value.to_le_bytes(), now)
        }
    }

    fn read(&mut self, offset: u64, now: Now) -> u32 {
        if self.x2apic {
            u32::try_from(self.apic.msr_read(msr(offset), now).unwrap()).unwrap()
        } else {
            let mut bytes = [0xa5; 4];
            self.apic.mmio_read(offset, &mut bytes, now);
            u32::from_le_bytes(bytes)
        }
    }

    fn wrmsr(&mut self, index: u32, value: u64, now: Now) {
        self.apic.msr_write(index, value, now).unwrap();
    }

    fn rdmsr(&mut self, index: u32, now: Now) -> u64 {
        self.apic.msr_read(index, now).unwrap()
    }

    fn fixed(&mut self, vector: u8) {
        self.apic.accept(Interrupt { vector, level: false });
    }

    /// Takes the timer to `now`, then injects, handles and ends everything that is pending; says how many those were.
    fn interrupts(&mut self, now: Now) -> usize {
        self.apic.advance(now);
        let mut count = 0;
        while let Some(vector) = self.apic.pending() {
            self.apic.acknowledge(vector);
            self.write(EOI, 0, now);
            count += 1;
        }
        count
    }

    /// ESR, by the write that makes it show what was logged, and the read.
    fn esr(&mut self) -> u32 {
        self.write(ESR, 0, at(0));
        self.read(ESR, at(0))
    }
}
