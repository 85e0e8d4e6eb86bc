//! The code of an ELF file: its stretches, and where in them instructions are known to begin.

use std::ops::Range;

use object::{Object, ObjectSection, ObjectSegment, ObjectSymbol, SectionFlags, SegmentFlags, SymbolKind, elf};

/// Consecutive code.
pub(super) struct Stretch<'a> {
    /// Linear address of its first byte.
    pub(super) address: u64,
    pub(super) bytes: &'a [u8],
    /// It is a section: it holds code only, so that its first byte begins an instruction.
    pub(super) section: bool,
}

/// The kind of bytes that begin at an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Begins {
    /// Not known: a segment may hold data, too.
    Anything,
    /// Data between code.
    Data,
    /// An instruction.
    Instruction,
}

/// A part of a stretch, up to the next place at which code or data is known to begin.
pub(super) struct Piece<'a> {
    /// Where in the stretch it is.
    pub(super) start: usize,
    pub(super) bytes: &'a [u8],
    pub(super) begins: Begins,
}

impl<'a> Stretch<'a> {
    /// The linear address of the byte at `offset`.
    pub(super) fn address_of(&self, offset: usize) -> u64 {
        self.address.saturating_add(u64::try_from(offset).unwrap_or(u64::MAX))
    }

    /// Where in it the linear address is, if it is.
    pub(super) fn offset_of(&self, address: u64) -> Option<usize> {
        let offset = usize::try_from(address.checked_sub(self.address)?).ok()?;
        (offset < self.bytes.len()).then_some(offset)
    }

    /// Where code or data is known to begin, by offset, rising: at the `symbols`, at the file's `entry` point, at the
    /// addresses of `known` instructions, at its first byte.
    pub(super) fn beginnings(
        &self,
        symbols: &Symbols,
        entry: u64,
        known: impl Iterator<Item = u64>,
    ) -> Vec<(usize, Begins)> {
        let mut begins: Vec<_> = symbols.within(self).collect();
        let instruction = |address| Some((self.offset_of(address)?, Begins::Instruction));
        begins.extend(instruction(entry));
        begins.extend(known.filter_map(instruction));
        begins.push((0, if self.section { Begins::Instruction } else { Begins::Anything }));
        begins.sort_unstable();
        // Of several entries for one offset keep the most certain.
        begins.dedup_by(|after, before| {
            let same = after.0 == before.0;
            if same {
                before.1 = before.1.max(after.1);
            }
            same
        });
        begins
    }

    /// The linear addresses of its bytes.
    pub(super) fn range(&self) -> Range<u64> {
        self.address..self.address_of(self.bytes.len())
    }

    /// The parts between `beginnings`.
    pub(super) fn pieces(&self, beginnings: &[(usize, Begins)]) -> impl Iterator<Item = Piece<'a>> {
        let ends = beginnings.iter().skip(1).map(|(at, _)| *at).chain(std::iter::once(self.bytes.len()));
        beginnings.iter().zip(ends).filter_map(|((start, begins), end)| {
            Some(Piece { start: *start, bytes: self.bytes.get(*start..end)?, begins: *begins })
        })
    }
}

/// The symbols of a file at which code or data begins, by address.
pub(super) struct Symbols(Vec<(u64, Begins)>);

impl Symbols {
    pub(super) fn of(elf: &object::File<'_>) -> Self {
        let begins = elf.symbols().filter(ObjectSymbol::is_definition).filter_map(|symbol| {
            let begins = match symbol.kind() {
                SymbolKind::Text | SymbolKind::Label | SymbolKind::Unknown => Begins::Instruction,
                SymbolKind::Data | SymbolKind::Tls => Begins::Data,
                _ => return None,
            };
            Some((symbol.address(), begins))
        });
        let mut begins: Vec<_> = begins.collect();
        begins.sort_unstable();
        Self(begins)
    }

    /// Those in `stretch`, by offset.
    fn within(&self, stretch: &Stretch<'_>) -> impl Iterator<Item = (usize, Begins)> {
        let first = self.0.partition_point(|(address, _)| *address < stretch.address);
        let here = self.0.get(first..).unwrap_or_default().iter();
        here.map_while(|(address, begins)| Some((stretch.offset_of(*address)?, *begins)))
    }
}

/// The executable sections of a file, or its executable segments if it has no sections.
pub(super) fn stretches<'a>(elf: &object::File<'a>) -> Vec<Stretch<'a>> {
    let sections: Vec<_> = elf
        .sections()
        .filter(|section| matches!(section.flags(), SectionFlags::Elf { sh_flags, .. } if is_code(sh_flags)))
        .filter_map(|section| Some(Stretch { address: section.address(), bytes: section.data().ok()?, section: true }))
        .collect();
    if !sections.is_empty() {
        return sections;
    }
    elf.segments()
        .filter(|segment| matches!(segment.flags(), SegmentFlags::Elf { p_flags, .. } if p_flags.0 & elf::PF_X.0 != 0))
        .filter_map(|segment| Some(Stretch { address: segment.address(), bytes: segment.data().ok()?, section: false }))
        .collect()
}

fn is_code(flags: elf::SectionFlags) -> bool {
    let code = elf::SHF_ALLOC.0 | elf::SHF_EXECINSTR.0;
    flags.0 & code == code
}
