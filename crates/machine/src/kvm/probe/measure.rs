//! Measurements: offsets and costs, for `vmm doctor` and for choosing a TSC source.

use super::{CODE, Exit, Operation, Probe, Reading, TSC_LOOP, USER_SPACE, with_apic_features};
use crate::{
    host::tsc::read_tsc,
    kvm::{Error, Host},
    x86::Leaf,
};

/// An endless loop: OUT 0x80; MOV ECX, 10000; DEC ECX; JNZ.
const COUNT_LOOP: [u8; 12] = [0xe6, 0x80, 0xb9, 0x10, 0x27, 0x00, 0x00, 0x49, 0x75, 0xfd, 0xeb, 0xf4];
/// Instructions between two of its exits; two more are not counted.
const COUNT_INSTRUCTIONS: u64 = 20_000;
/// How many times they are timed.
const COUNT_SAMPLES: usize = 6;

/// NOP three times; STI; NOP; CLI; NOP; NOP; HLT. The NOP after STI must be a step of its own: STI blocks interrupts
/// for an instruction (SDM vol. 2, "STI"), but not the trap of single-stepping.
const STEPS: [u8; 9] = [0x90, 0x90, 0x90, 0xfb, 0x90, 0xfa, 0x90, 0x90, 0xf4];

/// The result of setting a TSC offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measured {
    /// Whether the ioctl succeeded.
    pub accepted: bool,
    /// Whether the guest's TSC had the offset.
    pub took_effect: bool,
}

/// The result of single-stepping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// Each step stopped after exactly one instruction.
    pub exact: bool,
    /// Median cost of a step, in nanoseconds.
    pub ns: u64,
}

fn median(mut values: Vec<u64>) -> u64 {
    values.sort_unstable();
    values.get(values.len() / 2).copied().unwrap_or(0)
}

fn to_ns(ticks: u64, host_khz: u32) -> u64 {
    let ns = u128::from(ticks) * 1_000_000 / u128::from(host_khz.max(1));
    u64::try_from(ns).unwrap_or(u64::MAX)
}

/// Sets a TSC `offset` to the host's TSC, and measures, to about a millisecond, whether the guest's TSC has it.
///
/// # Errors
/// If KVM fails in a way that says nothing about offsets.
pub fn tsc_offset(host: &Host, supported: &[Leaf], offset: u64) -> Result<Measured, Error> {
    let mut probe = Probe::new(host, &with_apic_features(supported), &TSC_LOOP, USER_SPACE)?;
    let accepted = probe.vcpu.set_tsc_offset(offset).is_ok();
    let took_effect = probe
        .read_guest_tsc()?
        .is_some_and(|Reading { before, guest, after }| (before..=after).contains(&guest.wrapping_sub(offset)));
    Ok(Measured { accepted, took_effect })
}

/// Median cost of an exit to user space and back, in nanoseconds.
///
/// # Errors
/// If KVM fails.
pub fn exit_ns(host: &Host, supported: &[Leaf], host_khz: u32) -> Result<u64, Error> {
    let mut probe = Probe::new(host, &with_apic_features(supported), &TSC_LOOP, USER_SPACE)?;
    let mut costs = Vec::new();
    for _ in 0..200 {
        let before = read_tsc();
        probe.next()?;
        costs.push(read_tsc().saturating_sub(before));
    }
    Ok(to_ns(median(costs), host_khz))
}

/// Measures the cost of an instruction of supervisor code, in nanoseconds. Hundreds mean that it is emulated. The
/// result is the least of several samples, because a first entry, or other load on the host, can take longer than the
/// loop.
///
/// # Errors
/// If KVM fails.
pub fn instruction_ns(host: &Host, supported: &[Leaf], host_khz: u32) -> Result<f64, Error> {
    let mut probe = Probe::new(host, &with_apic_features(supported), &COUNT_LOOP, USER_SPACE)?;
    probe.next()?;
    let mut least = u64::MAX;
    for _ in 0..COUNT_SAMPLES {
        let before = read_tsc();
        probe.next()?;
        least = least.min(read_tsc().saturating_sub(before));
    }
    #[allow(clippy::cast_precision_loss, reason = "some milliseconds at most")]
    Ok(to_ns(least, host_khz) as f64 / COUNT_INSTRUCTIONS as f64)
}

/// Single-steps over NOPs, STI and CLI.
///
/// # Errors
/// If KVM fails.
pub fn single_step(host: &Host, supported: &[Leaf], host_khz: u32) -> Result<Step, Error> {
    let mut probe = Probe::new(host, &with_apic_features(supported), &STEPS, USER_SPACE)?;
    let mut exact = true;
    let mut costs = Vec::new();
    for step in 1..=8 {
        let before = read_tsc();
        let exit = probe.vcpu.step(&mut probe.last, None)?;
        costs.push(read_tsc().saturating_sub(before));
        exact &= exit == Exit::Debug && probe.vcpu.registers().rip == CODE + step;
        if exit == Exit::Halt || exit == Exit::Operation(Operation::Port) {
            break;
        }
    }
    probe.vcpu.stop_stepping()?;
    Ok(Step { exact, ns: to_ns(median(costs), host_khz) })
}
