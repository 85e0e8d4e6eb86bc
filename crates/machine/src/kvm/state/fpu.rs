//! FPU state, XCR0 and debug registers.

use std::ops::Range;

use kvm_bindings::{kvm_debugregs, kvm_xcr, kvm_xcrs, kvm_xsave};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use crate::{
    host::x87::X87,
    kvm::{Error, Vcpu},
};

/// The offset of XSTATE_BV in an XSAVE area. It has a bit for each component in use (SDM vol. 1, "XSAVE Header").
pub(in crate::kvm) const XSTATE_BV: usize = 512;
/// The offsets of the components' registers (SDM vol. 1, "Legacy Region of an XSAVE Area" and "AVX State").
const FXSAVE_X87: Range<usize> = 0..24;
const MXCSR: Range<usize> = 24..28;
const X87_REGISTERS: Range<usize> = 32..160;
const XMM: Range<usize> = 160..416;
const YMM_HIGH: Range<usize> = 576..832;
/// Control word, status, tags, opcode and pointers after FINIT.
const X87_INITIAL: [u8; 24] = {
    let mut bytes = [0; 24];
    (bytes[0], bytes[1]) = (0x7f, 0x03);
    bytes
};
const MXCSR_INITIAL: [u8; 4] = 0x1f80_u32.to_le_bytes();

/// Marks x87, SSE and AVX state as unused if it has its initial value.
///
/// A processor may mark such state as used (SDM vol. 1, "Processor Tracking of XSAVE-Managed State"). Whether it does
/// depends on what else has run on it, so that two snapshots of the same guest state could differ.
fn mark_initial_unused(area: &mut [u8]) {
    let zero = |range: Range<usize>| area.get(range).is_some_and(|bytes| bytes.iter().all(|byte| *byte == 0));
    let is = |range: Range<usize>, value: &[u8]| area.get(range) == Some(value);
    let initial =
        [is(FXSAVE_X87, &X87_INITIAL) && zero(X87_REGISTERS), is(MXCSR, &MXCSR_INITIAL) && zero(XMM), zero(YMM_HIGH)];
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

    /// The x87 status word.
    ///
    /// # Errors
    /// If the ioctl fails.
    pub fn x87_status(&self) -> Result<u16, Error> {
        Ok(self.call().get_fpu().map_err(Error::call("KVM_GET_FPU"))?.fsw)
    }
}

impl Vcpu {
    /// The x87 registers.
    ///
    /// # Errors
    /// If the ioctl fails.
    pub fn x87(&self) -> Result<X87, Error> {
        Ok(x87_of(&Fpu::get(self.call(), false)?.xsave))
    }

    /// Sets the x87 registers. Opcode and pointers of the last instruction become 0.
    ///
    /// # Errors
    /// If the ioctl fails.
    pub fn set_x87(&self, registers: &X87) -> Result<(), Error> {
        let mut fpu = Fpu::get(self.call(), false)?;
        put_x87(&mut fpu.xsave, registers);
        fpu.set(self.call())
    }
}

fn x87_of(area: &[u8]) -> X87 {
    let at = |offset: usize| area.get(offset).copied().unwrap_or(0);
    let word = |offset: usize| u16::from_le_bytes([at(offset), at(offset + 1)]);
    let mut st = [[0; 16]; 8];
    for (to, offset) in st.as_flattened_mut().iter_mut().zip(X87_REGISTERS) {
        *to = at(offset);
    }
    X87 { fcw: word(0), fsw: word(2), tags: at(4), st }
}

fn put_x87(area: &mut Vec<u8>, registers: &X87) {
    let X87 { fcw, fsw, tags, st } = registers;
    area.resize(area.len().max(XSTATE_BV + 8), 0);
    let [[a, b], [c, d]] = [fcw, fsw].map(|word| word.to_le_bytes());
    let mut control = [0; FXSAVE_X87.end];
    [control[0], control[1], control[2], control[3], control[4]] = [a, b, c, d, *tags];
    for (offset, byte) in FXSAVE_X87.zip(control).chain(X87_REGISTERS.zip(st.as_flattened().iter().copied())) {
        if let Some(to) = area.get_mut(offset) {
            *to = byte;
        }
    }
    if let Some(used) = area.get_mut(XSTATE_BV) {
        *used |= 1;
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
        area[FXSAVE_X87].copy_from_slice(&X87_INITIAL);
        area[MXCSR].copy_from_slice(&MXCSR_INITIAL);
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

    // Catches: a register at another place than FXSAVE has it; x87 state that KVM takes for unused.
    #[test]
    fn x87_registers_are_where_fxsave_has_them() {
        let mut registers = x87_of(&area(0));
        assert_eq!((registers.fcw, registers.fsw, registers.tags), (0x37f, 0, 0));
        (registers.fsw, registers.tags, registers.st[7][9]) = (0x3800, 0x80, 0xbf);
        let mut set = area(4);
        put_x87(&mut set, &registers);
        assert_eq!(x87_of(&set), registers);
        assert_eq!((set[XSTATE_BV], set[3], set[4], set[32 + 7 * 16 + 9]), (5, 0x38, 0x80, 0xbf));
        let mut short = Vec::new();
        put_x87(&mut short, &registers);
        assert_eq!(x87_of(&short), registers);
    }

    // Catches: a register of the guest's that a restore sets to its initial value.
    #[test]
    fn what_has_another_value_stays_used() {
        let ranges = [(1, FXSAVE_X87), (1, X87_REGISTERS), (2, MXCSR), (2, XMM), (4, YMM_HIGH)];
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
