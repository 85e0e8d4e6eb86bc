//! The parts of an ELF file that the VMM uses: its segments, its entry point, and the sections of [`guest_abi`].

use object::{
    Endianness,
    read::elf::{FileHeader, ProgramHeader},
};
use vm_memory::{Bytes, GuestAddress};

use super::{ImageError, image::File, place::Places};

/// The PVH entry note (Linux `include/xen/interface/elfnote.h`, `XEN_ELFNOTE_PHYS32_ENTRY`).
const PVH_NOTE: object::elf::NoteType = object::elf::NoteType(18);
const PVH_OWNER: &[u8] = b"Xen";

/// An ELF executable for x86.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Elf {
    /// Loadable segments that are not empty.
    pub(super) segments: Vec<Segment>,
    /// The physical address of the entry point.
    pub(super) entry: u64,
    /// It has a PVH entry.
    pub(super) has_pvh_note: bool,
    /// The section of trap sites.
    pub(super) sites: Option<Vec<u8>>,
    /// The address of the tick ring.
    pub(super) ring: Option<u64>,
}

/// A loadable segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    /// Physical address.
    pub(super) address: u64,
    /// Size in memory; what the file does not hold is zero.
    pub(super) size: u64,
    /// Its offset in the file.
    pub(super) offset: u64,
    /// How much of it is in the file.
    pub(super) file_size: u64,
}

impl Elf {
    /// Parses a file of the class `H`.
    pub(super) fn parse<H: FileHeader<Endian = Endianness>>(bytes: &[u8]) -> Result<Self, String> {
        let text = |error: object::read::Error| error.to_string();
        let header = H::parse(bytes).map_err(text)?;
        let endian = header.endian().map_err(text)?;
        let machine = header.e_machine(endian);
        let wanted = if header.is_type_64() { object::elf::EM_X86_64 } else { object::elf::EM_386 };
        if machine != wanted || endian != Endianness::Little {
            return Err(format!("an ELF file for another machine than x86-64, number {}", machine.0));
        }
        let headers = header.program_headers(endian, bytes).map_err(text)?;
        let entry: u64 = header.e_entry(endian).into();
        let (mut segments, mut physical_entry, mut has_pvh_note) = (Vec::new(), entry, false);
        for program in headers {
            let (address, size): (u64, u64) = (program.p_paddr(endian).into(), program.p_memsz(endian).into());
            if program.p_type(endian) == object::elf::PT_LOAD && size > 0 {
                let (offset, file_size) = program.file_range(endian);
                // The entry point is a virtual address.
                let inside = entry.checked_sub(program.p_vaddr(endian).into()).filter(|inside| *inside < size);
                if let Some(inside) = inside {
                    physical_entry = address.saturating_add(inside);
                }
                segments.push(Segment { address, size, offset, file_size });
            }
            let Ok(Some(mut notes)) = program.notes(endian, bytes) else { continue };
            while let Ok(Some(note)) = notes.next() {
                has_pvh_note |= note.n_type(endian) == PVH_NOTE && note.name() == PVH_OWNER;
            }
        }
        let sections = header.sections(endian, bytes).map_err(text)?;
        let section = |name: &str| sections.section_by_name(endian, name.as_bytes()).map(|(_, section)| section);
        let sites = match section(guest_abi::sites::SECTION) {
            Some(found) => {
                use object::read::elf::SectionHeader;
                Some(found.data(endian, bytes).map_err(text)?.to_owned())
            }
            None => None,
        };
        let ring = section(guest_abi::report::SECTION).map(|found| {
            use object::read::elf::SectionHeader;
            found.sh_addr(endian).into()
        });
        Ok(Self { segments, entry: physical_entry, has_pvh_note, sites, ring })
    }

    /// Takes the segments' memory. Checked here and not in the loader, whose message would not say how much RAM is
    /// needed.
    pub(super) fn take(&self, file: File<'_>, places: &mut Places<'_>) -> Result<(), ImageError> {
        self.segments.iter().try_for_each(|segment| file.take(places, segment.address, segment.size))
    }

    /// Writes the segments, whose memory was taken before. The rest of a segment (bss) is zero, as fresh guest memory
    /// is.
    pub(super) fn write(&self, file: File<'_>, places: &Places<'_>) -> Result<(), ImageError> {
        for segment in &self.segments {
            let cut_off = || file.failed(format!("the file ends within the segment at {:#x}", segment.address));
            let end = segment.offset.checked_add(segment.file_size.min(segment.size)).ok_or_else(cut_off)?;
            let range = usize::try_from(segment.offset).ok().zip(usize::try_from(end).ok()).ok_or_else(cut_off)?;
            let data = file.bytes.get(range.0..range.1).ok_or_else(cut_off)?;
            let written = places.memory().write_slice(data, GuestAddress(segment.address));
            written.map_err(|error| file.failed(error.to_string()))?;
        }
        Ok(())
    }
}
