//! FPU state, XCR0 and debug registers.

use kvm_bindings::{kvm_debugregs, kvm_xcr, kvm_xcrs, kvm_xsave};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use super::super::Error;

/// x87, SSE and extended state, with the register that says which of it is in use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fpu {
    /// Extended control registers (XCR0); none if the host's CPU has no XSAVE.
    pub xcrs: Vec<Xcr>,
    /// The XSAVE area in standard form, 4,096 bytes, without trailing zeros.
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

/// DR0–DR3, DR6, DR7.
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
    /// After reset and INIT (SDM vol. 3, table "IA-32 and Intel 64 Processor States Following Power-up, Reset, or INIT").
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
