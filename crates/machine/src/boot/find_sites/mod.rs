//! Finds trap sites in a kernel that does not list them.
//!
//! The code is decoded from one end to the other. RDTSC and PAUSE are known by themselves, a WRMSR of
//! IA32_TSC_DEADLINE by the MOV that loads ECX shortly before it. What Linux copies over other code while it boots
//! (alternatives) is a site where it is stored and where it will be copied to.
//!
//! A site is two bytes of an instruction; so RDTSCP, which has three, is none. CPUID does not offer it, and kernels
//! use it only where CPUID does.

mod alternatives;
mod decode;
pub mod list;

use std::collections::BTreeMap;

pub use guest_abi::sites::Kind;
use object::{Object, ObjectSection, ObjectSymbol, SymbolKind, read::elf::ProgramHeader};

use self::{
    alternatives::Alternatives,
    decode::{Decoded, Seen},
};
use super::{
    code::{Stretch, Symbols, stretches},
    sites::{MAX_SITES, SiteError, SiteState, Sites},
};

/// A site that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundSite {
    /// Its place and kind.
    pub site: SiteState,
    /// The instruction.
    pub kind: Kind,
    /// How it comes there.
    pub origin: Origin,
    /// The function it is in, and how far from its beginning, if the file has symbols.
    pub function: Option<(String, u64)>,
}

/// How an instruction comes to its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The file has it there.
    Code,
    /// It is stored there, to be copied elsewhere (Linux' `.altinstr_replacement`).
    Replacement,
    /// The kernel copies it there while it boots, if the CPU has what the copy needs.
    CopiedFrom(u64),
}

/// What was found in a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// The sites, by linear address.
    pub sites: Vec<FoundSite>,
    /// RDTSCPs, by linear address.
    pub rdtscp: Vec<u64>,
    /// Bytes of RDTSC where the decoder was out of step: perhaps an instruction, perhaps data. They are no sites.
    pub unsure: Vec<u64>,
    /// WRMSRs of an MSR that the code around does not name.
    pub other_wrmsr: u64,
}

/// A file in which no sites can be found.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FindError {
    /// It is not an ELF file.
    #[error("not an ELF file: {0}")]
    NotElf(String),
    /// Code outside of every segment would not be loaded.
    #[error("the code at {0:#x} is in no loadable segment")]
    NotLoaded(u64),
    /// There is no RDTSC.
    #[error("no RDTSC in its code, but {rdtscp} RDTSCP, and {unsure} that may be RDTSC or data")]
    None {
        /// RDTSCPs.
        rdtscp: usize,
        /// RDTSC or data.
        unsure: usize,
    },
    /// Two sections hold the same code.
    #[error("its sections of code overlap at {0:#x}")]
    Overlap(u64),
    /// The sites that were found contradict each other.
    #[error(transparent)]
    Sites(#[from] SiteError),
}

impl Found {
    /// Searches an ELF file.
    ///
    /// # Errors
    /// [`FindError`].
    pub fn search(file: &[u8]) -> Result<Self, FindError> {
        let elf = object::File::parse(file).map_err(|error| FindError::NotElf(error.to_string()))?;
        let mut stretches = stretches(&elf);
        stretches.sort_by_key(|stretch| stretch.address);
        // So all of them together have no more bytes than the file, or a hostile file could cost any time.
        if let Some([_, second]) = stretches.array_windows().find(|[a, b]| a.range().end > b.address) {
            return Err(FindError::Overlap(second.address));
        }
        let symbols = Symbols::of(&elf);
        let mut decoded = Decoded::default();
        for stretch in &stretches {
            decoded.read(&elf, &symbols, stretch)?;
        }
        let alternatives = Alternatives::of(&elf, &stretches);
        let places = Places::of(&elf);
        let mut found = BTreeMap::new();
        for Seen { address, kind } in &decoded.seen {
            let stored = alternatives.store(*address);
            for target in alternatives.targets(*address) {
                found.insert(target, (*kind, Origin::CopiedFrom(*address)));
                at_most(found.len())?;
            }
            found.insert(*address, (*kind, if stored { Origin::Replacement } else { Origin::Code }));
        }
        let mut sites: Vec<FoundSite> = Vec::new();
        for (address, (kind, origin)) in found {
            let later = matches!(origin, Origin::CopiedFrom(_));
            // What is copied may begin within an instruction that is there until then. Only one of them is ever there
            // whole; that is the copy on every CPU that `vmm` runs on.
            if sites.last().is_some_and(|last| address.saturating_sub(last.site.address) < 2) {
                if !later {
                    continue;
                }
                sites.pop();
            }
            let physical = places.physical(address).ok_or(FindError::NotLoaded(address))?;
            let site =
                SiteState { address, physical: (physical != address).then_some(physical), kind: kind as u32, later };
            sites.push(FoundSite { site, kind, origin, function: None });
        }
        if !sites.iter().any(|found| found.kind == Kind::Rdtsc) {
            return Err(FindError::None { rdtscp: decoded.rdtscp.len(), unsure: decoded.unsure.len() });
        }
        name_functions(&elf, &mut sites);
        let Decoded { seen: _, rdtscp, unsure, other_wrmsr } = decoded;
        Ok(Self { sites, rdtscp, unsure, other_wrmsr })
    }

    /// The table for a machine.
    ///
    /// # Errors
    /// [`FindError::Sites`].
    pub fn table(&self) -> Result<Sites, FindError> {
        let state: Vec<_> = self.sites.iter().map(|found| found.site).collect();
        Ok(Sites::from_state(&state)?)
    }

    /// How many sites are of `kind`.
    #[must_use]
    pub fn count(&self, kind: Kind) -> usize {
        self.sites.iter().filter(|found| found.kind == kind).count()
    }
}

/// Where segments are loaded.
struct Places(Vec<(std::ops::Range<u64>, u64)>);

impl Places {
    fn of(elf: &object::File<'_>) -> Self {
        match elf {
            object::File::Elf32(file) => Self::loaded(file.endian(), file.elf_program_headers()),
            object::File::Elf64(file) => Self::loaded(file.endian(), file.elf_program_headers()),
            _ => Self(Vec::new()),
        }
    }

    fn loaded<H: ProgramHeader>(endian: H::Endian, headers: &[H]) -> Self {
        let loaded = headers.iter().filter(|header| header.p_type(endian) == object::elf::PT_LOAD);
        let place = |header: &H| {
            let start: u64 = header.p_vaddr(endian).into();
            (start..start.saturating_add(header.p_memsz(endian).into()), header.p_paddr(endian).into())
        };
        Self(loaded.map(place).collect())
    }

    /// The physical address at which the linear address is loaded.
    fn physical(&self, address: u64) -> Option<u64> {
        let (range, physical) = self.0.iter().find(|(range, _)| range.contains(&address))?;
        physical.checked_add(address.checked_sub(range.start)?)
    }
}

/// Characters of a function's name that are kept at most: a hostile file may have names of any length.
const NAME_CHARS: usize = 200;

/// Fills in the functions: the last symbol at or before each site.
fn name_functions(elf: &object::File<'_>, sites: &mut [FoundSite]) {
    let mut functions: Vec<(u64, &str)> = elf
        .symbols()
        .filter(|symbol| symbol.is_definition() && symbol.kind() == SymbolKind::Text)
        .filter_map(|symbol| Some((symbol.address(), symbol.name().ok()?)))
        .collect();
    functions.sort_unstable();
    let mut ends: Vec<u64> = elf.sections().map(|section| section.address().saturating_add(section.size())).collect();
    ends.sort_unstable();
    for found in sites {
        let address = found.site.address;
        let after = functions.partition_point(|(start, _)| *start <= address);
        let Some((start, name)) = after.checked_sub(1).and_then(|last| functions.get(last)) else { continue };
        // A symbol of another section names nothing here.
        let next_end = ends.get(ends.partition_point(|end| end < start));
        if next_end.is_none_or(|end| *end >= address) {
            found.function = Some((name.chars().take(NAME_CHARS).collect(), address.saturating_sub(*start)));
        }
    }
}

/// Refuses more sites than a machine can have, before they take memory.
fn at_most(sites: usize) -> Result<(), SiteError> {
    if sites > MAX_SITES { Err(SiteError::TooMany(sites)) } else { Ok(()) }
}

/// The stretch that holds the linear address, of those sorted by address.
fn stretch_of<'s, 'a>(stretches: &'s [Stretch<'a>], address: u64) -> Option<&'s Stretch<'a>> {
    let after = stretches.partition_point(|stretch| stretch.address <= address);
    let stretch = stretches.get(after.checked_sub(1)?)?;
    stretch.offset_of(address).map(|_| stretch)
}

#[cfg(test)]
mod tests;
