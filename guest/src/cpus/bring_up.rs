//! INIT–SIPI–SIPI, broadcast to all other CPUs, so that their APIC IDs need not be known.

use core::sync::atomic::Ordering;

use guest::ticks::Ticks;

use super::{Plan, of};
use crate::apic::{ICR_INIT_OTHERS, ICR_STARTUP_OTHERS};
use crate::arch::{ap, cpu};
use crate::console::line;
use crate::exit::{self, exit};
use crate::machine::{Machine, OneOf};

/// The wait between INIT and the first startup IPI, and before the second. The MultiProcessor Specification asks for 10
/// ms and 200 µs, which no CPU of the last twenty years needs: Linux (`arch/x86/kernel/smpboot.c`, `init_udelay`) waits
/// as here.
const GAP_NS: u64 = 10_000;
/// After this time a CPU that is not up counts as missing.
const PATIENCE_NS: u64 = 10_000_000_000;

/// Starts the other CPUs and waits until all are up; ends the guest if one is missing. Interrupts are off.
pub fn others(plan: &Plan, machine: &mut Machine<OneOf>, ticks: &mut Ticks) {
    if plan.cpus == 1 {
        return;
    }
    ap::place_trampoline();
    let startup = ICR_STARTUP_OTHERS | u32::from(ap::TRAMPOLINE_PAGE);
    plan.apic.send(0, ICR_INIT_OTHERS);
    wait(machine, ticks, GAP_NS, || false);
    plan.apic.send(0, startup);
    // A CPU that runs already ignores the second startup IPI.
    if !wait(machine, ticks, GAP_NS, || up(plan) == plan.cpus) {
        plan.apic.send(0, startup);
    }
    if !wait(machine, ticks, PATIENCE_NS, || up(plan) == plan.cpus) {
        line!(
            "guest: error: CPUID tells of {} CPUs, only {} are up {} s after INIT and startup IPIs",
            plan.cpus,
            up(plan),
            PATIENCE_NS / 1_000_000_000
        );
        for number in (0..plan.cpus).filter(|number| !of(*number).up.load(Ordering::SeqCst)) {
            line!("guest: error: cpu {number} did not come");
        }
        exit(exit::FAILED)
    }
}

fn up(plan: &Plan) -> usize {
    (0..plan.cpus).filter(|number| of(*number).up.load(Ordering::SeqCst)).count()
}

/// Spins until `done` returns true, at most for `ns` of VM time. Returns the last result of `done`.
fn wait(machine: &mut Machine<OneOf>, ticks: &mut Ticks, ns: u64, done: impl Fn() -> bool) -> bool {
    let until_ns = ticks.now(machine).ns.saturating_add(ns);
    while !done() {
        if ticks.now(machine).ns >= until_ns {
            return done();
        }
        cpu::pause();
    }
    true
}
