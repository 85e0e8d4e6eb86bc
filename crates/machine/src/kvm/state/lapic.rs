//! The state of a vCPU with KVM's LAPIC that [`super::VcpuState`] does not contain: the LAPIC's register page, its
//! timer, the MP state, and kvmclock's MSRs.

use guest_abi::{
    msr::{IA32_TSC_ADJUST, IA32_TSC_DEADLINE},
    pvclock::{MSR_SYSTEM_TIME_NEW, MSR_WALL_CLOCK_NEW},
};
use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED,
    kvm_lapic_state, kvm_mp_state,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};
use vmtime::TscAdjust;

use super::msrs;
use crate::kvm::{Error, Vcpu};

/// Size of the part of the page that holds registers.
const BYTES: usize = 1024;

/// A LAPIC's register page, as KVM_GET_LAPIC returns it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct LapicPage(#[serde(with = "hex")] [u8; BYTES]);

impl LapicPage {
    /// The register at byte `offset`; 0 outside the page.
    #[must_use]
    pub fn register(&self, offset: u32) -> u32 {
        let bytes =
            usize::try_from(offset).ok().and_then(|offset| self.0.get(offset..)).and_then(<[u8]>::first_chunk::<4>);
        bytes.map_or(0, |bytes| u32::from_le_bytes(*bytes))
    }

    /// Sets the register at byte `offset`; outside the page it does nothing.
    pub fn set_register(&mut self, offset: u32, value: u32) {
        let bytes = usize::try_from(offset).ok().and_then(|offset| self.0.get_mut(offset..));
        if let Some(bytes) = bytes.and_then(<[u8]>::first_chunk_mut::<4>) {
            *bytes = value.to_le_bytes();
        }
    }

    fn from_kvm(kvm: &kvm_lapic_state) -> Self {
        let kvm_lapic_state { regs } = kvm;
        Self(regs.map(i8::cast_unsigned))
    }

    fn to_kvm(&self) -> kvm_lapic_state {
        let Self(bytes) = self;
        kvm_lapic_state { regs: bytes.map(u8::cast_signed) }
    }
}

impl Default for LapicPage {
    /// All zeros, which is not a valid LAPIC state.
    fn default() -> Self {
        Self([0; BYTES])
    }
}

/// KVM's MP state: whether a vCPU executes instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MpState {
    /// It executes instructions.
    Runnable,
    /// It executed HLT.
    Halted,
    /// An application processor before INIT.
    Uninitialized,
    /// An application processor that waits for a SIPI.
    InitReceived,
}

impl MpState {
    fn from_kvm(kvm: kvm_mp_state) -> Result<Self, Error> {
        match kvm.mp_state {
            KVM_MP_STATE_RUNNABLE => Ok(Self::Runnable),
            KVM_MP_STATE_HALTED => Ok(Self::Halted),
            KVM_MP_STATE_UNINITIALIZED => Ok(Self::Uninitialized),
            KVM_MP_STATE_INIT_RECEIVED => Ok(Self::InitReceived),
            other => Err(Error::MpState(other)),
        }
    }

    fn to_kvm(self) -> kvm_mp_state {
        let mp_state = match self {
            Self::Runnable => KVM_MP_STATE_RUNNABLE,
            Self::Halted => KVM_MP_STATE_HALTED,
            Self::Uninitialized => KVM_MP_STATE_UNINITIALIZED,
            Self::InitReceived => KVM_MP_STATE_INIT_RECEIVED,
        };
        kvm_mp_state { mp_state }
    }
}

/// The state of KVM's LAPIC and of kvmclock's MSRs, at the instant of reading.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelLapicState {
    /// Registers.
    pub page: LapicPage,
    /// IA32_TSC_DEADLINE; 0 if none is armed.
    pub tsc_deadline: u64,
    /// IA32_TSC_ADJUST.
    pub tsc_adjust: TscAdjust,
    /// MSR_KVM_SYSTEM_TIME_NEW: the address of the guest's kvmclock page, and whether it is enabled.
    pub system_time: u64,
    /// MSR_KVM_WALL_CLOCK_NEW.
    pub wall_clock: u64,
}

impl Vcpu {
    /// Reads the vCPU's MP state. The ioctl processes pending INITs and SIPIs, which changes registers and LAPIC, so it
    /// must come before those are read.
    ///
    /// # Errors
    /// If the ioctl fails, or returns a state that is not in [`MpState`].
    pub fn mp_state(&self) -> Result<MpState, Error> {
        MpState::from_kvm(self.call().get_mp_state().map_err(Error::call("KVM_GET_MP_STATE"))?)
    }

    /// Sets the vCPU's MP state. It must come after all other state, because KVM_SET_SREGS may make a vCPU runnable.
    ///
    /// # Errors
    /// If KVM refuses.
    pub fn set_mp_state(&self, state: MpState) -> Result<(), Error> {
        self.fd.set_mp_state(state.to_kvm()).map_err(Error::call("KVM_SET_MP_STATE"))
    }

    /// Reads the state of KVM's LAPIC of this vCPU.
    ///
    /// # Errors
    /// If the ioctl fails.
    pub fn kernel_lapic(&self) -> Result<KernelLapicState, Error> {
        let fd: &VcpuFd = &self.fd;
        // KVM's timer can fire while the state is read. The deadline is read before the registers: if it fires in
        // between, it is saved both as armed and as a request in IRR, and the guest gets one interrupt. In the other
        // order neither would be saved, and the interrupt would be lost.
        let tsc_deadline = msrs::read(fd, IA32_TSC_DEADLINE)?;
        let page = LapicPage::from_kvm(&fd.get_lapic().map_err(Error::call("KVM_GET_LAPIC"))?);
        Ok(KernelLapicState {
            page,
            tsc_deadline,
            tsc_adjust: TscAdjust(msrs::read(fd, IA32_TSC_ADJUST)?),
            system_time: msrs::read(fd, MSR_SYSTEM_TIME_NEW)?,
            wall_clock: msrs::read(fd, MSR_WALL_CLOCK_NEW)?,
        })
    }

    /// MSR_KVM_SYSTEM_TIME_NEW: the address of the guest's kvmclock page, and whether it is enabled.
    ///
    /// # Errors
    /// If the ioctl fails.
    pub fn kvmclock_msr(&self) -> Result<u64, Error> {
        msrs::read(self.call(), MSR_SYSTEM_TIME_NEW)
    }

    /// Sets registers and deadline of KVM's LAPIC. The guest's TSC must be set before.
    ///
    /// # Errors
    /// If KVM refuses.
    pub fn set_lapic_timer(&self, page: &LapicPage, tsc_deadline: u64) -> Result<(), Error> {
        // LVTT before the deadline: KVM ignores a deadline unless LVTT is in deadline mode
        // (`kvm_set_lapic_tscdeadline_msr` in Linux arch/x86/kvm/lapic.c), and the timer would be lost.
        self.fd.set_lapic(&page.to_kvm()).map_err(Error::call("KVM_SET_LAPIC"))?;
        // 0 would disarm the timer, which KVM_SET_LAPIC has done.
        if tsc_deadline == 0 { Ok(()) } else { msrs::write(&self.fd, IA32_TSC_DEADLINE, tsc_deadline) }
    }

    /// Sets IA32_TSC_ADJUST. Written by the VMM, it does not change the TSC: [`Vcpu::set_tsc_offset`] does that.
    ///
    /// # Errors
    /// If KVM refuses.
    pub fn set_tsc_adjust(&self, adjust: TscAdjust) -> Result<(), Error> {
        msrs::write(&self.fd, IA32_TSC_ADJUST, adjust.0)
    }

    /// Registers the guest's kvmclock page and wall clock with KVM. KVM writes the wall clock at once, computed from VM
    /// time, so [`super::super::Vm::set_clock`] must be called before. It writes the page when the vCPU is entered.
    ///
    /// # Errors
    /// If KVM refuses.
    pub fn set_kvmclock(&self, system_time: u64, wall_clock: u64) -> Result<(), Error> {
        msrs::write(&self.fd, MSR_SYSTEM_TIME_NEW, system_time)?;
        // 0: the guest has not registered a wall clock.
        if wall_clock == 0 { Ok(()) } else { msrs::write(&self.fd, MSR_WALL_CLOCK_NEW, wall_clock) }
    }
}

#[cfg(test)]
mod tests {
    use guest_abi::lapic;

    use super::*;

    #[test]
    fn a_page_survives_a_file_and_has_one_size() {
        let end = u32::try_from(BYTES).unwrap();
        let mut page = LapicPage::default();
        page.set_register(lapic::TMCCT, 0x0102_0304);
        page.set_register(end - 2, 7);
        let text = serde_json::to_string(&page).unwrap();
        assert_eq!(serde_json::from_str::<LapicPage>(&text).unwrap(), page);
        assert_eq!((page.register(lapic::TMCCT), page.register(end), page.register(end - 4)), (0x0102_0304, 0, 0));
        assert_eq!(LapicPage::from_kvm(&page.to_kvm()), page);
        serde_json::from_str::<LapicPage>(&text.replacen("00", "", 1)).unwrap_err();
    }

    #[test]
    fn every_mp_state_comes_back() {
        for state in [MpState::Runnable, MpState::Halted, MpState::Uninitialized, MpState::InitReceived] {
            assert_eq!(MpState::from_kvm(state.to_kvm()).unwrap(), state);
        }
        MpState::from_kvm(kvm_mp_state { mp_state: 99 }).unwrap_err();
    }
}
