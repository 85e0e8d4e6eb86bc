//! Boot, the idle loop, and what interrupts and exceptions do.

use core::panic::PanicInfo;
use core::sync::atomic::{AtomicBool, Ordering};

use guest::clockevent::{Boot, Device, select};
use guest::cmdline::{MAX_BYTES, Options, ScenarioName};
use guest::platform::{KVM_BUS_KHZ, Platform, TscKhz};
use guest::pvclock::{BadPage, Clock, Source, tsc_khz, wall_time};
use guest::ticks::{State, Ticks};
use guest::topology::cpu_count;
use guest_abi::report::MAX_CPUS;

use crate::apic::Apic;
use crate::arch::cell::Exclusive;
use crate::arch::trap::Frame;
use crate::arch::{boot, cpu, shared};
use crate::console::{Console, line};
use crate::cpus::{self, Plan};
use crate::exit::{self, exit};
use crate::machine::{Machine, Only};

/// What the timer interrupt works on.
struct Kernel {
    machine: Machine<Only>,
    ticks: Ticks,
}

static KERNEL: Exclusive<Option<Kernel>> = Exclusive::new(None);
/// Set by the interrupt handler when there is nothing more to wait for.
static DONE: AtomicBool = AtomicBool::new(false);

/// Ends with a message about what the user asked for.
macro_rules! refuse {
    ($($arg:tt)*) => {{
        line!("guest: error: {}", format_args!($($arg)*));
        exit(exit::USAGE)
    }};
}

/// From `arch::boot`, interrupts off.
pub fn main(start_info: u32) -> ! {
    Console::init();
    // One byte more than is allowed, so that the parser sees that it is too long.
    let Some(line) = boot::command_line(start_info, MAX_BYTES + 1) else { refuse!("no PVH start info") };
    let options = match Options::parse(line) {
        Ok(options) => options,
        Err(error) => refuse!("{error}"),
    };
    let platform = Platform::probe(cpu::cpuid);
    let Some(kvmclock) = platform.kvmclock else { refuse!("CPUID offers no kvmclock, the only clocksource here") };
    cpu::wrmsr(kvmclock.system_time_msr, shared::time_address(0) | shared::ENABLE);
    cpu::wrmsr(kvmclock.wall_clock_msr, shared::wall_address());
    let chosen = match select(options.clockevent, &platform) {
        Ok(chosen) => chosen,
        Err(error) => refuse!("{error}"),
    };
    let Some(apic) = Apic::enable(platform.x2apic) else { refuse!("the local APIC has been moved") };
    let mut machine = Machine { apic, seat: Only };

    // KVM ignores an address that it does not like; the clock would stand still and every wait be endless.
    if machine.version() == 0 {
        line!("guest: error: the host has not written the kvmclock page");
        exit(exit::FAILED)
    }
    let (khz, khz_from) = match platform.tsc_khz {
        Some(TscKhz::Hypervisor(khz)) => (khz, "hypervisor leaf"),
        Some(TscKhz::Crystal(khz)) => (khz, "crystal leaf"),
        None => (tsc_khz(&machine.fields()), "kvmclock"),
    };
    let mut clock = Clock::new();
    clock.plant_early_check(options.plant_early_check);
    let now = clock.read(&mut machine);
    let wall = wall_time(&shared::wall_clock(), now.ns);
    line!("guest: {}, tsc {khz} kHz ({khz_from}), wall {}.{:09}", apic.name(), wall.sec, wall.nsec);
    line!(
        "guest: {} rating={} conversion={} recheck={} scenario={} hz={} count={}",
        chosen.name,
        chosen.rating,
        options.conversion.name(),
        if options.recheck { "on" } else { "off" },
        options.scenario.name(),
        options.hz,
        options.count
    );

    let known = Boot {
        tsc_khz: khz,
        bus_khz: u64::from(platform.bus_khz.unwrap_or(KVM_BUS_KHZ)),
        ns_msr: platform.ns_msr,
        conversion: options.conversion,
        recheck: options.recheck,
    };
    let scenario = options.scenario();
    if options.scenario == ScenarioName::Smp {
        let cpus = cpu_count(cpu::cpuid_subleaf);
        let Some(cpus) = usize::try_from(cpus).ok().filter(|cpus| *cpus <= MAX_CPUS) else {
            refuse!("the machine has {cpus} CPUs, scenario=smp can use {MAX_CPUS}")
        };
        let system_time_msr = kvmclock.system_time_msr;
        cpus::main(Plan { cpus, apic, system_time_msr, kind: chosen.kind, known, scenario, hz: options.hz }, clock)
    }
    shared::ring_start(0, scenario.expected());
    let ticks = Ticks::new(clock, Device::new(chosen.kind, &known), scenario);
    KERNEL.with(|kernel| {
        let kernel = kernel.insert(Kernel { machine, ticks });
        after(kernel.ticks.start(&mut kernel.machine));
    });
    while !cpu::halt_unless(|| DONE.load(Ordering::Relaxed)) {}
    finish()
}

/// What follows from the tick layer's answer.
fn after(outcome: Result<State, BadPage>) {
    match outcome {
        Ok(State::Waiting) => {}
        Ok(State::Done) => DONE.store(true, Ordering::Relaxed),
        Err(error) => {
            line!("guest: error: {error}");
            exit(exit::FAILED)
        }
    }
}

/// The timer's vector. All work is done here, with interrupts off; the main loop only looks at [`DONE`].
pub fn timer_interrupt() {
    KERNEL.with(|kernel| {
        let Some(kernel) = kernel else { return };
        kernel.machine.apic.eoi();
        after(kernel.ticks.interrupt(&mut kernel.machine));
    });
}

fn finish() -> ! {
    KERNEL.with(|kernel| {
        let Some(Kernel { ticks, .. }) = kernel else { return };
        let totals = ticks.totals();
        line!(
            "guest: {} ticks, {} early wakes, worst late {} ns, clock stepped back {} times, stopped {} times",
            totals.ticks,
            totals.early_wakes,
            totals.worst_late_ns,
            ticks.clock().steps_back(),
            ticks.clock().stopped_seen()
        );
    });
    exit(exit::OK)
}

/// An exception: says where, and ends.
pub fn exception(frame: &Frame) -> ! {
    let Frame { registers, vector, error, rip, cs, rflags, rsp, ss } = frame;
    line!("guest: exception {vector} error {error:#x} at {cs:#x}:{rip:#x}");
    line!("rflags {rflags:#x} stack {ss:#x}:{rsp:#x} cr2 {:#x}", cpu::cr2());
    let names = ["r15", "r14", "r13", "r12", "r11", "r10", "r9", "r8", "rdi", "rsi", "rbp", "rbx", "rdx", "rcx", "rax"];
    for (name, value) in names.iter().zip(registers) {
        line!("{name} {value:#x}");
    }
    exit(exit::CRASHED)
}

/// A panic: says what and where, and ends.
pub fn panicked(info: &PanicInfo<'_>) -> ! {
    line!("guest: {info}");
    exit(exit::CRASHED)
}
