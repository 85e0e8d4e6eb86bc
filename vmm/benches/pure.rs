//! The code of a tick that knows no KVM: `cargo bench -p vmm`. What a tick costs as a whole, `scripts/bench` measures.

use std::{cell::RefCell, hint::black_box};

use criterion::Criterion;
use guest_abi::{
    lapic::{self, x2apic_msr},
    msr::{IA32_APIC_BASE, IA32_TSC_DEADLINE},
};
use kvm_pv::{GuestWrite, OutsideRam, Registration};
use vlapic::{Config, LocalApic};
use vmtime::{
    AdjustError, Adjusted, DeadlinePolicy, DowntimePolicy, GuestTsc, Khz, Moment, Now, PageClock, Scale, Stood, VmTime,
    adjust,
};

const SVR: u32 = x2apic_msr(lapic::SVR);
const EOI: u32 = x2apic_msr(lapic::EOI);
const LVTT: u32 = x2apic_msr(lapic::LVTT);
const VECTOR: u8 = 32;

/// An x2APIC whose timer is in deadline mode.
fn apic() -> LocalApic {
    let config = Config { id: 0, bsp: true, x2apic: true, tsc_deadline: true, ns_deadline: true, physical_bits: 52 };
    let mut apic = LocalApic::new(config);
    let base = 0xfee0_0000 | 1 << 11 | 1 << 10 | 1 << 8;
    for (msr, value) in [(IA32_APIC_BASE, base), (SVR, 0x1ff), (LVTT, 1 << 18 | u64::from(VECTOR))] {
        assert!(apic.msr_write(msr, value, Now::default()).is_ok(), "MSR {msr:#x}");
    }
    apic
}

fn khz(khz: u64) -> Khz {
    Khz::new(khz).unwrap_or(Khz::MIN)
}

fn page() -> PageClock {
    PageClock { tsc_timestamp: GuestTsc(1 << 40), system_time: VmTime(1 << 30), scale: Scale::from_khz(khz(2_596_156)) }
}

/// A save, a second after the page's base.
fn moment() -> Moment {
    Moment::new(page(), GuestTsc((1 << 40) + 2_596_156_000), khz(2_596_156), 0)
}

fn restored(saved: &Moment) -> Result<Adjusted, AdjustError> {
    adjust::restore(saved, khz(1_300_000), DowntimePolicy::Freeze, Stood::UntilWall(0), None)
}

fn lapic(c: &mut Criterion) {
    let mut apic = apic();
    let mut tsc = 1_000_000;
    c.bench_function("lapic: arm, expire, acknowledge, EOI", |b| {
        b.iter(|| {
            tsc += 1000;
            let at = |tsc| Now::new(GuestTsc(tsc), VmTime(tsc));
            let armed = apic.msr_write(IA32_TSC_DEADLINE, tsc + 500, at(tsc));
            black_box(apic.next_wake());
            apic.advance(at(tsc + 500));
            assert_eq!(apic.pending(), Some(VECTOR));
            apic.acknowledge(VECTOR);
            black_box((armed.is_ok(), apic.msr_write(EOI, 0, at(tsc + 501)).is_ok()))
        });
    });
}

fn time(c: &mut Criterion) {
    let old = page();
    c.bench_function("page: guest TSC to VM time", |b| {
        b.iter(|| black_box(&old).vm_time(black_box(GuestTsc(1 << 41))));
    });
    c.bench_function("page: VM time to the least guest TSC", |b| {
        b.iter(|| black_box(&old).least_tsc(black_box(VmTime(1 << 38))));
    });
    c.bench_function("restore: a deadline rescaled", |b| {
        let (armed, saved) = (GuestTsc(1 << 41), moment());
        if let Ok(new) = restored(&saved) {
            b.iter(|| adjust::deadline(DeadlinePolicy::Rescale, black_box(armed), None, &saved, &new));
        }
    });
    c.bench_function("restore: the page for another frequency", |b| {
        let saved = moment();
        b.iter(|| restored(black_box(&saved)));
    });
}

/// One page of RAM.
struct Ram(RefCell<[u8; 4096]>);

impl GuestWrite for Ram {
    fn write(&self, addr: u64, bytes: &[u8]) -> Result<(), OutsideRam> {
        let outside = OutsideRam { addr, bytes: bytes.len() };
        let start = usize::try_from(addr).unwrap_or(usize::MAX);
        let mut ram = self.0.borrow_mut();
        let place = ram.get_mut(start..start.saturating_add(bytes.len())).ok_or(outside)?;
        place.copy_from_slice(bytes);
        Ok(())
    }

    fn read(&self, addr: u64, bytes: &mut [u8]) -> Result<(), OutsideRam> {
        let outside = OutsideRam { addr, bytes: bytes.len() };
        let start = usize::try_from(addr).unwrap_or(usize::MAX);
        let ram = self.0.borrow();
        let place = ram.get(start..start.saturating_add(bytes.len())).ok_or(outside)?;
        bytes.copy_from_slice(place);
        Ok(())
    }
}

fn pvclock(c: &mut Criterion) {
    let ram = Ram(RefCell::new([0; 4096]));
    let mut registration = Registration::default();
    assert!(registration.write_msr(0x41, &ram).is_ok(), "the page is in RAM");
    let page = page();
    c.bench_function("kvmclock: publish", |b| b.iter(|| registration.publish(&ram, black_box(&page), 1, false)));
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    for group in [lapic, time, pvclock] {
        group(&mut criterion);
    }
    criterion.final_summary();
}
