//! The local APIC's edges: INIT, a TSC that wraps, periods that are too short.

use std::fs;

use guest_abi::{
    msr::{IA32_TSC, IA32_TSC_ADJUST, IA32_TSC_DEADLINE},
    ns_deadline, pv_eoi, pvclock,
};
use serde_json::{Value, json};
use vm_tests::{
    Ended, Lab, deadline_write,
    kernel::{self, If, Kernel, again, compare, count, expect, out, store, times, times_or_until, until, word, wrmsr},
    require, require_kvm,
    state_file::change_sections,
};

const VECTOR: u8 = 0x40;
const OTHER: u8 = 0x41;
const MODE_PERIODIC: u32 = 1 << 17;
const MODE_DEADLINE: u32 = 2 << 17;
/// One nanosecond a tick.
const BY_1: u32 = 0b1011;
const BY_128: u32 = 0b1010;

const REAL: &str = "--tsc trapped --tsc-khz 2600000 --x2apic off --timeout 60s";
const VIRTUAL: &str = "--time virtual --tsc-khz 2600000 --x2apic off --timeout 60s";

#[track_caller]
fn boot(lab: &Lab, kernel: &Kernel, flags: &str) -> Ended {
    fs::write(lab.path("image"), kernel.image()).unwrap();
    lab.run(&format!("--guest image {flags}"))
}

/// Arms a deadline a thousand ticks before the TSC wraps, which is in 2 ms.
fn arm_before_the_wrap() -> Vec<u8> {
    [
        store(kernel::LVTT, MODE_DEADLINE | u32::from(VECTOR)),
        wrmsr(IA32_TSC, 5_200_000u64.wrapping_neg()),
        wrmsr(IA32_TSC_DEADLINE, 1000u64.wrapping_neg()),
    ]
    .concat()
}

// Catches: a deadline that is compared with a TSC that has wrapped since. An operation of the guest takes 2,600 ticks
// in virtual time and more in real time, so that no reading of the TSC is between the deadline and the wrap.
#[test]
fn a_deadline_just_before_the_tsc_wraps_comes() {
    require_kvm!();
    require!(deadline_write());
    let lab = Lab::new();
    let busy = times_or_until(200_000, &kernel::PASS, count(VECTOR), 1);
    let kernel = Kernel::new(&[arm_before_the_wrap(), kernel::STI.to_vec(), busy, expect(count(VECTOR), 1)]);
    for flags in [REAL, VIRTUAL] {
        boot(&lab, &kernel.clone().counting_apic(VECTOR), flags).expect(0);
    }
}

// Catches: the same of a CPU that halts while another one's operations take virtual time past the wrap.
#[test]
fn a_deadline_of_a_halted_cpu_comes_when_another_takes_time_past_the_wrap() {
    require_kvm!();
    require!(deadline_write());
    let lab = Lab::new();
    let busy = times_or_until(200_000, &kernel::PASS, count(VECTOR), 1);
    let kernel = Kernel::new(&[kernel::start_second(), until(word(0), 1), busy, expect(count(VECTOR), 1)])
        .second(&[arm_before_the_wrap(), store(word(0), 1), kernel::IDLE.to_vec()])
        .counting_apic(VECTOR);
    for (flags, seeds) in [(REAL, 1), (VIRTUAL, 4)] {
        for seed in 0..seeds {
            boot(&lab, &kernel, &format!("{flags} --cpus 2 --seed {seed}")).expect(0);
        }
    }
}

// Catches: a deadline that stays where it was when the guest moves the TSC that it is a value of.
#[test]
fn a_write_of_the_tsc_moves_the_deadline_that_is_armed() {
    require_kvm!();
    require!(deadline_write());
    let lab = Lab::new();
    for msr in [IA32_TSC, IA32_TSC_ADJUST] {
        let kernel = Kernel::new(&[
            store(kernel::LVTT, MODE_DEADLINE | u32::from(VECTOR)),
            wrmsr(IA32_TSC_DEADLINE, 1 << 50),
            kernel::STI.to_vec(),
            times(10, &kernel::PASS),
            expect(count(VECTOR), 0),
            wrmsr(msr, 1 << 51),
            times(10, &kernel::PASS),
            expect(count(VECTOR), 1),
        ]);
        boot(&lab, &kernel.counting_apic(VECTOR), VIRTUAL).expect(0);
    }
}

// Catches: a timer interrupt whose lateness the host counts from another instant than its deadline's, because the guest
// has moved its TSC.
#[test]
fn the_lateness_of_a_deadline_is_that_of_a_tsc_that_was_moved() {
    require_kvm!();
    require!(deadline_write());
    let lab = Lab::new();
    // A second ahead, and a deadline 10 ms after.
    let (ahead, wait) = (2_600_000_000, 26_000_000);
    let kernel = Kernel::new(&[
        store(kernel::LVTT, MODE_DEADLINE | u32::from(VECTOR)),
        wrmsr(IA32_TSC_ADJUST, ahead),
        wrmsr(IA32_TSC_DEADLINE, ahead + wait),
        kernel::STI.to_vec(),
        times_or_until(200_000, &kernel::PASS, count(VECTOR), 1),
        expect(count(VECTOR), 1),
    ]);
    boot(&lab, &kernel.counting_apic(VECTOR), &format!("{VIRTUAL} --summary summary")).expect(0);
    let summary: Value = serde_json::from_slice(&fs::read(lab.path("summary")).unwrap()).unwrap();
    let timer = &summary["timer"];
    assert_eq!((&timer["interrupts"], &timer["early"]), (&json!(1), &json!(0)));
    // Virtual time: some operations.
    assert!(timer["late"]["worst_ns"].as_u64().is_some_and(|late_ns| late_ns < 20_000), "{timer}");
}

// Catches: a deadline that passes while the VM is saved, kept as a number that the TSC has wrapped past.
#[test]
fn a_deadline_that_passes_over_a_save_and_the_wrap_comes() {
    require_kvm!();
    require!(deadline_write());
    let lab = Lab::new();
    let kernel = Kernel::new(&[
        arm_before_the_wrap(),
        again(&[&[0xfb, 0xf4, 0xfa][..], &compare(count(VECTOR), 1)].concat(), If::Below),
    ])
    .counting_apic(VECTOR);
    boot(&lab, &kernel, &format!("{VIRTUAL} --save-at 1ms --save-to saved")).expect(0);
    for deadline in ["keep", "rescale", "fire"] {
        for downtime in ["freeze", "catch-up --downtime-length 1s"] {
            let flags = format!("restore saved --timeout 60s --deadline {deadline} --downtime {downtime}");
            lab.run(&flags).expect(0);
        }
    }
}

/// Enables interrupts for a thousand operations, which are a millisecond of virtual time.
fn millisecond() -> Vec<u8> {
    [kernel::STI.to_vec(), times(1000, &kernel::PASS), kernel::CLI.to_vec()].concat()
}

/// Fails unless so many interrupts of `vector` came.
fn between(vector: u8, least: u32, most: u32) -> Vec<u8> {
    let below = |value, body: Vec<u8>| [compare(count(vector), value), body].concat();
    let at_least = [&[0x73, 5][..], &kernel::fail()].concat();
    let at_most = [&[0x72, 5][..], &kernel::fail()].concat();
    [below(least, at_least), below(most + 1, at_most)].concat()
}

// Catches: a guest that asks for interrupts faster than it can handle them, and takes its VM along: KVM has a least
// period of 200 µs. In virtual time those of a millisecond are 5, and the handlers' own operations lengthen it a
// little.
#[test]
fn a_period_that_is_too_short_lets_the_guest_go_on() {
    require_kvm!();
    let lab = Lab::new();
    let apic = |lvtt: u32, most| {
        let arm = [store(kernel::TDCR, BY_1), store(kernel::LVTT, lvtt | u32::from(VECTOR)), store(kernel::TMICT, 1)]
            .concat();
        Kernel::new(&[arm, millisecond(), between(VECTOR, 1, most)]).counting_apic(VECTOR)
    };
    // Channel 0 at 1.19 MHz, by way of the 8259 and LINT0: ICW1 to ICW4, only IRQ 0 open, ExtINT; count 1.
    let pit = |mode: u8, reload: u8, most| {
        let pic = [(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0xfe)].map(|(port, byte)| out(port, byte));
        let arm =
            [pic.concat(), store(kernel::LINT0, 0x700), out(0x43, mode), out(0x40, reload), out(0x40, 0)].concat();
        // push eax; mov al, 0x20; out 0x20, al; pop eax.
        Kernel::new(&[arm, millisecond(), between(0x20, 1, most)]).counting(0x20, &[0x50, 0xb0, 0x20, 0xe6, 0x20, 0x58])
    };
    // One-shot is not limited: it interrupts once.
    for kernel in [apic(MODE_PERIODIC, 6), apic(0, 1), pit(0x34, 1, 6), pit(0x36, 2, 6)] {
        boot(&lab, &kernel, VIRTUAL).expect(0);
    }
    // In real time a busy host makes the millisecond longer.
    for kernel in [apic(MODE_PERIODIC, 100_000), pit(0x34, 1, 100_000), pit(0x36, 2, 100_000)] {
        boot(&lab, &kernel, REAL).expect(0);
    }
}

// Catches: a bootstrap processor that INIT parks, and an address without the base of CS.
#[test]
fn init_restarts_the_first_cpu_at_the_reset_vector() {
    require_kvm!();
    let lab = Lab::new();
    let itself = Kernel::new(&[store(kernel::ICR, 0x4_4500), kernel::IDLE.to_vec()]);
    let by_another = Kernel::new(&[kernel::start_second(), kernel::IDLE.to_vec()])
        .second(&[store(kernel::ICR_HIGH, 0), store(kernel::ICR, 0x4500)]);
    for flags in ["", "--time virtual", "--cpus 2", "--lapic kvm", "--lapic kvm --cpus 2"] {
        let kernels = if flags.contains("--cpus") { vec![&itself, &by_another] } else { vec![&itself] };
        for kernel in kernels {
            boot(&lab, kernel, &format!("{flags} --x2apic off --timeout 60s"))
                .refused(1, &["0xfffffff0", "cpu 0", "no memory"]);
        }
    }
}

// Catches: a VM that hangs where no CPU is left to start the others, as only an edited snapshot has it.
#[test]
fn a_snapshot_in_which_every_cpu_waits_to_be_started_ends() {
    require_kvm!();
    let lab = Lab::new();
    boot(&lab, &Kernel::new(&[kernel::IDLE.to_vec()]), &format!("{VIRTUAL} --save-at 1ms --save-to saved")).expect(0);
    change_sections(&lab.path("saved/state"), |name, mut section| {
        if name == "cpus" {
            section["user"][0]["phase"] = "wait-for-sipi".into();
        }
        Some(section)
    });
    lab.run("restore saved --timeout 60s").refused(1, &["every CPU waits for a start-up message"]);
}

/// What a CPU can register with the host.
const REGISTRATIONS: [(u32, u64); 3] =
    [(pvclock::MSR_SYSTEM_TIME_NEW, 0x1_0001), (pvclock::MSR_WALL_CLOCK_NEW, 0x1_0040), (pv_eoi::MSR, 0x1_0081)];
/// Whether the second CPU has been started before, and what it then found in the MSRs.
const STARTED: u32 = 0;
const FOUND: u32 = 1;
const LOOKED: u32 = 2;

/// A second CPU that registers all it can and halts; started again, it looks what is left of that.
fn registering(msrs: &[(u32, u64)]) -> Vec<Vec<u8>> {
    let register: Vec<u8> = msrs.iter().flat_map(|(index, value)| wrmsr(*index, *value)).collect();
    let look: Vec<u8> = msrs.iter().flat_map(|(index, _)| kernel::rdmsr_or(*index, word(FOUND))).collect();
    let first = [register, store(word(STARTED), 1), kernel::IDLE.to_vec()].concat();
    vec![
        compare(word(STARTED), 1),
        kernel::unless(If::Equal, &first),
        look,
        store(word(LOOKED), 1),
        kernel::IDLE.to_vec(),
    ]
}

/// Fills the memory that the second CPU registered, or fails if it is not as it was filled.
fn pattern(each: impl Fn(u32, u32) -> Vec<u8>) -> Vec<u8> {
    (0..40).flat_map(|number| each(0x1_0000 + 4 * number, 0x5a5a_0000 | number)).collect()
}

// Catches: a host that writes a page, a word or a wall clock where a CPU that has had INIT once registered it: at the
// renewal of pages, which is every 100 s, when a CPU writes its TSC, at a restore.
#[test]
fn after_init_nothing_is_written_where_a_cpu_had_registered_it() {
    require_kvm!();
    let lab = Lab::new();
    let mut msrs = REGISTRATIONS.to_vec();
    msrs.push((ns_deadline::MSR, 150_000_000_000));
    let mut second = registering(&msrs);
    second.insert(0, store(kernel::LVTT, MODE_DEADLINE | u32::from(OTHER)));
    // 128 ns a tick: 240 s.
    let wait = [
        store(kernel::TDCR, BY_128),
        store(kernel::LVTT, u32::from(VECTOR)),
        store(kernel::TMICT, 240_000_000_000u64.div_ceil(128).try_into().unwrap()),
        again(&[&[0xfb, 0xf4, 0xfa][..], &compare(count(VECTOR), 1)].concat(), If::Below),
    ]
    .concat();
    let kernel = Kernel::new(&[
        kernel::start_second(),
        until(word(STARTED), 1),
        kernel::init_second(),
        // It takes INIT at its next vCPU step.
        times(100, &kernel::PASS),
        pattern(store),
        wrmsr(IA32_TSC_ADJUST, 1000),
        wait,
        pattern(expect),
        kernel::start_second(),
        until(word(LOOKED), 1),
        expect(word(FOUND), 0),
        expect(count(OTHER), 0),
    ])
    .second(&second)
    .counting_apic(VECTOR)
    .counting_apic(OTHER);
    let flags = format!("{VIRTUAL} --cpus 2 --pv-eoi on");
    boot(&lab, &kernel, &flags).expect(0);
    boot(&lab, &kernel, &format!("{flags} --save-at 50s --save-to saved")).expect(0);
    for downtime in ["freeze", "catch-up --downtime-length 1s"] {
        lab.run(&format!("restore saved --timeout 60s --downtime {downtime}")).expect(0);
    }
}

// Catches: a kvmclock registration that outlives INIT, with KVM's LAPIC or with ours.
#[test]
fn init_takes_the_kvmclock_registration_away_as_kvm_does() {
    require_kvm!();
    let lab = Lab::new();
    let kernel = Kernel::new(&[
        kernel::start_second(),
        until(word(STARTED), 1),
        kernel::start_second(),
        until(word(LOOKED), 1),
        expect(word(FOUND), 0),
    ])
    .second(&registering(&REGISTRATIONS[..1]));
    for lapic in ["user", "kvm"] {
        boot(&lab, &kernel, &format!("--lapic {lapic} --cpus 2 --x2apic off --timeout 60s")).expect(0);
    }
}
