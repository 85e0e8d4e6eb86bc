//! What the guest's clock loses or gains over a pause when KVM's kvmclock catches up as KVM's documentation has it
//! (`api.rst`, KVM_SET_CLOCK): one KVM_GET_CLOCK at the stop, one KVM_SET_CLOCK with its values and KVM_CLOCK_REALTIME
//! at the restart.

use std::{thread, time::Duration};

use anyhow::{Context, Result, bail};
use kvm_bindings::{KVM_CLOCK_REALTIME, kvm_clock_data};

use super::{image::PvhEntry, machine::FloorVm};

const CODE: u64 = 0x1000;
/// Where the guest registers its kvmclock page.
const PAGE: usize = 0xc000;
/// WRMSR of PAGE | 1 to MSR_KVM_SYSTEM_TIME_NEW, then OUT 0x80 in a loop.
const GUEST: [u8; 18] =
    [0xb9, 0x01, 0x4d, 0x56, 0x4b, 0xb8, 0x01, 0xc0, 0x00, 0x00, 0x31, 0xd2, 0x0f, 0x30, 0xe6, 0x80, 0xeb, 0xfc];

/// The steps of the guest's clock in so many pauses, in nanoseconds.
pub fn steps(pauses: usize, length: Duration) -> Result<Vec<i128>> {
    let mut machine = FloorVm::new(None, 1 << 20)?;
    let place = machine.ram().get_mut(0x1000..).and_then(|ram| ram.first_chunk_mut()).context("RAM")?;
    *place = GUEST;
    machine.enter(PvhEntry { rip: CODE, start_info: 0 })?;
    (0..pauses).map(|_| step(&mut machine, length)).collect()
}

fn step(machine: &mut FloorVm, length: Duration) -> Result<i128> {
    let before = page(machine)?;
    let stopped = machine.vm().get_clock().context("KVM_GET_CLOCK")?;
    if stopped.flags & KVM_CLOCK_REALTIME == 0 {
        bail!("KVM_GET_CLOCK does not tell CLOCK_REALTIME here");
    }
    thread::sleep(length);
    let (clock, realtime) = (stopped.clock, stopped.realtime);
    let restart = kvm_clock_data { clock, realtime, flags: KVM_CLOCK_REALTIME, ..Default::default() };
    machine.vm().set_clock(&restart).context("KVM_SET_CLOCK")?;
    let after = page(machine)?;
    Ok(after.ns(after.tsc) - before.ns(after.tsc))
}

/// The page's line of VM time, as `msr.rst` defines it.
struct Line {
    tsc: u64,
    ns: u64,
    mul: u32,
    shift: i8,
}

impl Line {
    fn ns(&self, tsc: u64) -> i128 {
        let delta = u128::from(tsc.saturating_sub(self.tsc));
        let places = u32::from(self.shift.unsigned_abs());
        let delta = if self.shift < 0 { delta >> places } else { delta << places };
        i128::try_from(u128::from(self.ns) + ((delta * u128::from(self.mul)) >> 32)).unwrap_or(i128::MAX)
    }
}

/// The page after KVM has entered the guest, which is when KVM writes it.
fn page(machine: &mut FloorVm) -> Result<Line> {
    for _ in 0..2 {
        machine.run_to_port()?;
    }
    let page: &[u8; 32] = machine.ram().get(PAGE..).and_then(|ram| ram.first_chunk()).context("RAM")?;
    let (_, tsc_on) = page.split_at(8);
    let (tsc, ns_on) = tsc_on.split_first_chunk().context("tsc_timestamp")?;
    let (ns, mul_on) = ns_on.split_first_chunk().context("system_time")?;
    let (mul, shift_on) = mul_on.split_first_chunk().context("tsc_to_system_mul")?;
    let (shift, _) = shift_on.split_first_chunk().context("tsc_shift")?;
    let mul = u32::from_le_bytes(*mul);
    if mul == 0 {
        bail!("KVM has written no kvmclock page");
    }
    let (tsc, ns) = (u64::from_le_bytes(*tsc), u64::from_le_bytes(*ns));
    Ok(Line { tsc, ns, mul, shift: i8::from_le_bytes(*shift) })
}
