//! Instructions that read the TSC and are not in the guest's trap-site table.
//!
//! Where the VMM emulates RDTSC at trap sites, an RDTSC that is missing from the table returns the host's TSC. The
//! guest's results are then wrong without any error. So the image's code is searched for such instructions.
//!
//! The two or three bytes of such an instruction can also be part of another one: an immediate value, a displacement.
//! To find out, the code is decoded from the last address before them at which an instruction is known to begin: a
//! symbol, a trap site, the entry point, the beginning of a section. After bytes that are no instruction the decoder
//! may be out of step, and the result is unsure until the next target of a branch.

use std::{collections::BTreeSet, fmt};

use iced_x86::{Code, Decoder, DecoderOptions, Instruction, Mnemonic};
use object::Object;
use serde::{Deserialize, Serialize};

use super::{
    code::{Begins, Piece, Stretch, Symbols, stretches},
    sites::Sites,
};

/// How many instructions are listed; further ones are only counted.
const NAMED: usize = 16;
/// How many bytes of code are decoded at most. Guests that list trap sites are small; the limit bounds the time that a
/// hostile file can cost.
const DECODED_MAX: usize = 8 << 20;

/// The instructions that were found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Unlisted {
    /// The first of them, by address within each section.
    first: Vec<TscRead>,
    /// How many more there are.
    more: u64,
}

/// [`Unlisted`] as a snapshot holds it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UnlistedState {
    /// The first of them.
    pub first: Vec<TscRead>,
    /// How many more there are.
    pub more: u64,
}

/// One instruction that reads the TSC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TscRead {
    /// Its linear address.
    pub address: u64,
    /// RDTSCP, not RDTSC.
    pub rdtscp: bool,
    /// It is certainly an instruction; otherwise the bytes may be data or part of another one.
    pub sure: bool,
}

impl Unlisted {
    /// The state to save.
    #[must_use]
    pub fn state(&self) -> UnlistedState {
        let Self { first, more } = self;
        UnlistedState { first: first.clone(), more: *more }
    }

    /// What was saved.
    #[must_use]
    pub fn from_state(state: &UnlistedState) -> Self {
        let UnlistedState { first, more } = state;
        Self { first: first.clone(), more: *more }
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.first.is_empty() && self.more == 0
    }

    /// Whether one of them is an instruction for sure.
    #[must_use]
    pub fn any_is_sure(&self) -> bool {
        self.first.iter().any(|read| read.sure)
    }

    fn push(&mut self, read: TscRead) {
        if self.first.len() < NAMED {
            self.first.push(read);
        } else {
            self.more = self.more.saturating_add(1);
        }
    }

    /// Searches the executable sections of an ELF file, or its executable segments if it has no sections.
    #[must_use]
    pub fn scan(file: &[u8], sites: &Sites) -> Self {
        let mut found = Self::default();
        let Ok(elf) = object::File::parse(file) else { return found };
        let mut left = DECODED_MAX;
        let symbols = Symbols::of(&elf);
        for stretch in stretches(&elf) {
            let listed = |at: usize| sites.at(stretch.address_of(at)).is_some();
            // Usually every suspect is listed. Then nothing is decoded, so that guests start in milliseconds.
            if suspects(stretch.bytes).all(|(at, _)| listed(at)) {
                continue;
            }
            Search::new(&elf, &symbols, &stretch, sites).search(&mut left, &mut found);
        }
        found
    }
}

impl fmt::Display for Unlisted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { first, more } = self;
        for (index, TscRead { address, rdtscp, sure }) in first.iter().enumerate() {
            let (comma, name) = (if index == 0 { "" } else { ", " }, if *rdtscp { "RDTSCP" } else { "RDTSC" });
            // If none is sure, the caller's sentence says so.
            let perhaps = if self.any_is_sure() && !sure { " (or data)" } else { "" };
            write!(f, "{comma}{name} at {address:#x}{perhaps}")?;
        }
        if *more != 0 {
            write!(f, " and {more} more")?;
        }
        Ok(())
    }
}

/// The result for the bytes at one suspect, decoded in one mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Are {
    Instruction,
    PartOfAnother,
    /// The decoder may be out of step, because bytes before them are no instruction; or no path is known to reach them.
    Unknown,
}

/// The search of one stretch.
struct Search<'a> {
    stretch: &'a Stretch<'a>,
    sites: &'a Sites,
    /// Where code or data is known to begin, by offset.
    begins: Vec<(usize, Begins)>,
    /// The mode that all of it may run in, in bits: 64 or 32.
    bits: u32,
    /// Offsets of the code at the entry point. It is entered in 32-bit mode and may switch, so that it is decoded in
    /// both modes.
    entered: std::ops::Range<usize>,
}

impl<'a> Search<'a> {
    fn new(elf: &object::File<'_>, symbols: &Symbols, stretch: &'a Stretch<'a>, sites: &'a Sites) -> Self {
        // Up to the next symbol, with all sites before it.
        let by_symbols = stretch.beginnings(symbols, elf.entry(), std::iter::empty());
        let entered = stretch.offset_of(elf.entry()).map_or(0..0, |start| {
            let end = by_symbols.iter().map(|(at, _)| *at).find(|at| *at > start).unwrap_or(stretch.bytes.len());
            start..end
        });
        let begins = stretch.beginnings(symbols, elf.entry(), sites.addresses_in(stretch.range()));
        Self { stretch, sites, begins, bits: if elf.is_64() { 64 } else { 32 }, entered }
    }

    fn search(&self, left: &mut usize, found: &mut Unlisted) {
        for Piece { start, bytes: code, begins } in self.stretch.pieces(&self.begins) {
            if begins == Begins::Data {
                continue;
            }
            let address = |at: usize| self.stretch.address_of(start.saturating_add(at));
            let mut suspects = suspects(code).filter(|(at, _)| self.sites.at(address(*at)).is_none()).peekable();
            if suspects.peek().is_none() {
                continue;
            }
            if code.len() > *left {
                suspects.for_each(|(at, rdtscp)| found.push(TscRead { address: address(at), rdtscp, sure: false }));
                continue;
            }
            *left = left.saturating_sub(code.len());
            let suspects: Vec<_> = suspects.collect();
            let modes: &[u32] = if self.entered.contains(&start) && self.bits == 64 {
                &[64, 32]
            } else {
                std::slice::from_ref(&self.bits)
            };
            let decoded: Vec<_> = modes.iter().map(|bits| decode(code, *bits, begins, &suspects)).collect();
            for (index, (at, rdtscp)) in suspects.iter().enumerate() {
                let is = |what: Are| move |are: &Vec<Are>| are.get(index) == Some(&what);
                if decoded.iter().all(is(Are::PartOfAnother)) {
                    continue;
                }
                let sure = decoded.iter().all(is(Are::Instruction));
                found.push(TscRead { address: address(*at), rdtscp: *rdtscp, sure });
            }
        }
    }
}

/// The offsets in `code` of the bytes of RDTSC (0f 31) and RDTSCP (0f 01 f9), and whether they are RDTSCP's.
fn suspects(code: &[u8]) -> impl Iterator<Item = (usize, bool)> {
    let may_begin = code.iter().enumerate().filter(|(_, byte)| **byte == 0x0f);
    may_begin.filter_map(|(at, _)| match code.get(at.saturating_add(1)..) {
        Some([0x31, ..]) => Some((at, false)),
        Some([0x01, 0xf9, ..]) => Some((at, true)),
        _ => None,
    })
}

/// Decodes `code` in the mode `bits`, and returns a result for each of `suspects`, which are sorted by offset.
///
/// Two flags decide whether a result is certain. `lost`: the decoder may be in the middle of an instruction. `reached`:
/// a path of execution leads to the current instruction. A branch target that was seen before settles both.
fn decode(code: &[u8], bits: u32, begins: Begins, suspects: &[(usize, bool)]) -> Vec<Are> {
    let mut decoder = Decoder::new(bits, code, DecoderOptions::NONE);
    let mut instruction = Instruction::default();
    let mut lost = begins != Begins::Instruction;
    // Becomes false after a jump or return: data can follow.
    let mut reached = true;
    // Targets of branches ahead of the current position.
    let mut targets = BTreeSet::new();
    let mut are = Vec::with_capacity(suspects.len());
    while are.len() < suspects.len() {
        let start = decoder.position();
        if !decoder.can_decode() {
            are.push(Are::Unknown);
            continue;
        }
        if targets.contains(&start) {
            (lost, reached) = (false, true);
        }
        // Addresses count from the first byte of `code`.
        decoder.set_ip(u64::try_from(start).unwrap_or(u64::MAX));
        decoder.decode_out(&mut instruction);
        let next_target = targets.range(start.saturating_add(1)..).next().copied();
        if instruction.is_invalid() {
            lost = true;
            // Try again at the next byte.
            let _ = decoder.set_position(start.saturating_add(1));
        } else if lost && let Some(target) = next_target.filter(|target| *target < decoder.position()) {
            // An instruction that was decoded while lost may be a wrong one. It must not run past a branch target,
            // where an instruction is known to begin.
            let _ = decoder.set_position(target);
        }
        let end = decoder.position();
        // Also with prefixes, which do not change the instruction.
        let reads = matches!(instruction.code(), Code::Rdtsc | Code::Rdtscp);
        while suspects.get(are.len()).is_some_and(|(suspect, _)| (start..end).contains(suspect)) {
            are.push(match (lost, reads) {
                (true, _) => Are::Unknown,
                (false, true) if !reached => Are::Unknown,
                (false, true) => Are::Instruction,
                (false, false) => Are::PartOfAnother,
            });
        }
        if !lost {
            let target = usize::try_from(instruction.near_branch_target()).ok().filter(|target| *target >= end);
            targets.extend(target);
            reached &= !ends_here(&instruction);
        }
    }
    are
}

/// Whether execution never continues at the next instruction.
fn ends_here(instruction: &Instruction) -> bool {
    use Mnemonic::{Iret, Iretd, Iretq, Jmp, Ret, Retf, Ud2};
    matches!(instruction.mnemonic(), Jmp | Ret | Retf | Iret | Iretd | Iretq | Ud2)
}

#[cfg(test)]
mod tests;
