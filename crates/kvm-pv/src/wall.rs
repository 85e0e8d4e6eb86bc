//! The wall clock: a structure that the guest asks for and the VMM fills once.

use guest_abi::pvclock::{WALL_CLOCK_BYTES, WallClock};

use crate::memory::{GuestWrite, RegistrationFault, place, replace};

/// The VM's `MSR_KVM_WALL_CLOCK`. The old and the new number are two doors to this one register, and all vCPUs share
/// it.
#[derive(Clone, Debug, Default)]
pub struct WallRegistration {
    /// What the guest wrote last, and reads.
    msr: u64,
}

/// [`WallRegistration`] in a snapshot. Nothing is to be done on restore: the guest asks again when it wants to know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct WallState {
    /// The MSR's value: guest physical address.
    pub msr: u64,
}

impl WallRegistration {
    /// WRMSR: fills the [`WallClock`] at guest physical address `value` with the wall-clock time of VM time 0,
    /// `wall_ns_at_vm_zero` nanoseconds after the Unix epoch. 0 is no address and does nothing.
    ///
    /// The version goes on from what is in memory, as in `kvm_write_wall_clock` (Linux `arch/x86/kvm/x86.c`): each
    /// write may name another address, so that the count in memory is the only one. Seconds are 32 bits wide and wrap
    /// in 2106, as KVM's do.
    ///
    /// # Errors
    /// [`RegistrationFault`] for an address that is not a multiple of 4 or a structure not wholly in RAM. Nothing has
    /// changed then.
    pub fn write_msr(
        &mut self,
        value: u64,
        wall_ns_at_vm_zero: u64,
        mem: &impl GuestWrite,
    ) -> Result<(), RegistrationFault> {
        const NS_PER_SEC: u64 = 1_000_000_000;
        if value != 0 {
            let [v0, v1, v2, v3, ..] = place::<WALL_CLOCK_BYTES>(value, mem)?;
            let mut version = u32::from_le_bytes([v0, v1, v2, v3]);
            let wall = WallClock {
                version: 0, // `replace` writes its own
                sec: low32(wall_ns_at_vm_zero / NS_PER_SEC),
                nsec: low32(wall_ns_at_vm_zero % NS_PER_SEC),
            }
            .to_bytes();
            let (_version, rest) = wall.split_at(4);
            replace(&mut version, value, rest, mem)?;
        }
        self.msr = value;
        Ok(())
    }

    /// RDMSR: the last value written, 0 before that.
    #[must_use]
    pub fn read_msr(&self) -> u64 {
        self.msr
    }

    /// What goes into a snapshot.
    #[must_use]
    pub fn state(&self) -> WallState {
        let Self { msr } = *self;
        WallState { msr }
    }

    /// The register that a snapshot holds. Its value is only ever read back, so any value will do.
    #[must_use]
    pub fn from_state(state: WallState) -> Self {
        let WallState { msr } = state;
        Self { msr }
    }
}

/// The lower half of `n`.
fn low32(n: u64) -> u32 {
    let [b0, b1, b2, b3, ..] = n.to_le_bytes();
    u32::from_le_bytes([b0, b1, b2, b3])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{OutsideRam, recorder::Recorder};

    fn words(mem: &Recorder, addr: u64) -> [u32; 3] {
        let bytes: [u8; WALL_CLOCK_BYTES] = place(addr, mem).unwrap();
        [0, 4, 8].map(|at| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()))
    }

    #[test]
    fn is_filled_once_per_write_under_an_odd_version() {
        let mem = Recorder::new(64);
        let mut wall = WallRegistration::default();
        wall.write_msr(16, 1_700_000_000_000_000_123, &mem).unwrap();
        assert_eq!(words(&mem, 16), [2, 1_700_000_000, 123]);
        wall.write_msr(16, 1_700_000_001_999_999_999, &mem).unwrap();
        assert_eq!(words(&mem, 16), [4, 1_700_000_001, 999_999_999]);
        mem.check_seqlock(16, WALL_CLOCK_BYTES).unwrap();
        assert_eq!(WallRegistration::from_state(wall.state()).read_msr(), 16);
    }

    #[test]
    fn goes_on_from_whatever_version_is_there() {
        let mem = Recorder::new(64);
        mem.write(0, &7_u32.to_le_bytes()).unwrap();
        mem.write(20, &u32::MAX.to_le_bytes()).unwrap();
        let mut wall = WallRegistration::default();
        wall.write_msr(20, 0, &mem).unwrap();
        assert_eq!(words(&mem, 20)[0], 2);
    }

    #[test]
    fn seconds_wrap_as_kvms_do() {
        assert_eq!(low32((1 << 32) + 5), 5);
    }

    #[test]
    fn bad_addresses_fault_and_zero_is_none() {
        let mem = Recorder::new(64);
        let mut wall = WallRegistration::default();
        for addr in [56, 64, !3] {
            let fault = RegistrationFault::OutsideRam(OutsideRam { addr, bytes: WALL_CLOCK_BYTES });
            assert_eq!(wall.write_msr(addr, 0, &mem), Err(fault));
        }
        for addr in [1, 2, 3, 18] {
            assert_eq!(wall.write_msr(addr, 0, &mem), Err(RegistrationFault::Misaligned(addr)));
        }
        assert_eq!(wall.write_msr(0, 5, &mem), Ok(()));
        assert_eq!((mem.stores(), wall.read_msr()), (0, 0));
    }
}
