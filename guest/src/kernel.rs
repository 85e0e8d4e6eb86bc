//! Boot, the idle loop, and the handlers of interrupts and exceptions.

use core::panic::PanicInfo;

use guest::clockevent::{Boot, Device, LapicOneshot, select};
use guest::cmdline::{Load, MAX_BYTES, Options, ScenarioName};
use guest::platform::{KVM_BUS_KHZ, Platform, TscKhz};
use guest::pvclock::{BadPage, Begun, Clock, Sample, Source, sample, tsc_khz, wall_time};
use guest::scenarios::Scenario;
use guest::steal::{self, Area, Charged};
use guest::ticks::{State, Ticks};
use guest::topology::cpu_count;
use guest::vmclock;
use guest::watchdog::{Clocksource, Counters, Watchdog};
use guest_abi::ports::PM_TIMER;
use guest_abi::report::MAX_CPUS;
use guest_abi::steal_time;

use crate::apic::Apic;
use crate::arch::cell::IrqsOffCell;
use crate::arch::cpu::{IrqsOff, OneCpu};
use crate::arch::load::{PAGE_BYTES, Pages, UserMode, spin_in_kernel};
use crate::arch::trap::Frame;
use crate::arch::vmclock::Vmclock;
use crate::arch::{boot, cpu, port, shared};
use crate::console::{Console, line};
use crate::cpus::{self, Plan};
use crate::exit::{self, exit};
use crate::machine::{Machine, Only};

/// State that the timer interrupt's handler and the idle loop share.
struct Kernel {
    machine: Machine<Only>,
    ticks: Ticks,
    /// The scenario is over.
    done: bool,
}

/// A placeholder until boot stores the real state, before interrupts are enabled: so the handler needs no check for it.
static KERNEL: IrqsOffCell<Kernel> = IrqsOffCell::new(Kernel {
    machine: Machine { apic: Apic::XApic, seat: Only },
    ticks: Ticks::new(Clock::new(), Device::LapicOneshot(LapicOneshot::IDLE), Scenario::NONE),
    done: false,
});

/// Ends the guest with a message about a command line or machine that cannot be used.
macro_rules! refuse {
    ($($arg:tt)*) => {{
        line!("guest: error: {}", format_args!($($arg)*));
        exit(exit::USAGE)
    }};
}

/// Called by `arch::boot`, interrupts off.
pub fn main(start_info: u32, mut irqs_off: IrqsOff<OneCpu>) -> ! {
    Console::init();
    // One byte more than is allowed, so that the parser finds a line that is too long.
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
    let pv_eoi = options.pv_eoi && platform.pv_eoi;
    if pv_eoi {
        Apic::enable_pv_eoi(0);
    }

    // KVM ignores an address that it cannot use. The clock would then stand still, and every wait would be endless.
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
        let plan = Plan { cpus, apic, pv_eoi, system_time_msr, kind: chosen.kind, known, scenario, hz: options.hz };
        cpus::main(plan, clock, irqs_off.many_cpus())
    }
    let pages = (options.touch != 0).then(|| boot::pages_after_image(start_info, options.touch));
    let pages = match pages.transpose() {
        Ok(pages) => pages,
        Err(there) => refuse!(
            "touch={} needs {} KiB of RAM after the kernel; there are {}",
            options.touch,
            options.touch * PAGE_BYTES / 1024,
            there * PAGE_BYTES / 1024
        ),
    };
    if options.steal {
        if !platform.steal_time {
            refuse!("steal=on: CPUID offers no steal time")
        }
        cpu::wrmsr(steal_time::MSR, shared::steal_address() | steal_time::ENABLE);
    }
    let vmclock = match (options.vmclock, platform.vmclock) {
        (false, _) => None,
        (true, None) => refuse!("vmclock=on: CPUID reports no VMClock page; start vmm with --vmclock on"),
        (true, Some(address)) => match Vmclock::at(address) {
            Some(page) => Some(page),
            None => refuse!("vmclock=on: CPUID tells of a VMClock page at {address:#x}, which cannot be mapped"),
        },
    };
    let watch = options.scenario == ScenarioName::Watchdog;
    // A port without a device reads as all ones.
    if watch && options.watchdog == Clocksource::AcpiPm && port::inl(PM_TIMER) == u32::MAX {
        refuse!("watchdog=acpi_pm: the machine has no ACPI PM timer at port {PM_TIMER:#x}")
    }
    shared::ring_start(0, scenario.expected());
    let ticks = Ticks::new(clock, Device::new(chosen.kind, &known), scenario);
    let kernel = KERNEL.get(&mut irqs_off);
    *kernel = Kernel { machine, ticks, done: false };
    let started = kernel.ticks.start(&mut kernel.machine);
    kernel.after(started);
    if watch {
        watch_clocks(&mut irqs_off, &mut Watchdog::new(options.watchdog, khz));
    } else if options.steal {
        watch_steal(&mut irqs_off);
    } else if let Some(page) = vmclock {
        watch_vmclock(&mut irqs_off, page);
    } else if options.load == Load::None && pages.is_none() {
        idle(&mut irqs_off);
    } else {
        work(&mut irqs_off, options.load, pages);
    }
    finish(&KERNEL.get(&mut irqs_off).ticks)
}

/// The main loop without load=, touch=, steal=, vmclock= and watchdog: halts until the next interrupt. It is a function
/// of its own so that the other loops do not change its code, and with it the cost of a tick.
#[inline(never)]
fn idle(irqs_off: &mut IrqsOff<OneCpu>) {
    while !KERNEL.get(irqs_off).done {
        cpu::halt(irqs_off);
    }
}

/// The main loop with `load=` or `touch=`: after every tick it writes to `pages`, then it waits for the next.
fn work(irqs_off: &mut IrqsOff<OneCpu>, load: Load, pages: Option<Pages>) {
    let user = (load == Load::User).then(UserMode::new);
    let mut touched_at = 0;
    loop {
        let kernel = KERNEL.get(irqs_off);
        if kernel.done {
            return;
        }
        let ticks = kernel.ticks.totals().ticks;
        match pages {
            Some(pages) if ticks != touched_at => {
                touched_at = ticks;
                // Another tick may have come during the writes: check before waiting.
                pages.touch(irqs_off);
                continue;
            }
            _ => {}
        }
        match user {
            Some(user) => user.spin(irqs_off, ticks),
            None if load == Load::Kernel => spin_in_kernel(irqs_off, ticks),
            None => cpu::halt(irqs_off),
        }
    }
}

/// A main loop that calls `look` at the beginning and after every tick.
fn after_every_tick(irqs_off: &mut IrqsOff<OneCpu>, mut look: impl FnMut(&mut Kernel)) {
    let mut looked_at = None;
    loop {
        let kernel = KERNEL.get(irqs_off);
        let ticks = kernel.ticks.totals().ticks;
        if looked_at != Some(ticks) {
            looked_at = Some(ticks);
            look(kernel);
        } else if kernel.done {
            return;
        } else {
            cpu::halt(irqs_off);
        }
    }
}

/// The main loop with `steal=on`: after every tick it is counted what a task that always runs would be charged with.
/// Then it prints that.
fn watch_steal(irqs_off: &mut IrqsOff<OneCpu>) {
    let mut charged = Charged::default();
    after_every_tick(irqs_off, |kernel| {
        let now = kernel.ticks.now(&mut kernel.machine);
        charged.tick(now.ns, steal::read(&mut StealArea));
    });
    let Charged { longest_ns, longest_ran_ns, stolen_ns, .. } = charged;
    line!(
        "guest: stolen {stolen_ns} ns; longest interval {longest_ns} ns, {longest_ran_ns} ns without what was stolen"
    );
}

/// CPU 0's steal-time area.
struct StealArea;

impl Area for StealArea {
    fn version(&mut self) -> u32 {
        shared::steal_version()
    }

    fn steal(&mut self) -> u64 {
        shared::steal_sum()
    }

    fn pause(&mut self) {
        cpu::pause();
    }
}

/// The main loop of `scenario=watchdog`: after every tick the clocks are compared. Then it prints what was found.
fn watch_clocks(irqs_off: &mut IrqsOff<OneCpu>, watchdog: &mut Watchdog) {
    after_every_tick(irqs_off, |kernel| {
        watchdog.check(kernel);
        shared::ring_watchdog(watchdog.found());
    });
    let found = watchdog.found();
    line!(
        "guest: watchdog {}: {} checks, {} timed out; worst skew {} ns in {} ns",
        watchdog.clocksource().name(),
        found.checks,
        found.timed_out,
        found.worst_skew_ns,
        found.worst_interval_ns
    );
    for (clocksource, skew_ns, interval_ns) in watchdog.unstable() {
        line!("guest: watchdog: {} is unstable: off by {skew_ns} ns in {interval_ns} ns", clocksource.name());
    }
}

/// The main loop with `vmclock=on`: after every tick VMClock is compared with kvmclock. Then it prints what was found.
fn watch_vmclock(irqs_off: &mut IrqsOff<OneCpu>, mut page: Vmclock) {
    let mut found = vmclock::Found::default();
    after_every_tick(irqs_off, |kernel| {
        let (page, now) = vmclock::read(&mut page, || kernel.ticks.now(&mut kernel.machine));
        found.tick(&page, now.tsc, now.ns);
        shared::ring_vmclock_wrong(found.wrong);
    });
    let (real_ns, vmclock::Found { compared, wrong, worst_ns, disruptions, generations, .. }) =
        (found.real().ns(), found);
    line!(
        "guest: vmclock: real time {}.{:09}; told of {disruptions} disruptions and {generations} restores from a \
         snapshot; wrong at {wrong} of {compared} ticks, at worst by {worst_ns} ns",
        real_ns / 1_000_000_000,
        real_ns % 1_000_000_000
    );
}

impl Counters for Kernel {
    fn readout(&mut self, watchdog: Clocksource, clocksource: Clocksource) -> [u64; 3] {
        let counts = [watchdog, clocksource, watchdog].map(|clocksource| match clocksource {
            Clocksource::Tsc => Count::Known(cpu::rdtsc()),
            Clocksource::Kvmclock => Count::Sampled(sample(&mut self.machine)),
            Clocksource::AcpiPm => Count::Known(u64::from(port::inl(PM_TIMER))),
        });
        counts.map(|count| match count {
            Count::Known(count) => count,
            Count::Sampled(sample) => self.ticks.sampled(&mut self.machine, &sample).ns,
        })
    }
}

/// The count of a clocksource, or what it will be computed from.
enum Count {
    Known(u64),
    Sampled(Sample),
}

impl Kernel {
    /// Acts on the tick layer's result.
    #[inline(always)]
    fn after(&mut self, outcome: Result<State, BadPage>) {
        match outcome {
            Ok(State::Waiting) => {}
            Ok(State::Done) => self.done = true,
            Err(error) => unusable(error),
        }
    }
}

#[cold]
fn unusable(error: BadPage) -> ! {
    line!("guest: error: {error}");
    exit(exit::FAILED)
}

/// Handles the timer's vector. All work is done here, with interrupts off; the main loop only checks whether it is
/// over.
///
/// The clock is read first: code before it would make the tick look late. Then comes the EOI, before the next expiry is
/// armed: an expiry in the past interrupts at once, and must find no interrupt in service.
#[inline(always)]
pub fn timer_interrupt(irqs_off: &mut IrqsOff<OneCpu>, begun: Begun) {
    let kernel = KERNEL.get(irqs_off);
    let now = kernel.ticks.finish(&mut kernel.machine, begun);
    kernel.machine.apic.eoi(0);
    let outcome = kernel.ticks.interrupt(&mut kernel.machine, &now);
    kernel.after(outcome);
}

fn finish(ticks: &Ticks) -> ! {
    let totals = ticks.totals();
    line!(
        "guest: {} ticks, {} early wakes, worst late {} ns, clock stepped back {} times, stopped {} times",
        totals.ticks,
        totals.early_wakes,
        totals.worst_late_ns,
        ticks.clock().steps_back(),
        ticks.clock().stopped_seen()
    );
    exit(exit::OK)
}

/// Handles an exception: prints the registers, and ends the guest.
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

/// Handles a panic: prints it, and ends the guest.
pub fn panicked(info: &PanicInfo<'_>) -> ! {
    line!("guest: {info}");
    exit(exit::CRASHED)
}
