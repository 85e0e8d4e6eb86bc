//! Results and flags of integer instructions, by the SDM's descriptions (vol. 2, "Operation" and "Flags Affected").
//!
//! Flags that the SDM leaves undefined keep their values.

/// RFLAGS.CF.
pub(super) const CF: u64 = 1;
/// RFLAGS.PF.
pub(super) const PF: u64 = 1 << 2;
/// RFLAGS.AF.
pub(super) const AF: u64 = 1 << 4;
/// RFLAGS.ZF.
pub(super) const ZF: u64 = 1 << 6;
/// RFLAGS.SF.
pub(super) const SF: u64 = 1 << 7;
/// RFLAGS.OF.
pub(super) const OF: u64 = 1 << 11;

/// The size of the operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Width {
    /// 16 bits.
    W16,
    /// 32 bits.
    W32,
    /// 64 bits.
    W64,
}

impl Width {
    /// That of operands of `bytes`.
    pub(super) fn of_bytes(bytes: usize) -> Option<Self> {
        match bytes {
            2 => Some(Self::W16),
            4 => Some(Self::W32),
            8 => Some(Self::W64),
            _ => None,
        }
    }

    pub(super) fn bytes(self) -> usize {
        match self {
            Self::W16 => 2,
            Self::W32 => 4,
            Self::W64 => 8,
        }
    }

    fn bits(self) -> u32 {
        match self {
            Self::W16 => 16,
            Self::W32 => 32,
            Self::W64 => 64,
        }
    }

    /// All bits of an operand.
    pub(super) fn mask(self) -> u64 {
        u64::MAX >> (64 - self.bits())
    }

    /// How far a shift goes whose count is `count`.
    fn shift(self, count: u64) -> u32 {
        u32::try_from(count & u64::from(self.bits() - 1)).unwrap_or(0)
    }

    fn sign(self, value: u64) -> bool {
        value >> (self.bits() - 1) & 1 != 0
    }
}

/// A result, and the flags that it defines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Flagged {
    /// The destination.
    pub value: u64,
    /// The flags that are written.
    pub written: u64,
    /// Those of them that are set.
    pub set: u64,
}

impl Flagged {
    /// `value` with ZF, SF and CF; OF is cleared.
    fn logic(value: u64, width: Width, carry: bool) -> Self {
        let value = value & width.mask();
        let flags = [(ZF, value == 0), (SF, width.sign(value)), (CF, carry)];
        let set = flags.into_iter().filter(|(_, set)| *set).fold(0, |flags, (flag, _)| flags | flag);
        Self { value, written: ZF | SF | CF | OF, set }
    }
}

/// POPCNT.
pub(super) fn popcnt(source: u64) -> Flagged {
    let set = if source == 0 { ZF } else { 0 };
    Flagged { value: u64::from(source.count_ones()), written: OF | SF | ZF | AF | CF | PF, set }
}

/// ANDN.
pub(super) fn andn(inverted: u64, other: u64, width: Width) -> Flagged {
    Flagged::logic(!inverted & other, width, false)
}

/// BEXTR. Bits 7:0 of `control` are the first bit, bits 15:8 the number of bits.
pub(super) fn bextr(source: u64, control: u64, width: Width) -> Flagged {
    let [start, length, ..] = control.to_le_bytes().map(u32::from);
    let from = (source & width.mask()).checked_shr(start).unwrap_or(0);
    let kept = 1u64.checked_shl(length).map_or(u64::MAX, |end| end - 1);
    // SF is undefined.
    let Flagged { value, written, set } = Flagged::logic(from & kept, width, false);
    Flagged { value, written: written & !SF, set: set & !SF }
}

/// BLSI: the lowest set bit.
pub(super) fn blsi(source: u64, width: Width) -> Flagged {
    Flagged::logic(source & source.wrapping_neg(), width, source != 0)
}

/// BLSMSK: all bits up to the lowest set one.
pub(super) fn blsmsk(source: u64, width: Width) -> Flagged {
    // The result is never zero.
    Flagged::logic(source ^ source.wrapping_sub(1), width, source == 0)
}

/// BLSR: without the lowest set bit.
pub(super) fn blsr(source: u64, width: Width) -> Flagged {
    Flagged::logic(source & source.wrapping_sub(1), width, source == 0)
}

/// BZHI: the bits below the one that bits 7:0 of `index` name.
pub(super) fn bzhi(source: u64, index: u64, width: Width) -> Flagged {
    let index = u32::from(index.to_le_bytes()[0]);
    let kept = 1u64.checked_shl(index).map_or(u64::MAX, |end| end - 1);
    Flagged::logic(source & kept, width, index >= width.bits())
}

/// ADCX and ADOX: `a` + `b` + `carry`, and whether that carries. `carries` is the flag that it is kept in.
pub(super) fn add(a: u64, b: u64, carry: bool, width: Width, carries: u64) -> Flagged {
    let sum = u128::from(a) + u128::from(b) + u128::from(carry);
    let [value, _] = halves(sum, Width::W64);
    let carried = sum >> width.bits() != 0;
    Flagged { value: value & width.mask(), written: carries, set: if carried { carries } else { 0 } }
}

/// MULX: the product's high half, and its low half.
pub(super) fn mulx(a: u64, b: u64, width: Width) -> (u64, u64) {
    let [low, high] = halves(u128::from(a) * u128::from(b), width);
    (high, low)
}

/// The lowest `width` bits, and the next ones.
fn halves(value: u128, width: Width) -> [u64; 2] {
    [value, value >> width.bits()].map(|half| u64::try_from(half & u128::from(width.mask())).unwrap_or(0))
}

/// PDEP: the low bits of `source`, each at the place of a set bit of `mask`.
pub(super) fn pdep(source: u64, mask: u64) -> u64 {
    places(mask).enumerate().filter(|(bit, _)| source >> bit & 1 != 0).fold(0, |value, (_, place)| value | place)
}

/// PEXT: the bits of `source` at the places of the set bits of `mask`, as low bits.
pub(super) fn pext(source: u64, mask: u64) -> u64 {
    places(mask).enumerate().filter(|(_, place)| source & place != 0).fold(0, |value, (bit, _)| value | 1 << bit)
}

/// The set bits of `mask`, from the lowest on.
fn places(mask: u64) -> impl Iterator<Item = u64> {
    (0..64).map(|bit| 1 << bit).filter(move |place| mask & place != 0)
}

/// RORX.
pub(super) fn rorx(source: u64, count: u64, width: Width) -> u64 {
    let by = width.shift(count);
    match width {
        Width::W64 => source.rotate_right(by),
        // Twice, so that what leaves on the right is on the left.
        _ => (source | source << width.bits()) >> by & width.mask(),
    }
}

/// SARX.
pub(super) fn sarx(source: u64, count: u64, width: Width) -> u64 {
    let unused = 64 - width.bits();
    let signed = (source << unused).cast_signed() >> unused;
    (signed >> width.shift(count)).cast_unsigned() & width.mask()
}

/// SHLX.
pub(super) fn shlx(source: u64, count: u64, width: Width) -> u64 {
    source << width.shift(count) & width.mask()
}

/// SHRX.
pub(super) fn shrx(source: u64, count: u64, width: Width) -> u64 {
    (source & width.mask()) >> width.shift(count)
}
