//! Guest RAM, as `kvm_pv` writes the kvmclock page and the PV EOI word.

use std::sync::atomic::Ordering;

use kvm_pv::{GuestWrite, OutsideRam};
use vm_memory::{Bytes, GuestAddress};

use crate::mem::ram::GuestRam;

/// Guest RAM as the kvmclock publisher writes it.
pub struct Ram<'a>(pub &'a GuestRam);

impl GuestWrite for Ram<'_> {
    fn write(&self, addr: u64, bytes: &[u8]) -> Result<(), OutsideRam> {
        let outside = |_| OutsideRam { addr, bytes: bytes.len() };
        let address = GuestAddress(addr);
        match <[u8; 4]>::try_from(bytes) {
            // The page's version: a single atomic store, so that no reader sees a part of it.
            Ok(word) if addr.is_multiple_of(4) => {
                self.0.store(u32::from_le_bytes(word), address, Ordering::Release).map_err(outside)
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
