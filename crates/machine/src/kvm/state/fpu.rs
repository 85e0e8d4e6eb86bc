//! FPU state, XCR0 and debug registers.

use std::ops::Range;

use guest_abi::msr::IA32_XSS;
use kvm_bindings::{kvm_debugregs, kvm_xcr, kvm_xcrs, kvm_xsave};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use super::{
    msrs::read as read_msr,
    xsave_area::{MXCSR, MXCSR_INITIAL, X87_CONTROL, X87_INITIAL, X87_REGISTERS, XMM, XSTATE_BV},
};
use crate::kvm::{Error, Vcpu};

/// The offset of the AVX registers (SDM vol. 1, "AVX State").
const YMM_HIGH: Range<usize> = 576..832;

/// Marks x87, SSE and AVX state as unused if it has its initial value.
///
/// A processor may mark such state as used (SDM vol. 1, "Processor Tracking of XSAVE-Managed State"). Whether it does
/// depends on what else has run on it, so that two snapshots of the same guest state could differ.
pub(super) fn mark_initial_unused(area: &mut [u8]) {
    let zero = |range: Range<usize>| area.get(range).is_some_and(|bytes| bytes.iter().all(|byte| *byte == 0));
    let is = |range: Range<usize>, value: &[u8]| area.get(range) == Some(value);
    let initial = [
        is(X87_CONTROL, &X87_INITIAL) && zero(X87_REGISTERS),
        is(MXCSR, &MXCSR_INITIAL.to_le_bytes()) && zero(XMM),
        zero(YMM_HIGH),
    ];
    let unused = initial.iter().enumerate().fold(0, |bits, (bit, initial)| bits | u8::from(*initial) << bit);
    if let Some(used) = area.get_mut(XSTATE_BV) {
        *used &= !unused;
    }
}

/// x87, SSE and extended state, with the register that says which of it is in use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fpu {
    /// Extended control registers (XCR0); none if the host's CPU has no XSAVE.
    pub xcrs: Vec<Xcr>,
    /// The XSAVE area in standard form, 4,096 bytes, without trailing zeros. Components with their initial value are
    /// marked unused.
    #[serde(with = "hex")]
    pub xsave: Vec<u8>,
}

/// One extended control register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Xcr {
    /// Its number; 0 is XCR0.
    pub number: u32,
    /// Its value.
    pub value: u64,
}

impl Fpu {
    pub(super) fn get(fd: &VcpuFd, has_xcrs: bool) -> Result<Self, Error> {
        let xcrs = if has_xcrs { fd.get_xcrs().map_err(Error::call("KVM_GET_XCRS"))? } else { kvm_xcrs::default() };
        let count = usize::try_from(xcrs.nr_xcrs).unwrap_or(usize::MAX);
        let area = fd.get_xsave().map_err(Error::call("KVM_GET_XSAVE"))?;
        let mut xsave: Vec<u8> = area.region.iter().flat_map(|word| word.to_le_bytes()).collect();
        mark_initial_unused(&mut xsave);
        let used = xsave.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        xsave.truncate(used);
        Ok(Self { xcrs: xcrs.xcrs.iter().take(count).map(|x| Xcr { number: x.xcr, value: x.value }).collect(), xsave })
    }

    pub(super) fn set(&self, fd: &VcpuFd) -> Result<(), Error> {
        let Self { xcrs, xsave } = self;
        let mut kvm = kvm_xcrs::default();
        let mut count = 0;
        for (slot, xcr) in kvm.xcrs.iter_mut().zip(xcrs) {
            *slot = kvm_xcr { xcr: xcr.number, reserved: 0, value: xcr.value };
            count += 1;
        }
        kvm.nr_xcrs = count;
        if count != 0 {
            fd.set_xcrs(&kvm).map_err(Error::call("KVM_SET_XCRS"))?;
        }
        let mut area = kvm_xsave::default();
        for (word, bytes) in area.region.iter_mut().zip(xsave.chunks(4)) {
            let mut word_bytes = [0; 4];
            for (to, from) in word_bytes.iter_mut().zip(bytes) {
                *to = *from;
            }
            *word = u32::from_le_bytes(word_bytes);
        }
        // SAFETY: without dynamically enabled features KVM reads exactly `region`, 4,096 bytes.
        unsafe { fd.set_xsave(&area) }.map_err(Error::call("KVM_SET_XSAVE"))
    }
}

impl Vcpu {
    /// XCR0; none if the host's CPU has no XSAVE.
    ///
    /// # Errors
    /// If the ioctl fails.
    pub fn xcr0(&self) -> Result<Option<u64>, Error> {
        if !self.has_xcrs {
            return Ok(None);
        }
        let xcrs = self.call().get_xcrs().map_err(Error::call("KVM_GET_XCRS"))?;
        let count = usize::try_from(xcrs.nr_xcrs).unwrap_or(usize::MAX);
        Ok(xcrs.xcrs.iter().take(count).find(|xcr| xcr.xcr == 0).map(|xcr| xcr.value))
    }

    /// Sets XCR0. Returns whether KVM takes the value: it checks what XSETBV checks (`__kvm_set_xcr` in Linux
    /// arch/x86/kvm/x86.c).
    ///
    /// # Errors
    /// If the ioctl fails for another reason.
    pub fn set_xcr0(&self, value: u64) -> Result<bool, Error> {
        let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
        if let Some(xcr0) = xcrs.xcrs.first_mut() {
            xcr0.value = value;
        }
        match self.call().set_xcrs(&xcrs) {
            Ok(()) => Ok(true),
            Err(error) if error.errno() == libc::EINVAL => Ok(false),
            Err(error) => Err(Error::call("KVM_SET_XCRS")(error)),
        }
    }

    /// IA32_XSS.
    ///
    /// # Errors
    /// If the ioctl fails.
    pub fn xss(&self) -> Result<u64, Error> {
        read_msr(self.call(), IA32_XSS)
    }
}

/// The debug registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DebugRegisters {
    /// DR0–DR3.
    pub addresses: [u64; 4],
    /// DR6.
    pub dr6: u64,
    /// DR7.
    pub dr7: u64,
}

impl DebugRegisters {
    /// Their values after reset and INIT (SDM vol. 3, table "IA-32 and Intel 64 Processor States Following Power-up,
    /// Reset, or INIT").
    pub(super) const RESET: Self = Self { addresses: [0; 4], dr6: 0xffff_0ff0, dr7: 0x400 };

    pub(super) fn from_kvm(kvm: &kvm_debugregs) -> Self {
        let kvm_debugregs { db, dr6, dr7, flags: _, reserved: _ } = *kvm;
        Self { addresses: db, dr6, dr7 }
    }

    pub(super) fn to_kvm(self) -> kvm_debugregs {
        let Self { addresses, dr6, dr7 } = self;
        kvm_debugregs { db: addresses, dr6, dr7, flags: 0, reserved: [0; 9] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An area with initial values, whose XSTATE_BV is `used`.
    fn area(used: u8) -> Vec<u8> {
        let mut area = vec![0; 4096];
        area[X87_CONTROL].copy_from_slice(&X87_INITIAL);
        area[MXCSR].copy_from_slice(&MXCSR_INITIAL.to_le_bytes());
        area[XSTATE_BV] = used;
        area
    }

    // Catches: two snapshots of the same guest that differ, because another program had used the host's SSE registers.
    #[test]
    fn what_has_its_initial_value_is_unused() {
        for used in 0..8 {
            let mut area = area(used);
            mark_initial_unused(&mut area);
            assert_eq!(area, self::area(0), "{used}");
        }
    }

    // Catches: a register of the guest's that a restore sets to its initial value.
    #[test]
    fn what_has_another_value_stays_used() {
        let ranges = [(1, X87_CONTROL), (1, X87_REGISTERS), (2, MXCSR), (2, XMM), (4, YMM_HIGH)];
        for (bit, at) in ranges.into_iter().flat_map(|(bit, range)| range.map(move |at| (bit, at))) {
            let mut area = area(7);
            area[at] ^= 0x40;
            let before = area.clone();
            mark_initial_unused(&mut area);
            assert_eq!(area[XSTATE_BV], bit, "{at}");
            area[XSTATE_BV] = 7;
            assert_eq!(area, before);
        }
        // Unknown components stay as they are; a short area is no error.
        let mut more = area(0xf8);
        mark_initial_unused(&mut more);
        assert_eq!(more[XSTATE_BV], 0xf8);
        mark_initial_unused(&mut [0; 8]);
    }
}
