//! What the vCPUs of one machine share.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{
    clock::Clock,
    judge::Judge,
    trace::{Event, Trace},
};
use crate::{
    boot::sites::Sites,
    devices::Devices,
    pvclock::{GuestWrite, OutsideRam, WallRegistration},
    time::Now,
};

/// Locks, also after another thread panicked while it held the lock: the data is then as consistent as before.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Clock, devices, RAM, trap sites, judge and trace.
pub struct Platform {
    /// The machine's clock.
    pub clock: Mutex<Clock>,
    /// Devices.
    pub devices: Mutex<Devices>,
    /// The wall-clock registration.
    pub wall: Mutex<WallRegistration>,
    /// Guest RAM.
    pub memory: Arc<GuestMemoryMmap>,
    /// Sites that are patched.
    pub sites: Sites,
    /// What the guest and the host say of each tick.
    pub judge: Mutex<Judge>,
    /// The trace.
    pub trace: Trace,
    /// WRMSR IA32_TSC_DEADLINE outside a trap site has no effect: see [`super::EmulatedHost`].
    pub(super) swallow_deadline: bool,
    /// Unknown MSRs that were told of once.
    pub(super) told: Mutex<BTreeSet<u32>>,
}

impl Platform {
    /// Traces an event at `now`.
    pub fn event(&self, cpu: u32, now: Now, event: &Event<'_>) {
        if self.trace.is_on() {
            let host = lock(&self.clock).host_tsc();
            self.trace.event(cpu, now, host, event);
        }
    }

    /// Logs, once per MSR, that a guest touched one that is not there.
    pub(super) fn unknown_msr(&self, index: u32, access: &str) {
        let mut told = lock(&self.told);
        // A guest could try all four billion.
        if told.len() < 64 && told.insert(index) {
            log::warn!("the guest's {access} of MSR {index:#x}, which is not there, gets a #GP");
        }
    }
}

/// Guest RAM as the kvmclock publisher writes it.
pub struct Ram<'a>(pub &'a GuestMemoryMmap);

impl GuestWrite for Ram<'_> {
    fn write(&self, addr: u64, bytes: &[u8]) -> Result<(), OutsideRam> {
        let outside = |_| OutsideRam { addr, bytes: bytes.len() };
        let address = GuestAddress(addr);
        match <[u8; 4]>::try_from(bytes) {
            // A version: one store that no reader sees half of.
            Ok(word) if addr.is_multiple_of(4) => {
                self.0.store(u32::from_le_bytes(word), address, std::sync::atomic::Ordering::Release).map_err(outside)
            }
            _ if !vm_memory::GuestMemoryBackend::check_range(self.0, address, bytes.len()) => {
                Err(OutsideRam { addr, bytes: bytes.len() })
            }
            _ => self.0.write_slice(bytes, address).map_err(outside),
        }
    }

    fn read(&self, addr: u64, bytes: &mut [u8]) -> Result<(), OutsideRam> {
        let length = bytes.len();
        self.0.read_slice(bytes, GuestAddress(addr)).map_err(|_| OutsideRam { addr, bytes: length })
    }
}
