//! A kvmclock page in an array, as a VMM without KVM's own kvmclock publishes it, and as a guest reads it.
//!
//! The guest registers the page. The VMM publishes it, and publishes it again when the guest has moved to a TSC of half
//! the frequency. The guest's clock goes on from where it stood.

use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::Context;
use guest_abi::pvclock::{FLAG_TSC_STABLE, MSR_SYSTEM_TIME_NEW, TIME_INFO_BYTES, TimeInfo};
use kvm_pv::{GuestWrite, OutsideRam, Registration};
use vmtime::{GuestTsc, Khz, PageClock, Scale, VmTime};

const WORD_BYTES: usize = 4;

/// Guest memory of 4 KiB. It consists of words, because four aligned bytes have to be one store: a guest may be
/// reading.
struct Ram([AtomicU32; 1024]);

impl Ram {
    /// The words of an access.
    fn words(&self, addr: u64, bytes: usize) -> Result<&[AtomicU32], OutsideRam> {
        // Everything that is published here consists of aligned words.
        let first = usize::try_from(addr).ok().filter(|addr| addr.is_multiple_of(WORD_BYTES));
        first
            .map(|addr| addr / WORD_BYTES)
            .and_then(|first| self.0.get(first..first.checked_add(bytes.div_ceil(WORD_BYTES))?))
            .ok_or(OutsideRam { addr, bytes })
    }
}

impl GuestWrite for Ram {
    fn write(&self, addr: u64, bytes: &[u8]) -> Result<(), OutsideRam> {
        for (word, four) in self.words(addr, bytes.len())?.iter().zip(bytes.as_chunks().0) {
            word.store(u32::from_le_bytes(*four), Ordering::Relaxed);
        }
        Ok(())
    }

    fn read(&self, addr: u64, bytes: &mut [u8]) -> Result<(), OutsideRam> {
        for (word, four) in self.words(addr, bytes.len())?.iter().zip(bytes.as_chunks_mut().0) {
            *four = word.load(Ordering::Relaxed).to_le_bytes();
        }
        Ok(())
    }
}

/// What a guest does to know the time, `tsc` being what its RDTSC gives.
fn guest_clock(ram: &Ram, page: u64, tsc: u64) -> anyhow::Result<u64> {
    loop {
        let mut bytes = [0; TIME_INFO_BYTES];
        ram.read(page, &mut bytes)?;
        let info = TimeInfo::from_bytes(&bytes);
        ram.read(page, &mut bytes)?;
        // Odd: the VMM is writing. Another one: it has written in between.
        if info.version.is_multiple_of(2) && info.version == TimeInfo::from_bytes(&bytes).version {
            let scale = Scale::new(info.tsc_to_system_mul, info.tsc_shift)?;
            return Ok(info.system_time + scale.ns_as_guest(tsc - info.tsc_timestamp));
        }
    }
}

fn main() -> anyhow::Result<()> {
    let ram = Ram([const { AtomicU32::new(0) }; 1024]);
    let page = 0x100;
    let mut clock = Registration::default();

    println!("the guest writes {:#x} to MSR {MSR_SYSTEM_TIME_NEW:#x}", page | 1);
    clock.write_msr(page | 1, &ram)?; // an error would be #GP

    // One second of VM time at TSC 2·10⁹. All CPUs have the same page, so that the guest need not compare them.
    let scale = Scale::from_khz(Khz::new(2_000_000)?);
    let fast = PageClock { tsc_timestamp: GuestTsc(2_000_000_000), system_time: VmTime(1_000_000_000), scale };
    let version = clock.publish(&ram, &fast, FLAG_TSC_STABLE, false)?.context("there is a page")?;
    println!("version {version}: multiplier {:#x}, shift {}", scale.mul(), scale.shift());
    for tsc in [2_000_000_000, 2_000_002_000, 3_000_000_000] {
        println!("  TSC {tsc}: {} ns", guest_clock(&ram, page, tsc)?);
    }

    // Migration: the CPU stands still at TSC 3·10⁹, and goes on there at half the frequency. The guest is told that it
    // was stopped (GUEST_STOPPED), so that its watchdogs do not count the time.
    let stood_at = GuestTsc(3_000_000_000);
    let scale = Scale::from_khz(Khz::new(1_000_000)?);
    let slow = PageClock { tsc_timestamp: stood_at, system_time: fast.vm_time(stood_at), scale };
    let version = clock.publish(&ram, &slow, FLAG_TSC_STABLE, true)?.context("there is a page")?;
    println!("version {version}: multiplier {:#x}, shift {}", scale.mul(), scale.shift());
    for tsc in [3_000_000_000, 3_000_001_000, 4_000_000_000] {
        println!("  TSC {tsc}: {} ns", guest_clock(&ram, page, tsc)?);
    }
    Ok(())
}
