//! What the XSAVE instructions write to an area in memory and read from it, as data.

use crate::{
    host::xstate::{Component, mxcsr_mask},
    kvm::state::{
        AVX_BIT, HEAD_BYTES, MXCSR, MXCSR_INITIAL, SSE_BIT, X87_BIT, X87_CONTROL, X87_INITIAL, X87_REGISTERS, XMM,
        XSTATE_BV, XsaveArea,
    },
};

/// XCOMP_BV's bit for compacted form.
const IS_COMPACTED: u64 = 1 << 63;
/// What pointers of 32 bits leave of each of the two pointers' 8 bytes: segments, which read as 0, and reserved bytes.
const POINTER_HIGH: [usize; 8] = [12, 13, 14, 15, 20, 21, 22, 23];

/// How an instruction saves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// XSAVE.
    Standard,
    /// XSAVEOPT: standard form, without what is not in use.
    Optimised,
    /// XSAVEC and XSAVES: compacted form, without what is not in use.
    Compacted,
}

/// The header of an area in memory (SDM vol. 1, "XSAVE Header").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    xstate_bv: u64,
    xcomp_bv: u64,
    /// Bytes 23:16 of the header.
    third: u64,
    /// Bytes 63:24 have a bit set.
    has_more: bool,
}

impl Header {
    /// Its offset in the area.
    pub(super) const AT: usize = XSTATE_BV;
    /// As much of it as an instruction writes.
    pub(super) const BYTES: usize = 16;

    /// The header in `bytes`; what is missing is zero.
    pub(super) fn of(bytes: &[u8]) -> Self {
        let word = |number: usize| {
            let mut word = [0; 8];
            for (to, from) in word.iter_mut().zip(bytes.iter().skip(number * 8)) {
                *to = *from;
            }
            u64::from_le_bytes(word)
        };
        let has_more = bytes.iter().skip(24).any(|byte| *byte != 0);
        Self { xstate_bv: word(0), xcomp_bv: word(1), third: word(2), has_more }
    }

    /// Its first bytes after `form` has saved the components `chosen`, of which those `in_use` are.
    pub(super) fn saved(&self, form: Form, chosen: u64, in_use: u64) -> [u8; Self::BYTES] {
        let (xstate_bv, xcomp_bv) = match form {
            Form::Standard | Form::Optimised => (self.xstate_bv & !chosen | in_use & chosen, self.xcomp_bv),
            Form::Compacted => (in_use & chosen, chosen | IS_COMPACTED),
        };
        let mut bytes = [0; Self::BYTES];
        let words = xstate_bv.to_le_bytes().into_iter().chain(xcomp_bv.to_le_bytes());
        for (to, from) in bytes.iter_mut().zip(words) {
            *to = from;
        }
        bytes
    }

    pub(super) fn is_compacted(&self) -> bool {
        self.xcomp_bv & IS_COMPACTED != 0
    }

    /// Whether XRSTOR accepts it.
    pub(super) fn is_valid(&self, xcr0: u64) -> bool {
        let Self { xstate_bv, xcomp_bv, third, has_more } = *self;
        if self.is_compacted() {
            let present = xcomp_bv & !IS_COMPACTED;
            present & !xcr0 == 0 && xstate_bv & !present == 0 && third == 0 && !has_more
        } else {
            xstate_bv & !xcr0 == 0 && xcomp_bv == 0 && third == 0
        }
    }

    /// Where component `component` is in the area; none if the area has it not.
    fn offset(&self, component: &Component, all: &[Component]) -> Option<usize> {
        if self.is_compacted() { compacted(self.xcomp_bv, component, all) } else { Some(component.offset) }
    }

    /// The end of what a restore of `chosen` reads; none if it is unknown.
    pub(super) fn end(&self, chosen: u64, all: &[Component]) -> Option<usize> {
        let mut end = HEAD_BYTES;
        for component in known(chosen & self.xstate_bv, all)? {
            end = end.max(self.offset(component, all)? + component.size);
        }
        Some(end)
    }
}

/// The offset of `component` in compacted form, if XCOMP_BV has it (SDM vol. 1, "Extended Region of an XSAVE Area").
fn compacted(xcomp_bv: u64, component: &Component, all: &[Component]) -> Option<usize> {
    let mut at = HEAD_BYTES;
    for one in all.iter().filter(|one| has(xcomp_bv, one)) {
        if one.is_aligned {
            at = at.next_multiple_of(64);
        }
        if one == component {
            return Some(at);
        }
        at += one.size;
    }
    None
}

fn has(bits: u64, component: &Component) -> bool {
    bits >> component.number & 1 != 0
}

/// The components `chosen` from bit 2 on; none if one of them is not known here.
fn known(chosen: u64, all: &[Component]) -> Option<impl Iterator<Item = &Component>> {
    let found = || all.iter().filter(move |component| has(chosen, component));
    let bits = found().fold(X87_BIT | SSE_BIT, |bits, component| bits | 1 << component.number);
    (chosen & !bits == 0).then(found)
}

/// What an instruction writes to memory besides the header, by offset, in ascending order. None if it saves a
/// component that the area has not.
pub(super) fn saved(
    area: &XsaveArea,
    form: Form,
    wide: bool,
    chosen: u64,
    all: &[Component],
) -> Option<Vec<(usize, Vec<u8>)>> {
    let written = if form == Form::Standard { chosen } else { chosen & area.in_use() };
    let with_mxcsr = match form {
        Form::Standard | Form::Optimised => chosen & (SSE_BIT | AVX_BIT) != 0,
        Form::Compacted => written & SSE_BIT != 0,
    };
    let mut parts = Vec::new();
    if written & X87_BIT != 0 {
        let mut control = area.get(X87_CONTROL)?.to_vec();
        if !wide {
            clear_pointer_high(&mut control);
        }
        parts.push((X87_CONTROL.start, control));
    }
    if with_mxcsr {
        parts.push((MXCSR.start, [area.mxcsr().to_le_bytes(), mxcsr_mask().to_le_bytes()].concat()));
    }
    for (bit, range) in [(X87_BIT, X87_REGISTERS), (SSE_BIT, XMM)] {
        if written & bit != 0 {
            parts.push((range.start, area.get(range)?.to_vec()));
        }
    }
    for component in known(written, all)? {
        let at = if form == Form::Compacted { compacted(chosen, component, all)? } else { component.offset };
        parts.push((at, area.get(component.offset..component.offset + component.size)?.to_vec()));
    }
    parts.sort_by_key(|(at, _)| *at);
    Some(parts)
}

/// Sets the components `chosen` in `area` to what an area in memory has that begins with `head`, whose header is valid.
/// Returns what is left to copy: offset in `area`, offset in memory, size; in the order of their offsets in memory.
/// None if a component is not known here.
pub(super) fn restore(
    area: &mut XsaveArea,
    head: &[u8; HEAD_BYTES],
    wide: bool,
    chosen: u64,
    all: &[Component],
) -> Option<Vec<(usize, usize, usize)>> {
    let header = Header::of(head.get(Header::AT..)?);
    let read = chosen & header.xstate_bv;
    area.set_in_use(area.in_use() & !chosen | read);
    if chosen & X87_BIT != 0 {
        let mut control = X87_INITIAL;
        let mut registers = [0; 128];
        if read & X87_BIT != 0 {
            control.copy_from_slice(head.get(X87_CONTROL)?);
            registers.copy_from_slice(head.get(X87_REGISTERS)?);
        }
        if !wide {
            clear_pointer_high(&mut control);
        }
        area.put(X87_CONTROL.start, &control);
        area.put(X87_REGISTERS.start, &registers);
    }
    if chosen & SSE_BIT != 0 {
        let initial = [0; 256];
        area.put(XMM.start, if read & SSE_BIT != 0 { head.get(XMM)? } else { &initial });
    }
    let mut mxcsr = [0; 4];
    mxcsr.copy_from_slice(head.get(MXCSR)?);
    if header.is_compacted() {
        if chosen & SSE_BIT != 0 {
            area.set_mxcsr(if read & SSE_BIT != 0 { u32::from_le_bytes(mxcsr) } else { MXCSR_INITIAL });
        }
    } else if chosen & (SSE_BIT | AVX_BIT) != 0 {
        // Standard form has it whatever XSTATE_BV says.
        area.set_mxcsr(u32::from_le_bytes(mxcsr));
    }
    let mut left = Vec::new();
    for component in known(chosen, all)? {
        area.get(component.offset..component.offset + component.size)?;
        if has(read, component) {
            left.push((component.offset, header.offset(component, all)?, component.size));
        } else {
            area.put(component.offset, &vec![0; component.size]);
        }
    }
    left.sort_by_key(|(_, at, _)| *at);
    Some(left)
}

fn clear_pointer_high(control: &mut [u8]) {
    for at in POINTER_HIGH {
        if let Some(byte) = control.get_mut(at) {
            *byte = 0;
        }
    }
}
