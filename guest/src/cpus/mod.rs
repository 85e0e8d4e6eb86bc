//! Scenario `smp`: every CPU ticks, compares its clock with the others', and interrupts the next.
//!
//! All work is done by interrupt handlers and by checks with interrupts off; between them a CPU halts. Nothing here is
//! compiled into the other scenarios' tick: they have an IDT of their own.

mod bring_up;

use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use guest::clockevent::{Boot, Device, Kind};
use guest::pvclock::{BadPage, Clock};
use guest::scenarios::Scenario;
use guest::smp::{self, IPI_VECTOR, Link, Part, WAKE_VECTOR};
use guest::ticks::{State, Ticks};
use guest_abi::report::MAX_CPUS;

use crate::apic::{Apic, ICR_FIXED, ICR_FIXED_OTHERS};
use crate::arch::cell::{Exclusive, Once};
use crate::arch::cpu::{IrqsOff, ManyCpus};
use crate::arch::{ap, cpu, shared};
use crate::console::line;
use crate::exit::{self, exit};
use crate::machine::{Machine, OneOf};

/// CPU 0's choices, which all CPUs follow.
pub struct Plan {
    /// CPUs, at most [`MAX_CPUS`].
    pub cpus: usize,
    /// How every CPU accesses its local APIC.
    pub apic: Apic,
    /// Whether to turn paravirtual EOI on.
    pub pv_eoi: bool,
    /// The MSR that takes the address of a kvmclock page.
    pub system_time_msr: u32,
    /// The clockevent.
    pub kind: Kind,
    /// Its parameters.
    pub known: Boot,
    /// Each CPU's part of the scenario.
    pub scenario: Scenario,
    /// Ticks a second, on each CPU.
    pub hz: u32,
}

/// State of one CPU that others may access.
struct Cpu {
    /// Used by its timer interrupt's handler. On CPU 0 also by the idle loop, after the last tick.
    ticking: Exclusive<Option<Ticking>>,
    /// Its interrupts to the next CPU.
    link: Link,
    apic_id: AtomicU32,
    /// Its clock, APIC and ring are set up.
    up: AtomicBool,
}

struct Ticking {
    machine: Machine<OneOf>,
    ticks: Ticks,
}

static CPUS: [Cpu; MAX_CPUS] = [const {
    Cpu { ticking: Exclusive::new(None), link: Link::new(), apic_id: AtomicU32::new(0), up: AtomicBool::new(false) }
}; MAX_CPUS];
static PLAN: Once<Plan> = Once::new();
/// VM time from which the periods of all CPUs count; 0 = not yet.
static ORIGIN_NS: AtomicU64 = AtomicU64::new(0);
/// The largest kvmclock reading of any CPU.
static LATEST_NS: AtomicU64 = AtomicU64::new(0);

/// VM time without a tick or an interrupt on any CPU after which the rest counts as lost. Far above the time that a
/// busy host takes to run every CPU once.
const PATIENCE_NS: u64 = 10_000_000_000;

fn of(number: usize) -> &'static Cpu {
    // All numbers are in range: `ap_main` parks a CPU whose number is not.
    CPUS.get(number).unwrap_or(&CPUS[0])
}

/// The largest reading that any CPU has published. The caller's RDTSC, which comes next, might otherwise "be executed
/// before" the load (Intel SDM vol. 2, "RDTSC"): so CPUID serializes in between, since LFENCE belongs to SSE2.
pub fn latest_reading() -> u64 {
    let latest = LATEST_NS.load(Ordering::SeqCst);
    cpu::serialize();
    latest
}

/// Publishes a reading.
pub fn publish_reading(ns: u64) {
    LATEST_NS.fetch_max(ns, Ordering::SeqCst);
}

/// Runs CPU 0's part. Called by `kernel::main`, interrupts off; `clock` is the one that earlier readings were made
/// with.
pub fn main(plan: Plan, clock: Clock, mut irqs_off: IrqsOff<ManyCpus>) -> ! {
    ap::use_smp_idt();
    PLAN.set(plan);
    let Some(plan) = PLAN.get() else { exit(exit::CRASHED) };
    let mut machine = Machine { apic: plan.apic, seat: OneOf(0) };
    let mut ticks = Ticks::new(clock, Device::new(plan.kind, &plan.known), plan.scenario);
    come_up(plan, &machine);
    bring_up::others(plan, &mut machine, &mut ticks);
    // Read before any CPU starts to tick; not 0, which means that there is none yet.
    let origin_ns = ticks.now(&mut machine).ns.max(1);
    ORIGIN_NS.store(origin_ns, Ordering::SeqCst);
    if plan.cpus > 1 {
        plan.apic.send(0, ICR_FIXED_OTHERS | WAKE_VECTOR);
    }
    start(plan, Ticking { machine, ticks });
    let mut patience = Patience { progress: 0, until_ns: 0 };
    let complete = loop {
        send_owed(plan, 0);
        if let Some(complete) = patience.verdict(plan) {
            break complete;
        }
        cpu::halt(&mut irqs_off);
    };
    finish(plan, complete)
}

/// Runs an application processor's part. Interrupts are off.
pub fn ap_main(number: usize, mut irqs_off: IrqsOff<ManyCpus>) -> ! {
    let Some(plan) = PLAN.get().filter(|plan| number < plan.cpus) else { cpu::park() };
    cpu::wrmsr(plan.system_time_msr, shared::time_address(number) | shared::ENABLE);
    if Apic::enable(plan.apic == Apic::X2Apic) != Some(plan.apic) {
        line!("guest: error: cpu {number}: its local APIC is not {}, or has been moved", plan.apic.name());
        exit(exit::USAGE)
    }
    if plan.pv_eoi {
        Apic::enable_pv_eoi(number);
    }
    if shared::time_version(number) == 0 {
        line!("guest: error: cpu {number}: the host has not written the kvmclock page");
        exit(exit::FAILED)
    }
    let machine = Machine { apic: plan.apic, seat: OneOf(number) };
    come_up(plan, &machine);
    while ORIGIN_NS.load(Ordering::SeqCst) == 0 {
        cpu::halt(&mut irqs_off);
    }
    start(
        plan,
        Ticking { machine, ticks: Ticks::new(Clock::new(), Device::new(plan.kind, &plan.known), plan.scenario) },
    );
    loop {
        send_owed(plan, number);
        if own_part_complete(plan, number) {
            break;
        }
        cpu::halt(&mut irqs_off);
    }
    plan.apic.send(of(0).apic_id.load(Ordering::SeqCst), ICR_FIXED | WAKE_VECTOR);
    loop {
        cpu::halt(&mut irqs_off);
    }
}

/// Sets this CPU's ring up and marks the CPU as up, for the others to see.
fn come_up(plan: &Plan, machine: &Machine<OneOf>) {
    let OneOf(number) = machine.seat;
    shared::ring_start(number, plan.scenario.expected());
    of(number).apic_id.store(plan.apic.id(), Ordering::SeqCst);
    of(number).up.store(true, Ordering::SeqCst);
}

/// Arms this CPU's first tick.
fn start(plan: &Plan, ticking: Ticking) {
    let OneOf(number) = ticking.machine.seat;
    let phase_ns = smp::phase_ns(plan.hz, number, plan.cpus);
    let origin_ns = ORIGIN_NS.load(Ordering::SeqCst).saturating_add(phase_ns);
    of(number).ticking.with(|place| {
        let Ticking { machine, ticks } = place.insert(ticking);
        check(ticks.start_from(machine, origin_ns));
    });
}

fn check<T>(outcome: Result<T, BadPage>) {
    if let Err(error) = outcome {
        line!("guest: error: cpu {}: {error}", cpu::number());
        exit(exit::FAILED)
    }
}

/// Handles the timer's vector. First the clock, then the EOI: see [`crate::kernel::timer_interrupt`].
pub fn timer_interrupt() {
    let Some(plan) = PLAN.get() else { return };
    let number = cpu::number();
    let me = of(number);
    let ticked = me.ticking.with(|ticking| {
        let Some(Ticking { machine, ticks }) = ticking else {
            plan.apic.eoi(number);
            return false;
        };
        let before = ticks.totals().ticks;
        let now = ticks.now(machine);
        plan.apic.eoi(number);
        check::<State>(ticks.interrupt(machine, &now));
        ticks.totals().ticks != before
    });
    // Only now, with `ticking` free again: once the last interrupt has arrived, CPU 0 borrows it to read the totals.
    if ticked == Some(true) {
        me.link.owe();
        send_owed(plan, number);
    }
}

/// Handles [`IPI_VECTOR`], which is counted.
pub fn ipi() {
    let Some(plan) = PLAN.get() else { return };
    let number = cpu::number();
    plan.apic.eoi(number);
    let sender = smp::previous_cpu(number, plan.cpus);
    let link = &of(sender).link;
    let waits = link.arrived();
    shared::ring_ipis_received(number, link.received());
    // A CPU that sends to itself is awake already.
    if waits && sender != number {
        plan.apic.send(of(sender).apic_id.load(Ordering::SeqCst), ICR_FIXED | WAKE_VECTOR);
    }
}

/// Handles [`WAKE_VECTOR`], which only ends a halt.
pub fn woken() {
    if let Some(plan) = PLAN.get() {
        plan.apic.eoi(cpu::number());
    }
}

/// Sends an interrupt to the next CPU, if one is owed and the one before has arrived. Interrupts are off.
fn send_owed(plan: &Plan, number: usize) {
    let link = &of(number).link;
    if link.take() {
        shared::ring_ipis_sent(number, link.sent());
        let next = of(smp::next_cpu(number, plan.cpus));
        plan.apic.send(next.apic_id.load(Ordering::SeqCst), ICR_FIXED | IPI_VECTOR);
    }
}

fn part(plan: &Plan, number: usize) -> Part {
    Part::of(&of(number).link, number, plan.cpus, plan.scenario.expected())
}

/// Whether this CPU has made all its ticks, sent all its interrupts, and received all from the CPU before it.
fn own_part_complete(plan: &Plan, number: usize) -> bool {
    let (own, before) = (part(plan, number), part(plan, smp::previous_cpu(number, plan.cpus)));
    own.ticks == own.count && own.sent == own.count && before.received == before.count
}

/// CPU 0's time limit for the others: it starts anew with every progress.
struct Patience {
    progress: u64,
    until_ns: u64,
}

impl Patience {
    /// Whether all parts are complete: `Some(false)` = the limit has passed; `None` = wait, with the timer armed for
    /// the limit.
    fn verdict(&mut self, plan: &Plan) -> Option<bool> {
        let parts = || (0..plan.cpus).map(|number| part(plan, number));
        if parts().all(|part| part.complete()) {
            return Some(true);
        }
        let own = part(plan, 0);
        if own.ticks != own.count {
            // The timer is armed for the next tick.
            return None;
        }
        let progress = parts().fold(0u64, |sum, part| sum.wrapping_add(part.progress()));
        of(0).ticking.with(|ticking| {
            let Ticking { machine, ticks } = ticking.as_mut()?;
            let now = ticks.now(machine);
            if progress != self.progress {
                *self = Self { progress, until_ns: now.ns.saturating_add(PATIENCE_NS) };
            }
            if now.ns >= self.until_ns {
                return Some(false);
            }
            check(ticks.wake_at(machine, self.until_ns, &now));
            None
        })?
    }
}

fn finish(plan: &Plan, complete: bool) -> ! {
    let (mut ticks, mut early_wakes, mut worst_late_ns, mut steps_back, mut stopped) = (0, 0, 0, 0, 0);
    let (mut sent, mut received) = (0, 0);
    for number in 0..plan.cpus {
        let part = part(plan, number);
        if !part.complete() {
            line!("guest: error: {part}");
        }
        sent += part.sent;
        received += part.received;
        of(number).ticking.with(|ticking| {
            let Some(Ticking { ticks: of_this, .. }) = ticking else { return };
            let totals = of_this.totals();
            ticks += totals.ticks;
            early_wakes += totals.early_wakes;
            worst_late_ns = worst_late_ns.max(totals.worst_late_ns);
            steps_back += of_this.clock().steps_back();
            stopped += of_this.clock().stopped_seen();
        });
    }
    line!(
        "guest: {} cpus, {ticks} ticks, {sent} IPIs sent, {received} received, {early_wakes} early wakes, \
         worst late {worst_late_ns} ns, clock stepped back {steps_back} times, stopped {stopped} times",
        plan.cpus
    );
    exit(if complete { exit::OK } else { exit::FAILED })
}
