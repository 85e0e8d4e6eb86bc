//! One vCPU's time page: registration by MSR, and publication.

use guest_abi::pvclock::{FLAG_GUEST_STOPPED, TIME_INFO_BYTES, TimeInfo};
use vmtime::PageClock;

use crate::memory::{GuestWrite, RegistrationFault, place, replace};

/// `MSR_KVM_SYSTEM_TIME` bit 0.
const ENABLE: u64 = 1;

/// One vCPU's `MSR_KVM_SYSTEM_TIME`. The old and the new number are two doors to this one register.
#[derive(Clone, Debug, Default)]
pub struct Registration {
    /// What the guest wrote last, and reads.
    msr: u64,
    /// The last version that went to guest memory. It counts on over another address, disabling and restores: a
    /// reader that was interrupted between its two looks at the version must not meet the same one on other contents.
    version: u32,
}

/// [`Registration`] in a snapshot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct RegistrationState {
    /// The MSR's value: guest physical address, bit 0 = enabled.
    pub msr: u64,
    /// The last version written to guest memory.
    pub version: u32,
}

impl Registration {
    /// WRMSR. With bit 0 set the rest is the address of a [`TimeInfo`], which the caller then publishes before the
    /// vCPU runs on; with bit 0 clear, the page is no longer written.
    ///
    /// # Errors
    /// [`RegistrationFault`] for an enabled address that is not a multiple of 4 or not wholly in RAM. Nothing has
    /// changed then.
    pub fn write_msr(&mut self, value: u64, mem: &impl GuestWrite) -> Result<(), RegistrationFault> {
        if let Some(addr) = enabled(value) {
            place::<TIME_INFO_BYTES>(addr, mem)?;
        }
        self.msr = value;
        Ok(())
    }

    /// INIT: no page any more, as with KVM (`kvmclock_reset`, Linux `arch/x86/kvm/x86.c`). The memory may be anything
    /// by now, and is not touched. The version counts on: a page that is registered later must not repeat one.
    pub fn reset(&mut self) {
        let Self { msr, version: _ } = self;
        *msr = 0;
    }

    /// RDMSR: the last value written, 0 before that.
    #[must_use]
    pub fn read_msr(&self) -> u64 {
        self.msr
    }

    /// Guest physical address of the page, if it is enabled.
    #[must_use]
    pub fn address(&self) -> Option<u64> {
        enabled(self.msr)
    }

    /// Makes `page` the guest's clock and returns the page's new version, or `None` if the guest wants no page.
    ///
    /// `flags` is [`guest_abi::pvclock::FLAG_TSC_STABLE`] or 0. `stopped` tells the guest that it was not running, so
    /// that it does not take the gap for a hang of its own; it stays set in the page until the guest clears it. Set
    /// it at resume, not at save (Firecracker's issue 5494).
    ///
    /// The vCPU must not be running: between reading the flags and writing them it could clear one. Other vCPUs may.
    ///
    /// # Errors
    /// [`RegistrationFault`] if the page is not in RAM any more.
    pub fn publish(
        &mut self,
        mem: &impl GuestWrite,
        page: &PageClock,
        flags: u8,
        stopped: bool,
    ) -> Result<Option<u32>, RegistrationFault> {
        let Some(addr) = self.address() else { return Ok(None) };
        let shown = TimeInfo::from_bytes(&place(addr, mem)?);
        let stopped = if stopped { FLAG_GUEST_STOPPED } else { shown.flags & FLAG_GUEST_STOPPED };
        let PageClock { tsc_timestamp, system_time, scale } = *page;
        let info = TimeInfo {
            version: 0, // `replace` writes its own
            pad0: 0,
            tsc_timestamp: tsc_timestamp.0,
            system_time: system_time.0,
            tsc_to_system_mul: scale.mul(),
            tsc_shift: scale.shift(),
            flags: flags | stopped,
            pad: [0; 2],
        }
        .to_bytes();
        let (_version, rest) = info.split_at(4);
        Ok(Some(replace(&mut self.version, addr, rest, mem)?))
    }

    /// What goes into a snapshot.
    #[must_use]
    pub fn state(&self) -> RegistrationState {
        let Self { msr, version } = *self;
        RegistrationState { msr, version }
    }

    /// The registration that a snapshot holds. Publish it before the vCPU runs.
    ///
    /// # Errors
    /// [`RegistrationFault`] if the guest could not have registered it.
    pub fn from_state(state: RegistrationState, mem: &impl GuestWrite) -> Result<Self, RegistrationFault> {
        let RegistrationState { msr, version } = state;
        let mut registration = Self { msr: 0, version };
        registration.write_msr(msr, mem)?;
        Ok(registration)
    }
}

/// The address in `value`, if bit 0 enables it. Bit 1 is part of the address, where it is an error.
fn enabled(value: u64) -> Option<u64> {
    (value & ENABLE != 0).then_some(value & !ENABLE)
}

#[cfg(test)]
mod tests {
    use guest_abi::pvclock::FLAG_TSC_STABLE;
    use proptest::prelude::*;
    use vmtime::{GuestTsc, Khz, Scale, VmTime};

    use super::*;
    use crate::{OutsideRam, recorder::Recorder};

    const RAM: usize = 4096;
    const ADDR: u64 = 0x100;

    fn page(n: u64) -> PageClock {
        let scale = Scale::from_khz(Khz::new(1_000_000 + n).unwrap());
        PageClock { tsc_timestamp: GuestTsc(n * 3), system_time: VmTime(n * 5), scale }
    }

    fn shown(mem: &Recorder) -> TimeInfo {
        TimeInfo::from_bytes(&place(ADDR, mem).unwrap())
    }

    fn registered(mem: &Recorder) -> Registration {
        let mut clock = Registration::default();
        clock.write_msr(ADDR | ENABLE, mem).unwrap();
        clock
    }

    #[test]
    fn the_guest_sees_the_page() {
        let mem = Recorder::new(RAM);
        let version = registered(&mem).publish(&mem, &page(7), FLAG_TSC_STABLE, false).unwrap();
        let info = shown(&mem);
        assert_eq!((version, info.version), (Some(2), 2));
        assert_eq!((info.tsc_timestamp, info.system_time, info.flags), (21, 35, FLAG_TSC_STABLE));
        assert_eq!((info.tsc_to_system_mul, info.tsc_shift), (page(7).scale.mul(), page(7).scale.shift()));
    }

    #[test]
    fn a_reader_at_any_point_sees_old_or_new() {
        let mem = Recorder::new(RAM);
        let mut clock = registered(&mem);
        for n in 1..20 {
            clock.publish(&mem, &page(n), 0, n % 3 == 0).unwrap();
        }
        mem.check_seqlock(ADDR, TIME_INFO_BYTES).unwrap();
    }

    #[test]
    fn stopped_stays_until_the_guest_clears_it() {
        let mem = Recorder::new(RAM);
        let mut clock = registered(&mem);
        clock.publish(&mem, &page(1), FLAG_TSC_STABLE, true).unwrap();
        clock.publish(&mem, &page(2), FLAG_TSC_STABLE, false).unwrap();
        assert_eq!(shown(&mem).flags, FLAG_TSC_STABLE | FLAG_GUEST_STOPPED);
        mem.write(ADDR + 29, &[FLAG_TSC_STABLE]).unwrap();
        clock.publish(&mem, &page(3), 0, false).unwrap();
        assert_eq!(shown(&mem).flags, 0);
    }

    #[test]
    fn bad_addresses_fault_and_change_nothing() {
        let mem = Recorder::new(RAM);
        let mut clock = registered(&mem);
        let end = RAM as u64;
        for addr in [end - 28, end, 0x8000_0000, !3] {
            let fault = clock.write_msr(addr | ENABLE, &mem).unwrap_err();
            assert_eq!(fault, RegistrationFault::OutsideRam(OutsideRam { addr, bytes: TIME_INFO_BYTES }));
        }
        assert_eq!(clock.write_msr(ADDR | 3, &mem), Err(RegistrationFault::Misaligned(ADDR | 2)));
        assert_eq!((clock.read_msr(), clock.address()), (ADDR | ENABLE, Some(ADDR)));
        clock.write_msr((end - 32) | ENABLE, &mem).unwrap();
    }

    #[test]
    fn disabled_writes_nothing() {
        let mem = Recorder::new(RAM);
        let mut clock = Registration::default();
        assert_eq!(clock.read_msr(), 0);
        for value in [0, ADDR, !ENABLE] {
            clock.write_msr(value, &mem).unwrap();
            assert_eq!(clock.publish(&mem, &page(1), 0, true), Ok(None));
            assert_eq!(clock.read_msr(), value);
        }
        assert_eq!(mem.stores(), 0);
    }

    /// INIT: what was the page is the guest's own memory, and the version goes on.
    #[test]
    fn after_a_reset_the_old_page_is_not_written() {
        let mem = Recorder::new(RAM);
        let mut clock = registered(&mem);
        assert_eq!(clock.publish(&mem, &page(1), 0, false), Ok(Some(2)));
        let stores = mem.stores();
        clock.reset();
        assert_eq!((clock.read_msr(), clock.address()), (0, None));
        let mut restored = Registration::from_state(clock.state(), &mem).unwrap();
        for clock in [&mut clock, &mut restored] {
            assert_eq!(clock.publish(&mem, &page(2), FLAG_TSC_STABLE, true), Ok(None));
        }
        assert_eq!(mem.stores(), stores);
        clock.write_msr(ADDR | ENABLE, &mem).unwrap();
        assert_eq!(clock.publish(&mem, &page(3), 0, false), Ok(Some(4)));
    }

    #[test]
    fn a_restore_refuses_an_address_outside_this_vms_ram() {
        let state = RegistrationState { msr: 0x10_0001, version: 8 };
        Registration::from_state(state, &Recorder::new(RAM)).unwrap_err();
    }

    #[test]
    fn an_interrupted_writer_leaves_an_odd_version_behind() {
        let mem = Recorder::new(RAM);
        let state = RegistrationState { msr: ADDR | ENABLE, version: 9 };
        let mut clock = Registration::from_state(state, &mem).unwrap();
        assert_eq!(clock.publish(&mem, &page(1), 0, false), Ok(Some(12)));
    }

    proptest! {
        #[test]
        fn versions_never_repeat_over_restores_and_registrations(
            steps in prop::collection::vec(0..5_u8, 1..50), start in 0..u32::MAX / 2,
        ) {
            let mem = Recorder::new(RAM);
            let state = RegistrationState { msr: ADDR | ENABLE, version: start };
            let mut clock = Registration::from_state(state, &mem).unwrap();
            let mut last = start;
            for step in steps {
                match step {
                    0 => {
                        clock = Registration::from_state(clock.state(), &mem).unwrap();
                    }
                    1 => clock.write_msr(0, &mem).unwrap(),
                    2 => clock.reset(),
                    _ => clock.write_msr(ADDR | ENABLE, &mem).unwrap(),
                }
                if let Some(version) = clock.publish(&mem, &page(9), 0, false).unwrap() {
                    prop_assert!(version > last && version % 2 == 0);
                    prop_assert_eq!(clock.state().version, version);
                    last = version;
                }
            }
            prop_assert_eq!(mem.check_seqlock(ADDR, TIME_INFO_BYTES), Ok(()));
        }
    }
}
