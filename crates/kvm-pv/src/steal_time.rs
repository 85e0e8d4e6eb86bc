//! Steal time: an area of the guest's to which the host adds the time that a vCPU did not run.
//!
//! Source: Linux `Documentation/virt/kvm/x86/msr.rst`, MSR_KVM_STEAL_TIME; `record_steal_time` in `arch/x86/kvm/x86.c`.
//! KVM counts how long a vCPU's thread waited for a CPU. What is counted here is the caller's affair.

use core::sync::atomic::{Ordering, fence};

use guest_abi::steal_time::{AREA_BYTES, ENABLE, RESERVED, STEAL, VERSION};

use crate::memory::{GuestWrite, RegistrationFault, place};

/// One vCPU's MSR_KVM_STEAL_TIME. The sum and its version are in guest memory only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StealTime {
    /// What the guest wrote last, and reads.
    msr: u64,
}

/// [`StealTime`] in a snapshot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct StealTimeState {
    /// The MSR's value: guest physical address of the area, bit 0 = enabled.
    pub msr: u64,
}

impl StealTime {
    /// RDMSR: the last value written, 0 before that.
    #[must_use]
    pub const fn read_msr(&self) -> u64 {
        self.msr
    }

    /// Guest physical address of the area, if there is one.
    #[must_use]
    pub fn address(&self) -> Option<u64> {
        (self.msr & ENABLE != 0).then_some(self.msr & !ENABLE)
    }

    /// WRMSR. The area is then written once, as KVM does, with the sum that is in it.
    ///
    /// # Errors
    /// [`RegistrationFault`] for a reserved bit (bits 1 to 5, so that the area is aligned to its size), or an enabled
    /// address that is not in RAM: #GP. Nothing has changed then.
    pub fn write_msr(&mut self, value: u64, mem: &impl GuestWrite) -> Result<(), RegistrationFault> {
        let wanted = Self::checked(value, mem)?;
        wanted.add(0, mem)?;
        *self = wanted;
        Ok(())
    }

    /// Adds `ns` nanoseconds to the guest's sum, and returns the new one; none if there is no area. The sum wraps, as
    /// KVM's does. The vCPU must not be running; others may, and may be reading.
    ///
    /// # Errors
    /// [`RegistrationFault`] if the area is not in RAM any more.
    pub fn add(&self, ns: u64, mem: &impl GuestWrite) -> Result<Option<u64>, RegistrationFault> {
        let Some(area) = self.address() else { return Ok(None) };
        let bytes: [u8; AREA_BYTES] = place(area, mem)?;
        let (mut steal, mut version) = ([0; 8], [0; 4]);
        // `place` has read as many bytes as the area has.
        steal.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
        version.iter_mut().zip(bytes.into_iter().skip(steal.len())).for_each(|(to, from)| *to = from);
        let sum = u64::from_le_bytes(steal).wrapping_add(ns);
        // From an even version the next odd one; from an odd one, which a fresh area may have, that after it.
        let odd = u32::from_le_bytes(version).wrapping_add(1) | 1;
        mem.write(area.wrapping_add(VERSION), &odd.to_le_bytes())?;
        fence(Ordering::Release);
        mem.write(area.wrapping_add(STEAL), &sum.to_le_bytes())?;
        fence(Ordering::Release);
        mem.write(area.wrapping_add(VERSION), &odd.wrapping_add(1).to_le_bytes())?;
        Ok(Some(sum))
    }

    /// INIT: no area any more. The memory may be anything by now, and is not touched.
    pub fn reset(&mut self) {
        *self = Self::default();
    }

    /// What goes into a snapshot.
    #[must_use]
    pub const fn state(&self) -> StealTimeState {
        let Self { msr } = *self;
        StealTimeState { msr }
    }

    /// What a snapshot holds. The area is not touched: its sum and version are in the snapshot's memory.
    ///
    /// # Errors
    /// [`RegistrationFault`] if the guest could not have registered it.
    pub fn from_state(state: StealTimeState, mem: &impl GuestWrite) -> Result<Self, RegistrationFault> {
        let StealTimeState { msr } = state;
        Self::checked(msr, mem)
    }

    fn checked(msr: u64, mem: &impl GuestWrite) -> Result<Self, RegistrationFault> {
        if msr & RESERVED != 0 {
            return Err(RegistrationFault::Misaligned(msr & !ENABLE));
        }
        let wanted = Self { msr };
        if let Some(area) = wanted.address() {
            place::<AREA_BYTES>(area, mem)?;
        }
        Ok(wanted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{OutsideRam, recorder::Recorder};

    const AREA: u64 = 128;

    fn sum(mem: &Recorder) -> (u64, u32) {
        let (mut steal, mut version) = ([0; 8], [0; 4]);
        mem.read(AREA, &mut steal).unwrap();
        mem.read(AREA + 8, &mut version).unwrap();
        (u64::from_le_bytes(steal), u32::from_le_bytes(version))
    }

    fn registered(mem: &Recorder) -> StealTime {
        let mut steal = StealTime::default();
        steal.write_msr(AREA | 1, mem).unwrap();
        steal
    }

    // Catches: a sum that is replaced instead of added to, and contents that change under an even version.
    #[test]
    fn adds_to_the_sum_under_an_odd_version() {
        let mem = Recorder::new(512);
        let steal = registered(&mem);
        assert_eq!(sum(&mem), (0, 2));
        assert_eq!(steal.add(5, &mem), Ok(Some(5)));
        assert_eq!(steal.add(3_000_000_000, &mem), Ok(Some(3_000_000_005)));
        assert_eq!(sum(&mem), (3_000_000_005, 6));
        // Each write: an odd version, the sum, the version after it.
        let stores = mem.stores_since_start();
        for (n, update) in stores.chunks(3).enumerate() {
            let [(at, odd), (steal_at, _), (again, even)] = update else { panic!("{update:?}") };
            let version = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().unwrap());
            let n = u32::try_from(n).unwrap();
            assert_eq!((*at, *steal_at, *again), (AREA + 8, AREA, AREA + 8));
            assert_eq!((version(odd), version(even)), (2 * n + 1, 2 * n + 2));
        }
    }

    // Catches: a version that goes back where the guest's memory begins with an odd one, or wraps to an odd one.
    #[test]
    fn goes_on_from_whatever_is_there() {
        for (found, then) in [(7_u32, 10), (u32::MAX, 2), (u32::MAX - 1, 0), (4, 6)] {
            let mem = Recorder::new(512);
            mem.write(AREA + 8, &found.to_le_bytes()).unwrap();
            mem.write(AREA, &u64::MAX.to_le_bytes()).unwrap();
            let state = StealTimeState { msr: AREA | 1 };
            let steal = StealTime::from_state(state, &mem).unwrap();
            assert_eq!(steal.state(), state);
            assert_eq!(steal.add(2, &mem), Ok(Some(1)));
            assert_eq!(sum(&mem), (1, then), "{found}");
        }
    }

    // Catches: an area that KVM would refuse, or one that a disabled MSR or an INIT leaves in use.
    #[test]
    fn bad_addresses_fault_and_disabled_ones_are_left_alone() {
        let mem = Recorder::new(512);
        let mut steal = registered(&mem);
        for bad in [AREA | 2 | 1, AREA + 32 + 1, AREA | 4] {
            assert_eq!(steal.write_msr(bad, &mem), Err(RegistrationFault::Misaligned(bad & !1)));
        }
        for outside in [512, 1 << 40, !63] {
            let fault = RegistrationFault::OutsideRam(OutsideRam { addr: outside, bytes: AREA_BYTES });
            assert_eq!(steal.write_msr(outside | 1, &mem), Err(fault));
            let state = StealTimeState { msr: outside | 1 };
            assert_eq!(StealTime::from_state(state, &mem), Err(fault));
        }
        assert_eq!(steal.read_msr(), AREA | 1, "a fault changes nothing");
        steal.write_msr(AREA, &mem).unwrap();
        assert_eq!((steal.address(), steal.add(9, &mem)), (None, Ok(None)));
        let mut steal = registered(&mem);
        steal.reset();
        assert_eq!((steal.read_msr(), steal.add(9, &mem)), (0, Ok(None)));
        assert_eq!(sum(&mem).0, 0);
    }
}
