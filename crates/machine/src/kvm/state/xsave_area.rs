//! An XSAVE area in standard form, which has a vCPU's x87, SSE and extended registers.

use std::ops::Range;

use super::{Fpu, fpu};
use crate::{
    host::x87::X87,
    kvm::{Error, Vcpu},
};

/// Its size in bytes. Components that KVM enables on request only (AMX tiles) do not fit.
const BYTES: usize = 4096;
/// Size of its legacy region and header; components from bit 2 on are behind that.
pub const HEAD_BYTES: usize = 576;

/// The offset of the header, which begins with [XSTATE_BV](XsaveArea::in_use) (SDM vol. 1, "XSAVE Header").
pub const XSTATE_BV: usize = 512;
/// The offsets of the components' registers (SDM vol. 1, "Legacy Region of an XSAVE Area").
pub const X87_CONTROL: Range<usize> = 0..24;
/// As [`X87_CONTROL`].
pub const MXCSR: Range<usize> = 24..28;
/// As [`X87_CONTROL`].
pub const X87_REGISTERS: Range<usize> = 32..160;
/// As [`X87_CONTROL`].
pub const XMM: Range<usize> = 160..416;
/// Control word, status, tags, opcode and pointers after FINIT.
pub const X87_INITIAL: [u8; 24] = {
    let mut bytes = [0; 24];
    (bytes[0], bytes[1]) = (0x7f, 0x03);
    bytes
};
/// MXCSR after reset: all exceptions masked.
pub const MXCSR_INITIAL: u32 = 0x1f80;

/// XCR0's and XSTATE_BV's bits of components.
pub const X87_BIT: u64 = 1;
/// As [`X87_BIT`].
pub const SSE_BIT: u64 = 2;
/// As [`X87_BIT`].
pub const AVX_BIT: u64 = 4;
/// As [`X87_BIT`].
pub const AVX512_BITS: u64 = 7 << 5;

/// A vCPU's registers as an XSAVE area: standard form, all components present, initial ones marked unused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct XsaveArea(Vec<u8>);

impl XsaveArea {
    /// The area of a CPU after reset.
    #[must_use]
    pub fn initial() -> Self {
        let mut area = Self(vec![0; BYTES]);
        area.put(0, &X87_INITIAL);
        area.put(MXCSR.start, &MXCSR_INITIAL.to_le_bytes());
        area
    }

    /// Of bytes that KVM_GET_XSAVE returned, without trailing zeros or with them.
    #[must_use]
    pub fn from_bytes(mut bytes: Vec<u8>) -> Self {
        bytes.resize(BYTES, 0);
        fpu::mark_initial_unused(&mut bytes);
        let mut area = Self(bytes);
        // Without XSAVEC a CPU may have saved an MXCSR that it counts to no component in use.
        area.set_mxcsr(area.mxcsr());
        area
    }

    /// The whole area.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// The whole area, to be changed.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }

    /// The bytes in `range`; none beyond the area's end.
    #[must_use]
    pub fn get(&self, range: Range<usize>) -> Option<&[u8]> {
        self.0.get(range)
    }

    /// Writes `bytes` from offset `at` on, as far as there is room.
    pub fn put(&mut self, at: usize, bytes: &[u8]) {
        for (to, from) in self.0.iter_mut().skip(at).zip(bytes) {
            *to = *from;
        }
    }

    /// XSTATE_BV: a bit for each component that has not its initial value.
    #[must_use]
    pub fn in_use(&self) -> u64 {
        let mut bits = [0; 8];
        for (to, from) in bits.iter_mut().zip(self.0.iter().skip(XSTATE_BV)) {
            *to = *from;
        }
        u64::from_le_bytes(bits)
    }

    /// Sets XSTATE_BV. A component whose bit is clear gets its initial value in the vCPU, whatever the area has.
    pub fn set_in_use(&mut self, components: u64) {
        self.put(XSTATE_BV, &components.to_le_bytes());
    }

    /// MXCSR.
    #[must_use]
    pub fn mxcsr(&self) -> u32 {
        let mut bytes = [0; 4];
        for (to, from) in bytes.iter_mut().zip(self.0.iter().skip(MXCSR.start)) {
            *to = *from;
        }
        u32::from_le_bytes(bytes)
    }

    /// Sets MXCSR, which must have no reserved bit set. KVM takes it over only with SSE in use.
    pub fn set_mxcsr(&mut self, mxcsr: u32) {
        self.put(MXCSR.start, &mxcsr.to_le_bytes());
        if mxcsr != MXCSR_INITIAL {
            self.set_in_use(self.in_use() | SSE_BIT);
        }
    }

    /// The x87 registers.
    #[must_use]
    pub fn x87(&self) -> X87 {
        let at = |offset: usize| self.0.get(offset).copied().unwrap_or(0);
        let word = |offset: usize| u16::from_le_bytes([at(offset), at(offset + 1)]);
        let mut st = [[0; 16]; 8];
        for (to, offset) in st.as_flattened_mut().iter_mut().zip(X87_REGISTERS) {
            *to = at(offset);
        }
        X87 { fcw: word(0), fsw: word(2), tags: at(4), st }
    }

    /// Sets the x87 registers. Opcode and pointers of the last instruction become 0.
    pub fn set_x87(&mut self, registers: &X87) {
        let X87 { fcw, fsw, tags, st } = registers;
        let [[a, b], [c, d]] = [fcw, fsw].map(|word| word.to_le_bytes());
        let mut control = [0; X87_CONTROL.end];
        [control[0], control[1], control[2], control[3], control[4]] = [a, b, c, d, *tags];
        self.put(0, &control);
        self.put(X87_REGISTERS.start, st.as_flattened());
        self.set_in_use(self.in_use() | X87_BIT);
    }
}

impl Vcpu {
    /// The x87, SSE and extended registers.
    ///
    /// # Errors
    /// If the ioctl fails.
    pub fn xsave_area(&self) -> Result<XsaveArea, Error> {
        Ok(XsaveArea::from_bytes(Fpu::get(self.call(), false)?.xsave))
    }

    /// Sets the x87, SSE and extended registers.
    ///
    /// # Errors
    /// If the ioctl fails, or KVM refuses a value.
    pub fn set_xsave_area(&self, area: &XsaveArea) -> Result<(), Error> {
        Fpu { xcrs: Vec::new(), xsave: area.0.clone() }.set(self.call())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Catches: a register at another place than FXSAVE has it; x87 state or an MXCSR that KVM takes for unused.
    #[test]
    fn registers_are_where_fxsave_has_them() {
        let mut area = XsaveArea::initial();
        let mut registers = area.x87();
        assert_eq!((registers.fcw, registers.fsw, registers.tags, area.mxcsr()), (0x37f, 0, 0, 0x1f80));
        (registers.fsw, registers.tags, registers.st[7][9]) = (0x3800, 0x80, 0xbf);
        area.set_in_use(AVX_BIT);
        area.set_x87(&registers);
        assert_eq!(area.x87(), registers);
        assert_eq!((area.in_use(), area.0[3], area.0[4], area.0[32 + 7 * 16 + 9]), (5, 0x38, 0x80, 0xbf));
        area.set_mxcsr(0x1f80);
        assert_eq!(area.in_use(), 5);
        area.set_mxcsr(0x9fc0);
        assert_eq!((area.in_use(), area.mxcsr(), area.0[25]), (7, 0x9fc0, 0x9f));
        let mut without = area.bytes()[..600].to_vec();
        without[XSTATE_BV] = 0;
        let area = XsaveArea::from_bytes(without);
        assert_eq!((area.in_use(), area.bytes().len()), (2, BYTES));
    }
}
