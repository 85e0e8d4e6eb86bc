//! Trap sites: instructions of the guest that the VMM emulates.
//!
//! The image lists them (see [`guest_abi::sites`]), or the VMM finds them in its code ([`super::find_sites`]). The VMM
//! can patch each to `HLT; NOP`, which exits; at the address of a site it then emulates the original instruction. The
//! table comes from an image, a file or a snapshot and is not trusted: each entry must be the address of RAM that holds
//! the bytes of its kind.
//!
//! A kernel runs at other linear addresses than the physical ones at which it is loaded, and it writes some of its
//! instructions only while it boots. Linux copies an alternative instruction over the first choice. The copied bytes
//! are then those of a patched site, because the VMM patched what was copied.

use std::{collections::BTreeMap, ops::Range};

use guest_abi::sites::{Kind, PATCH, SITE_BYTES, Site};
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};

use crate::{
    blame::{Blame, Blamed},
    mem::ram::GuestRam,
};

/// More than any guest has; bounds the memory that a hostile image can make the VMM use.
pub(super) const MAX_SITES: usize = 65_536;

/// A table that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SiteError {
    /// The section is not an array of entries.
    #[error("the trap-site table has {0} bytes, which is not a whole number of {SITE_BYTES}-byte entries")]
    Ragged(usize),
    /// Too many.
    #[error("the trap-site table has {0} entries; at most {MAX_SITES} are possible")]
    TooMany(usize),
    /// An unknown kind of site.
    #[error("trap site {address:#x} has the unknown kind {kind}")]
    UnknownKind {
        /// Its address.
        address: u64,
        /// The kind's number.
        kind: u32,
    },
    /// A site outside RAM.
    #[error("trap site {0:#x} is not in guest memory")]
    OutsideMemory(u64),
    /// Another instruction is at that address.
    #[error("trap site {address:#x} should hold {expected:02x?} ({kind:?}) but holds {found:02x?}")]
    WrongBytes {
        /// Its address.
        address: u64,
        /// The kind in the table.
        kind: Kind,
        /// The instruction of that kind.
        expected: [u8; 2],
        /// The bytes that are there.
        found: [u8; 2],
    },
    /// Two sites share a byte.
    #[error("trap site {0:#x} overlaps the one before it")]
    Overlap(u64),
}

impl Blamed for SiteError {
    fn blame(&self) -> Blame {
        match self {
            Self::Ragged(_)
            | Self::TooMany(_)
            | Self::UnknownKind { .. }
            | Self::OutsideMemory(_)
            | Self::WrongBytes { .. }
            | Self::Overlap(_) => Blame::Usage,
        }
    }
}

/// The guest's trap sites, by linear address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sites {
    by_address: BTreeMap<u64, Place>,
    /// The guest does not list them.
    found: bool,
}

/// What is at a site.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    kind: Kind,
    /// Guest physical address.
    physical: u64,
    /// The guest writes the instruction there later, if at all.
    later: bool,
}

/// A site as a snapshot holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SiteState {
    /// Linear address.
    pub address: u64,
    /// Physical address, if it is another one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub physical: Option<u64>,
    /// The kind's number, see [`Kind`].
    pub kind: u32,
    /// The guest writes the instruction there later, if at all: now there may be other bytes.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub later: bool,
}

impl Sites {
    /// The table in an image's section.
    ///
    /// # Errors
    /// [`SiteError`] for a table that is not one.
    pub fn from_section(bytes: &[u8]) -> Result<Self, SiteError> {
        let (entries, rest) = bytes.as_chunks::<SITE_BYTES>();
        if !rest.is_empty() {
            return Err(SiteError::Ragged(bytes.len()));
        }
        let entries = entries.iter().map(Site::from_bytes);
        let state = |Site { address, kind, .. }| SiteState { address, physical: None, kind, later: false };
        Self::from_state(&entries.map(state).collect::<Vec<_>>())
    }

    /// The table in a snapshot, or one that was found.
    ///
    /// # Errors
    /// [`SiteError`] for a table that is not one.
    pub fn from_state(state: &[SiteState]) -> Result<Self, SiteError> {
        if state.len() > MAX_SITES {
            return Err(SiteError::TooMany(state.len()));
        }
        let mut by_address = BTreeMap::new();
        for SiteState { address, physical, kind, later } in state.iter().copied() {
            let kind = Kind::from_number(kind).ok_or(SiteError::UnknownKind { address, kind })?;
            let place = Place { kind, physical: physical.unwrap_or(address), later };
            if by_address.insert(address, place).is_some() {
                return Err(SiteError::Overlap(address));
            }
        }
        let mut previous = None;
        for address in by_address.keys() {
            if previous.is_some_and(|previous: u64| *address - previous < 2) {
                return Err(SiteError::Overlap(*address));
            }
            previous = Some(*address);
        }
        Ok(Self { by_address, found: false })
    }

    /// The same, as the sites of a guest that does not list them, if `found`.
    #[must_use]
    pub fn found(self, found: bool) -> Self {
        Self { found, ..self }
    }

    /// Whether they were found in the guest's code. A guest that lists its sites is made for it: it reads the TSC
    /// nowhere else, nor does it run user programs that could, and it lists a PAUSE only where it waits for a CPU.
    #[must_use]
    pub fn are_found(&self) -> bool {
        self.found
    }

    /// The table for a snapshot.
    #[must_use]
    pub fn state(&self) -> Vec<SiteState> {
        let state = |(address, place): (&u64, &Place)| SiteState {
            address: *address,
            physical: (place.physical != *address).then_some(place.physical),
            kind: place.kind as u32,
            later: place.later,
        };
        self.by_address.iter().map(state).collect()
    }

    /// Checks that every site is in RAM and holds its original bytes, unless the guest writes them later.
    ///
    /// # Errors
    /// [`SiteError::OutsideMemory`], [`SiteError::WrongBytes`].
    pub fn check(&self, memory: &GuestRam) -> Result<(), SiteError> {
        for (address, place) in &self.by_address {
            let found = place.bytes(memory).ok_or(SiteError::OutsideMemory(*address))?;
            let expected = place.kind.original();
            if found != expected && !place.later {
                return Err(SiteError::WrongBytes { address: *address, kind: place.kind, expected, found });
            }
        }
        Ok(())
    }

    /// Whether there is a site of this kind.
    #[must_use]
    pub fn has(&self, kind: Kind) -> bool {
        self.by_address.values().any(|place| place.kind == kind)
    }

    /// The site at the linear address `address`.
    #[must_use]
    pub fn at(&self, address: u64) -> Option<Kind> {
        self.by_address.get(&address).map(|place| place.kind)
    }

    /// The site at the linear address `address`, if it is patched now: the guest may have written other code there.
    #[must_use]
    pub fn patched_at(&self, address: u64, memory: &GuestRam) -> Option<Kind> {
        let place = self.by_address.get(&address)?;
        (place.bytes(memory)? == PATCH).then_some(place.kind)
    }

    /// The linear addresses within `range`, rising.
    pub fn addresses_in(&self, range: Range<u64>) -> impl Iterator<Item = u64> {
        // An empty range that begins behind its end would be a panic.
        let range = if range.start < range.end { range } else { 0..0 };
        self.by_address.range(range).map(|(address, _)| *address)
    }

    fn filter(&self, keep: impl Fn(&Place) -> bool) -> Self {
        let by_address = self.by_address.iter().filter(|(_, place)| keep(place)).map(|(a, p)| (*a, *p)).collect();
        Self { by_address, found: self.found }
    }

    /// The sites that `keep` accepts.
    #[must_use]
    pub fn only(&self, keep: impl Fn(Kind) -> bool) -> Self {
        self.filter(|place| keep(place.kind))
    }

    /// The sites that still hold their instruction, and those that may hold it later: a guest may overwrite its own
    /// code, and use the memory for something else. `patched` are those of them that were patched; one of these that
    /// has its original bytes holds data that only looks like it.
    #[must_use]
    pub fn alive(&self, patched: &Self, memory: &GuestRam) -> Self {
        let holds = |address: u64, place: &Place| {
            let Some(bytes) = place.bytes(memory) else { return false };
            match (patched.by_address.contains_key(&address), place.later) {
                (true, true) => bytes != place.kind.original(),
                (true, false) => bytes == PATCH,
                (false, later) => later || bytes == place.kind.original(),
            }
        };
        let alive = self.by_address.iter().filter(|(address, place)| holds(**address, place));
        Self { by_address: alive.map(|(address, place)| (*address, *place)).collect(), found: self.found }
    }

    /// Puts `HLT; NOP` at every site that holds its original bytes.
    pub fn patch(&self, memory: &GuestRam) {
        for place in self.by_address.values() {
            place.replace(memory, place.kind.original(), PATCH);
        }
    }

    /// Puts the original bytes back at every site that is patched. Returns which these were.
    #[must_use]
    pub fn unpatch(&self, memory: &GuestRam) -> Self {
        let patched = |place: &Place| place.replace(memory, PATCH, place.kind.original());
        self.filter(patched)
    }
}

impl Place {
    /// The two bytes that are there now; none if that is not RAM.
    fn bytes(&self, memory: &GuestRam) -> Option<[u8; 2]> {
        let mut bytes = [0; 2];
        memory.read_slice(&mut bytes, GuestAddress(self.physical)).ok()?;
        Some(bytes)
    }

    /// Writes `to` if `from` is there, and returns whether it was. A guest that overwrote its own site keeps what it
    /// wrote. (A site outside RAM was refused by [`Sites::check`].)
    fn replace(&self, memory: &GuestRam, from: [u8; 2], to: [u8; 2]) -> bool {
        self.bytes(memory) == Some(from) && memory.write_slice(&to, GuestAddress(self.physical)).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blame::tests::all_blame;

    fn section(entries: &[(u64, u32)]) -> Vec<u8> {
        entries
            .iter()
            .flat_map(|(address, kind)| [address.to_le_bytes(), u64::from(*kind).to_le_bytes()].concat())
            .collect()
    }

    fn memory() -> GuestRam {
        GuestRam::from_ranges(&[(GuestAddress(0), 0x4000)]).unwrap()
    }

    #[test]
    fn patches_and_restores_only_listed_sites() {
        let memory = memory();
        memory.write_slice(&[0x0f, 0x31, 0x90, 0x0f, 0x30], GuestAddress(0x1000)).unwrap();
        let sites = Sites::from_section(&section(&[(0x1000, 1), (0x1003, 2)])).unwrap();
        sites.check(&memory).unwrap();
        sites.patch(&memory);
        let mut bytes = [0; 5];
        memory.read_slice(&mut bytes, GuestAddress(0x1000)).unwrap();
        assert_eq!(bytes, [0xf4, 0x90, 0x90, 0xf4, 0x90]);
        // The guest overwrote one: it keeps what it wrote.
        memory.write_slice(&[0xcc, 0xcc], GuestAddress(0x1003)).unwrap();
        let unpatched = sites.unpatch(&memory);
        memory.read_slice(&mut bytes, GuestAddress(0x1000)).unwrap();
        assert_eq!(bytes, [0x0f, 0x31, 0x90, 0xcc, 0xcc]);
        assert_eq!(unpatched, sites.only(|kind| kind == Kind::Rdtsc));
    }

    // Catches: a guest that frees its start-up code, and finds two bytes of its data overwritten after a save or a
    // restore, because they happen to be those of the instruction that was there.
    #[test]
    fn data_in_the_place_of_a_site_is_left_alone() {
        let memory = memory();
        let rdtsc = Kind::Rdtsc.original();
        let at = [0x1000, 0x1008, 0x1010, 0x1018];
        for address in at {
            memory.write_slice(&rdtsc, GuestAddress(address)).unwrap();
        }
        let site = |address, later| SiteState { address, physical: None, kind: 1, later };
        let sites =
            Sites::from_state(&[site(at[0], false), site(at[1], false), site(at[2], true), site(at[3], true)]).unwrap();
        sites.patch(&memory);
        // The guest now has its own data at the second and the fourth.
        memory.write_slice(&rdtsc, GuestAddress(at[1])).unwrap();
        memory.write_slice(&rdtsc, GuestAddress(at[3])).unwrap();
        let alive = sites.alive(&sites, &memory);
        assert_eq!(alive.addresses_in(0..u64::MAX).collect::<Vec<_>>(), [at[0], at[2]]);
        let unpatched = sites.unpatch(&memory);
        assert_eq!(unpatched, alive);
        unpatched.patch(&memory);
        let bytes = at.map(|address| memory.read_obj::<[u8; 2]>(GuestAddress(address)).unwrap());
        assert_eq!(bytes, [PATCH, rdtsc, PATCH, rdtsc]);
        // Where nothing was patched, nothing tells such data from an instruction.
        assert_eq!(sites.alive(&Sites::default(), &memory).addresses_in(0..u64::MAX).count(), 3);
    }

    // Catches: an image or a snapshot with a bad table, reported as a guest that failed.
    #[test]
    fn a_table_is_the_users() {
        let bytes = [0; 2];
        let errors = [
            SiteError::Ragged(1),
            SiteError::TooMany(1),
            SiteError::UnknownKind { address: 1, kind: 9 },
            SiteError::OutsideMemory(1),
            SiteError::WrongBytes { address: 1, kind: Kind::Rdtsc, expected: bytes, found: bytes },
            SiteError::Overlap(1),
        ];
        all_blame(Blame::Usage, errors);
    }

    #[test]
    fn hostile_tables_are_refused() {
        assert_eq!(Sites::from_section(&[0; 17]), Err(SiteError::Ragged(17)));
        assert_eq!(Sites::from_section(&section(&[(8, 99)])), Err(SiteError::UnknownKind { address: 8, kind: 99 }));
        assert_eq!(Sites::from_section(&section(&[(8, 1), (9, 1)])), Err(SiteError::Overlap(9)));
        assert_eq!(Sites::from_section(&section(&[(8, 1), (8, 2)])), Err(SiteError::Overlap(8)));
        let sites = Sites::from_section(&section(&[(u64::MAX, 1)])).unwrap();
        assert_eq!(sites.check(&memory()), Err(SiteError::OutsideMemory(u64::MAX)));
        let sites = Sites::from_section(&section(&[(0x1000, 1)])).unwrap();
        assert!(matches!(sites.check(&memory()), Err(SiteError::WrongBytes { .. })));
    }

    // Catches: a site looked for, patched or saved at its linear address although it is loaded elsewhere; a copied
    // instruction that is refused at the start, or lost by a snapshot that is made before the guest copies it.
    #[test]
    fn a_kernel_is_patched_where_it_is_loaded_and_may_copy_instructions_later() {
        const LINEAR: u64 = 0xffff_ffff_8000_1000;
        let memory = memory();
        memory.write_slice(&[0x0f, 0x31], GuestAddress(0x1000)).unwrap();
        let site = |at, later| SiteState { address: LINEAR + at, physical: Some(0x1000 + at), kind: 1, later };
        let state = [site(0, false), site(8, true)];
        let sites = Sites::from_state(&state).unwrap();
        sites.check(&memory).unwrap();
        sites.patch(&memory);
        assert_eq!(sites.patched_at(LINEAR, &memory), Some(Kind::Rdtsc));
        assert_eq!(sites.patched_at(0x1000, &memory), None);
        assert_eq!(sites.patched_at(LINEAR + 8, &memory), None);
        assert_eq!(sites.alive(&sites, &memory).state(), state);
        // The guest copies the patched instruction.
        memory.write_slice(&PATCH, GuestAddress(0x1008)).unwrap();
        assert_eq!(sites.patched_at(LINEAR + 8, &memory), Some(Kind::Rdtsc));
        assert_eq!(sites.unpatch(&memory).state(), state);
        let mut bytes = [0; 2];
        memory.read_slice(&mut bytes, GuestAddress(0x1008)).unwrap();
        assert_eq!(bytes, [0x0f, 0x31]);
        // One that is not copied must hold its instruction from the start.
        let refused = Sites::from_state(&[site(16, false)]).unwrap().check(&memory);
        assert!(matches!(refused, Err(SiteError::WrongBytes { .. })));
    }
}
