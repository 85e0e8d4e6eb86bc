//! Linux' alternatives: instructions that it copies over others while it boots, if the CPU has a feature.
//!
//! The section `.altinstructions` is an array of packed entries, `struct alt_instr` in Linux
//! `arch/x86/include/asm/alternative.h`: the places of the code and of its replacement, each as a 32-bit offset from
//! the field itself; flags; the lengths of both in a byte each. Only the flags have changed: two bytes (until 6.2, with
//! a third one until 5.13), then four.

use object::{Object, ObjectSection};

use super::{Stretch, stretch_of};

/// Bytes of an entry, in the kernels that there are.
const ENTRY_BYTES: [usize; 3] = [14, 12, 13];
/// The section with the entries, and that with the instructions to copy.
const ENTRIES: &str = ".altinstructions";
const STORE: &str = ".altinstr_replacement";

/// The alternatives of a kernel; empty if it has none.
pub(super) struct Alternatives {
    entries: Vec<Entry>,
    store: std::ops::Range<u64>,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Entry {
    replacement: u64,
    code: u64,
    /// Bytes of the replacement: at most 255.
    length: u64,
}

impl Alternatives {
    pub(super) fn of(elf: &object::File<'_>, stretches: &[Stretch<'_>]) -> Self {
        let section = |name| elf.section_by_name(name);
        let store = section(STORE).map_or(0..0, |store| store.address()..store.address().saturating_add(store.size()));
        let entries = section(ENTRIES).and_then(|section| {
            let (address, bytes) = (section.address(), section.data().ok()?);
            // The right size is the one with which every entry makes sense.
            ENTRY_BYTES.into_iter().find_map(|size| entries(address, bytes, size, &store, stretches))
        });
        let mut entries = entries.unwrap_or_default();
        entries.sort_unstable();
        entries.dedup();
        Self { entries, store }
    }

    /// Whether the instruction at `address` is only stored there.
    pub(super) fn store(&self, address: u64) -> bool {
        self.store.contains(&address)
    }

    /// Where the instruction at `address` will be copied to.
    pub(super) fn targets(&self, address: u64) -> impl Iterator<Item = u64> {
        // No replacement that begins further back reaches here.
        let first = self.entries.partition_point(|entry| entry.replacement.saturating_add(u8::MAX.into()) < address);
        let near = self.entries.get(first..).unwrap_or_default().iter();
        near.take_while(move |entry| entry.replacement <= address).filter_map(move |entry| {
            let offset = address.checked_sub(entry.replacement).filter(|offset| *offset < entry.length)?;
            entry.code.checked_add(offset)
        })
    }
}

fn entries(
    section: u64,
    bytes: &[u8],
    size: usize,
    store: &std::ops::Range<u64>,
    stretches: &[Stretch<'_>],
) -> Option<Vec<Entry>> {
    if !bytes.len().is_multiple_of(size) {
        return None;
    }
    let mut entries = Vec::new();
    for (bytes, index) in bytes.chunks_exact(size).zip(0u64..) {
        let at = section.checked_add(index.checked_mul(u64::try_from(size).ok()?)?)?;
        let (code, rest) = bytes.split_first_chunk::<4>()?;
        let (replacement, rest) = rest.split_first_chunk::<4>()?;
        let [.., code_length, length] = rest else { return None };
        let code = at.checked_add_signed(i64::from(i32::from_le_bytes(*code)))?;
        let replacement = at.checked_add(4)?.checked_add_signed(i64::from(i32::from_le_bytes(*replacement)))?;
        let length = u64::from(*length);
        let fits = length <= u64::from(*code_length)
            && stretch_of(stretches, code).is_some()
            && (length == 0 || store.contains(&replacement) && replacement.checked_add(length)? <= store.end);
        if !fits {
            return None;
        }
        entries.push(Entry { code, replacement, length });
    }
    Some(entries)
}
