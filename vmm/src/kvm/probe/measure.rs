//! Measurements: rates, offsets and costs, for `vmm doctor` and for choosing a TSC source.

use std::{thread, time::Duration};

use super::{CODE, Exit, OURS, Operation, Probe, with_apic_features};
use crate::{
    boot::cpuid::Leaf,
    kvm::{Error, Host, read_tsc},
};

/// For ever: RDTSC to memory; OUT 0x80.
const TSC_LOOP: [u8; 17] =
    [0x0f, 0x31, 0xa3, 0x00, 0x20, 0x00, 0x00, 0x89, 0x15, 0x04, 0x20, 0x00, 0x00, 0xe6, 0x80, 0xeb, 0xef];

/// OUT 0x80; MOV ECX, 20000; DEC ECX; JNZ; OUT 0x80; HLT.
const COUNT_LOOP: [u8; 13] = [0xe6, 0x80, 0xb9, 0x20, 0x4e, 0x00, 0x00, 0x49, 0x75, 0xfd, 0xe6, 0x80, 0xf4];
/// Instructions of that loop.
const COUNT_INSTRUCTIONS: u64 = 40_000;

/// NOPs, then HLT.
const NOPS: [u8; 9] = [0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0xf4];

/// What a guest's TSC did when KVM was asked for another frequency.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TscRate {
    /// What KVM_SET_TSC_KHZ returned.
    pub accepted: bool,
    /// The frequency that the guest's TSC had, in kHz.
    pub measured_khz: u64,
}

/// What a guest's TSC did when KVM was asked for an offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measured {
    /// What the ioctl returned.
    pub accepted: bool,
    /// Whether the guest's TSC followed.
    pub took_effect: bool,
}

/// What single-stepping did.
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

/// Asks for a TSC of `khz` and measures, over some 4 ms, what the guest got.
///
/// # Errors
/// If KVM fails in a way that is no answer.
pub fn tsc_rate(host: &Host, supported: &[Leaf], host_khz: u32, khz: u32) -> Result<TscRate, Error> {
    let mut probe = Probe::new(host, &with_apic_features(supported), &TSC_LOOP, OURS)?;
    let accepted = probe.vcpu.set_tsc_khz(khz).is_ok();
    let first = probe.read_guest_tsc()?;
    thread::sleep(Duration::from_millis(4));
    let second = probe.read_guest_tsc()?;
    let measured_khz = match (first, second) {
        (Some((host_0, guest_0, _)), Some((host_1, guest_1, _))) => {
            let host_ticks = u128::from(host_1.wrapping_sub(host_0)).max(1);
            let rate = u128::from(guest_1.wrapping_sub(guest_0)) * u128::from(host_khz) / host_ticks;
            u64::try_from(rate).unwrap_or(u64::MAX)
        }
        _ => 0,
    };
    Ok(TscRate { accepted, measured_khz })
}

/// Whether KVM_SET_TSC_KHZ makes a guest's TSC run at `khz`, true to 1 %.
///
/// # Errors
/// As [`tsc_rate`].
pub fn tsc_scales(host: &Host, supported: &[Leaf], host_khz: u32, khz: u32) -> Result<bool, Error> {
    let rate = tsc_rate(host, supported, host_khz, khz)?;
    Ok(rate.accepted && rate.measured_khz.abs_diff(u64::from(khz)) <= u64::from(khz) / 100)
}

/// Asks for a TSC `offset` ahead of the host's and measures whether the guest got it, true to a millisecond or so.
///
/// # Errors
/// If KVM fails in a way that is no answer.
pub fn tsc_offset(host: &Host, supported: &[Leaf], offset: u64) -> Result<Measured, Error> {
    let mut probe = Probe::new(host, &with_apic_features(supported), &TSC_LOOP, OURS)?;
    let accepted = probe.vcpu.set_tsc_offset(offset).is_ok();
    let took_effect = probe
        .read_guest_tsc()?
        .is_some_and(|(before, guest, after)| (before..=after).contains(&guest.wrapping_sub(offset)));
    Ok(Measured { accepted, took_effect })
}

/// Median cost of an exit to user space and back, in nanoseconds.
///
/// # Errors
/// If KVM fails.
pub fn exit_ns(host: &Host, supported: &[Leaf], host_khz: u32) -> Result<u64, Error> {
    let mut probe = Probe::new(host, &with_apic_features(supported), &TSC_LOOP, OURS)?;
    let mut costs = Vec::new();
    for _ in 0..200 {
        let before = read_tsc();
        probe.next()?;
        costs.push(read_tsc().saturating_sub(before));
    }
    Ok(to_ns(median(costs), host_khz))
}

/// What an instruction of supervisor code costs, in nanoseconds. Hundreds mean that it is emulated.
///
/// # Errors
/// If KVM fails.
pub fn instruction_ns(host: &Host, supported: &[Leaf], host_khz: u32) -> Result<f64, Error> {
    let mut probe = Probe::new(host, &with_apic_features(supported), &COUNT_LOOP, OURS)?;
    probe.next()?;
    let before = read_tsc();
    probe.next()?;
    let ns = to_ns(read_tsc().saturating_sub(before), host_khz);
    #[allow(clippy::cast_precision_loss, reason = "some milliseconds at most")]
    Ok(ns as f64 / COUNT_INSTRUCTIONS as f64)
}

/// Steps over NOPs.
///
/// # Errors
/// If KVM fails.
pub fn single_step(host: &Host, supported: &[Leaf], host_khz: u32) -> Result<Step, Error> {
    let mut probe = Probe::new(host, &with_apic_features(supported), &NOPS, OURS)?;
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
